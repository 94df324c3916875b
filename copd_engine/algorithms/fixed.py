"""Methods whose steps follow from the config alone: CoPD under its fixed schedule, single experts, mixed RLVR."""

from __future__ import annotations

from copd_engine.algorithms.plan import MIXED, Assignment, StepPlan
from copd_engine.algorithms.shares import copd_prompts, copd_steps, opd_assignments, rl_assignments, split_evenly
from copd_engine.algorithms.steps import Steps
from copd_engine.config import RunConfig


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
    """GRPO until as many prompts are drawn as CoPD draws."""

    def __init__(self, config: RunConfig, students: tuple[str, ...]) -> None:
        super().__init__(config, students)
        self.num_steps = -(-copd_prompts(config) // (len(students) * config.rollout.prompts_per_step))
        steps = copd_steps(config)
        self.equal_steps = steps if steps < self.num_steps else None

    def is_measured(self, step: int) -> bool:
        return step == self.num_steps  # a cycle changes nothing here

    def _cycle(self, step: int) -> int:
        return (step - 1) // (self.config.schedule.rl_steps + self.config.schedule.opd_steps) + 1


class ExpertSteps(BaselineSteps):
    """Every branch alone."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config, config.branch_names)
        self.experts_step = self.equal_steps

    def plan(self, step: int) -> StepPlan:
        return StepPlan(step, self._cycle(step), "rl", rl_assignments(self.config, self.students))


class MixedSteps(BaselineSteps):
    """One model on the pooled prompts; what does not divide evenly rotates over the branches."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config, (MIXED,))

    def plan(self, step: int) -> StepPlan:
        names = self.config.branch_names
        num_prompts = self.config.rollout.prompts_per_step
        counts = split_evenly(num_prompts, len(names), step - 1)
        assignments = tuple(
            Assignment(MIXED, name, count, None, count / num_prompts)
            for name, count in zip(names, counts, strict=True)
            if count
        )
        return StepPlan(step, self._cycle(step), "rl", assignments)
