"""Labels of the rows of a run's result."""

from __future__ import annotations

from copd_engine.algorithms.plan import STUDENT
from copd_engine.algorithms.schedule import Schedule
from copd_engine.algorithms.static import final_model
from copd_engine.config import RunConfig

#: What follows the label of a baseline's model that has taken as many steps as CoPD's, and goes on; of a single expert
#: always as many as the fixed schedule has.
EQUAL_STEPS = ", equal steps"
#: And of one that has computed as much as a CoPD run (``flops_of``).
EQUAL_FLOPS = ", equal FLOPs"


def final_label(config: RunConfig) -> str | None:
    """Label of the model that a run ends with, at CoPD's number of rollouts; None for a lone branch, which has nothing
    to be merged with."""
    is_lone = len(config.branches) == 1 and config.method in ("copd", "expert")
    return None if is_lone else final_model(config)[0]


def result_labels(config: RunConfig) -> tuple[str, ...]:
    """The labels of all rows that a run of ``config`` without baselines ends with."""
    schedule = Schedule(config)
    experts = [f"expert:{name}" for name in schedule.students if name != STUDENT]
    final = [label for label in (final_label(config),) if label is not None]
    if config.method == "copd":
        return ("base", *(f"branch:{name}" for name in config.branch_names), *final)
    if config.method in ("static_opd", "mopd"):
        return ("base", *(label + EQUAL_STEPS for label in experts), *final)
    experts = experts if config.method == "expert" else []
    at_equal_steps = [*(experts if schedule.experts_step else []), *(final if schedule.equal_steps else [])]
    labels = ["base", *experts, *final, *(label + EQUAL_STEPS for label in at_equal_steps)]
    if config.flops_of:
        labels += [label + EQUAL_FLOPS for label in (*experts, *final)]
    return tuple(labels)
