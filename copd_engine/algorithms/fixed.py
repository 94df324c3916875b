"""Methods whose steps follow from the config alone: CoPD under its fixed schedule, single experts, mixed RLVR."""

from __future__ import annotations

from typing import Any

from copd_engine.algorithms.plan import MIXED, Assignment, StepPlan
from copd_engine.algorithms.shares import (
    copd_prompts,
    copd_steps,
    copd_student_steps,
    opd_assignments,
    rl_assignments,
    shares_of,
)
from copd_engine.algorithms.steps import Steps
from copd_engine.config import RunConfig
from copd_engine.types import UserError


class CopdSteps(Steps):
    """Algorithm 1."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config, config.branch_names)
        self.num_steps = copd_steps(config)

    def plan(self, step: int) -> StepPlan:
        schedule = self.config.schedule
        cycle, within = divmod(step - 1, schedule.rl_steps + schedule.opd_steps)
        if within < schedule.rl_steps:
            return StepPlan(step, cycle + 1, "rl", rl_assignments(self.config, self.students))
        opd_steps_before = step - 1 - (cycle + 1) * schedule.rl_steps
        return StepPlan(step, cycle + 1, "opd", opd_assignments(self.config, opd_steps_before))


class BaselineSteps(Steps):
    """GRPO until as many prompts are drawn as CoPD draws, and on until ``flops_goal`` FLOPs are computed.

    ``equal_steps`` is where all its models together have taken as many steps as CoPD's branches together. How many
    CoPD would take under ``schedule.adaptive`` is not known here: then there is none.
    """

    def __init__(self, config: RunConfig, students: tuple[str, ...], flops_goal: int | None) -> None:
        super().__init__(config, students)
        self._equal_rollouts = -(-copd_prompts(config) // (len(students) * config.rollout.prompts_per_step))
        if config.schedule.adaptive is None:
            self.equal_steps = self._if_it_goes_on(-(-copd_student_steps(config) // len(students)))
        self.flops_goal = flops_goal
        self._done = self._flops = 0

    @property
    def equal_rollouts(self) -> int:
        return self._equal_rollouts

    @property
    def num_steps(self) -> int:  # type: ignore[override]
        """Until the goal is reached: how many it would be if every step computed as much as those before it."""
        if self.flops_goal is None or not self._flops:
            return self._equal_rollouts
        if self.equal_flops is not None:
            return max(self._equal_rollouts, self.equal_flops)
        left = self.flops_goal - self._flops
        return max(self._equal_rollouts, self._done - (-left * self._done // self._flops))

    def _if_it_goes_on(self, step: int) -> int | None:
        """``step``, unless as many rollouts are drawn by then."""
        return step if step < self._equal_rollouts else None

    def is_measured(self, step: int) -> bool:
        """A cycle changes nothing here; and of a run that goes on nobody knows beforehand which step is its last."""
        return step == self._equal_rollouts

    def observe(self, step: int, distances: dict[str, float], flops: int) -> None:
        self._done, self._flops = step, flops
        if self.flops_goal is not None and flops >= self.flops_goal and self.equal_flops is None:
            self.equal_flops = step

    def state_dict(self) -> dict[str, Any]:
        return {
            "done": self._done,
            "flops": self._flops,
            "equal_flops": self.equal_flops,
            "flops_goal": self.flops_goal,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        begun_with = state.get("flops_goal", self.flops_goal)  # older checkpoints have none
        if begun_with != self.flops_goal:
            raise UserError(
                f"flops_of = {self.config.flops_of}: its {self.flops_goal} FLOPs are another goal than the "
                f"{begun_with} that this run was begun with; choose another name=..."
            )
        self._done, self._flops, self.equal_flops = state["done"], state["flops"], state["equal_flops"]

    def _cycle(self, step: int) -> int:
        return (step - 1) // (self.config.schedule.rl_steps + self.config.schedule.opd_steps) + 1


class ExpertSteps(BaselineSteps):
    """Every branch alone. After as many steps as the fixed schedule has they are kept for static distillation."""

    def __init__(self, config: RunConfig, flops_goal: int | None) -> None:
        super().__init__(config, config.branch_names, flops_goal)
        self.experts_step = self._if_it_goes_on(copd_steps(config))

    def plan(self, step: int) -> StepPlan:
        return StepPlan(step, self._cycle(step), "rl", rl_assignments(self.config, self.students))


class MixedSteps(BaselineSteps):
    """One model on the pooled prompts; what does not divide evenly rotates over the branches."""

    def __init__(self, config: RunConfig, flops_goal: int | None) -> None:
        super().__init__(config, (MIXED,), flops_goal)

    def plan(self, step: int) -> StepPlan:
        names = self.config.branch_names
        num_prompts = self.config.rollout.prompts_per_step
        counts = shares_of(names, num_prompts, step - 1)
        assignments = tuple(
            Assignment(MIXED, name, counts[name], None, counts[name] / num_prompts) for name in names if counts[name]
        )
        return StepPlan(step, self._cycle(step), "rl", assignments)
