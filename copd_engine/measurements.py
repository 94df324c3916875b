"""What a run measures of its branches on the way: accuracy on held-out prompts, distances and angles on the probes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from copd_engine.branch import Branch
from copd_engine.config import RunConfig
from copd_engine.diagnostics import BASE, UpdateAngles, change_cosines, compare_branches
from copd_engine.held_out import HeldOut
from copd_engine.models.base import Policy
from copd_engine.result import accuracy_row
from copd_engine.step import StepRunner


class Measurements:
    """``base``: the model that all branches started from, whose weights may wait in host memory; ``usable_base`` gives
    one that can compute. The engine is left awake."""

    def __init__(
        self,
        config: RunConfig,
        base: Policy,
        usable_base: Callable[[], Policy],
        branches: Mapping[str, Branch],
        steps: StepRunner,
        held_out: HeldOut,
    ) -> None:
        self._settings = config.diagnostics
        self._num_prompts = config.eval.num_prompts
        self._base = base
        self._usable_base = usable_base
        self._branches = branches
        self._steps = steps
        self._held_out = held_out
        self.probes = held_out.probes()
        self.angles: UpdateAngles | None = None
        self.begin_angles()

    def begin_angles(self) -> None:
        """The angles between updates count from the branches as they are now."""
        self.angles = UpdateAngles(self._branches) if self._settings.update_angle else None

    def base_accuracies(self) -> dict[str, dict[str, float]]:
        """As :meth:`accuracies` for branches that all still equal the base, measured once; no samples are kept."""
        first = next(iter(self._branches))
        accuracies, _ = self._held_out.evaluate(self._steps.engine, first, self._num_prompts)
        return {name: accuracy_row(accuracies) for name in self._branches}

    def accuracies(self, step: int, students: Sequence[str]) -> dict[str, dict[str, float]]:
        """Held-out accuracy by student and domain; the first samples are kept under ``step``."""
        rows = {}
        for name in students:
            accuracies, samples = self._held_out.evaluate(self._steps.engine, name, self._num_prompts)
            rows[name] = accuracy_row(accuracies)
            self._held_out.keep_samples(step, name, samples)
        return rows

    def distances(self, models: Sequence[str]) -> dict[str, Any]:
        """``pairs``: rows of :func:`copd_engine.diagnostics.compare_branches` between these branches, with the cosines
        of all they learned and of what they learned since the last call; ``base``: of each against the base."""
        branches = {name: self._branches[name] for name in models}
        rows = compare_branches(
            branches, self._steps.engine, self.probes, self._steps.sampling, self._settings.top_k, self._usable_base()
        )
        start = self._base.full_parameters()
        tasks = change_cosines(
            {name: branch.full_parameters() for name, branch in branches.items()}, dict.fromkeys(branches, start)
        )
        updates = self.angles.cosines(branches) if self.angles else {}
        pairs = [row for row in rows if row["teacher"] != BASE]
        for row in pairs:
            edge = str(row["student"]), str(row["teacher"])
            row["task_cosine"] = tasks[edge]
            if updates:
                row["update_cosine"] = updates[edge]
        return {"pairs": pairs, "base": [row for row in rows if row["teacher"] == BASE]}
