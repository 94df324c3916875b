"""What every method's schedule offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from copd_engine.algorithms.plan import StepPlan
from copd_engine.config import RunConfig


class Steps(ABC):
    """The steps of one method.

    ``students``: all models that it trains. ``first_step``..``num_steps``: the steps of a run; where measurements end
    phases or the run, ``num_steps`` is an estimate until the run is over. ``equal_steps``: where a baseline has taken
    as many steps as CoPD and goes on, or None. ``equal_flops``: where it has computed as much as a CoPD run, which took
    ``flops_goal``, or None. ``experts_step``: after it the single experts are kept, or None.
    """

    num_steps: int
    first_step = 1
    equal_steps: int | None = None
    equal_flops: int | None = None
    flops_goal: int | None = None
    experts_step: int | None = None

    def __init__(self, config: RunConfig, students: tuple[str, ...]) -> None:
        self.config = config
        self.students = students

    @property
    def equal_rollouts(self) -> int:
        """The step after which as many rollouts are drawn as CoPD draws: the last one, unless the run goes on."""
        return self.num_steps

    @abstractmethod
    def plan(self, step: int) -> StepPlan:
        """The plan of a step within the bounds."""

    def is_measured(self, step: int) -> bool:
        """Whether the distances between the models are needed after this step, whatever the config's interval says: at
        the end of each phase and of the run, so that each phase's whole change is seen. A baseline has no phases: it is
        measured where it has drawn CoPD's number of rollouts, which is its end unless it goes on (``flops_of``)."""
        if step == self.num_steps:
            return True
        here, following = self.plan(step), self.plan(step + 1)
        return (here.cycle, here.phase) != (following.cycle, following.phase)

    def observe(self, step: int, distances: dict[str, float], flops: int) -> None:
        """What was measured after a step that was taken: means over all edges by metric, empty if nothing was, and the
        training FLOPs of all models up to it."""
        return

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        return
