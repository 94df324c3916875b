"""Static distillation: experts are trained alone, then frozen, and one student learns from them on their prompts."""

from __future__ import annotations

from copd_engine.algorithms.plan import MIXED, STUDENT, Assignment, StepPlan
from copd_engine.algorithms.shares import copd_prompts, copd_steps, cross, num_prompts, rl_assignments
from copd_engine.algorithms.steps import Steps
from copd_engine.config import RunConfig
from copd_engine.config.run import BASE
from copd_engine.types import UserError


def distillation_edges(config: RunConfig) -> tuple[str, tuple[str, ...]]:
    """What the student of ``static_opd`` or ``mopd`` starts as (a branch or ``base``), and its teachers.

    UserError where a default makes a branch its own teacher.
    """
    names = config.branch_names
    if config.method == "mopd":
        start = config.mopd.student
        return start, config.mopd.teachers or tuple(name for name in names if name != start)
    start = config.static_opd.student or next(name for name in names if name != config.static_opd.teacher)
    return start, (config.static_opd.teacher or next(name for name in names if name != start),)


class StaticSteps(Steps):
    """``static_opd`` and ``mopd``: phase I for the experts that are needed, as many steps as CoPD has; then phase II
    for the student alone, as many steps as CoPD's number of prompts leaves.

    The student is a model of its own with a new optimizer, so the same whether its experts were trained in this run or
    taken from another, whose steps are then not planned again.
    """

    def __init__(self, config: RunConfig) -> None:
        self.start, self.teachers = distillation_edges(config)
        self.experts = tuple(n for n in config.branch_names if n in (self.start, *self.teachers))
        super().__init__(config, (*self.experts, STUDENT))
        self.section = config.mopd if config.method == "mopd" else config.static_opd
        self.rl_steps = copd_steps(config)
        opd_steps = self.section.opd_steps or self._steps_left()
        self.num_steps = self.rl_steps + opd_steps
        self.experts_step = self.rl_steps
        if self.section.experts is not None:
            self.first_step = self.rl_steps + 1

    def _steps_left(self) -> int:
        per_rl_step = sum(a.num_prompts for a in rl_assignments(self.config, self.experts))
        left = copd_prompts(self.config) - self.rl_steps * per_rl_step
        if left <= 0:
            raise UserError(
                f"{self.config.method}: training the experts draws as many rollouts as CoPD does under this schedule, "
                f"none are left to distil with; set {self.config.method}.opd_steps, or schedule.opd_steps above 0"
            )
        return -(-left // sum(a.num_prompts for a in self._distillation(0)))

    def plan(self, step: int) -> StepPlan:
        if step <= self.rl_steps:
            return StepPlan(step, 1, "rl", rl_assignments(self.config, self.experts))
        before = step - self.rl_steps - 1
        copies = ((STUDENT, self.start),) if before == 0 and self.start != BASE else ()
        finished = tuple(self.experts) if before == 0 else ()
        return StepPlan(step, 1, "opd", self._distillation(before), copies, finished)

    def _distillation(self, turn: int) -> tuple[Assignment, ...]:
        count = num_prompts(self.config, self.section.native_share)
        own = [Assignment(STUDENT, self.start, count)] if count else []
        return (*own, *cross(self.config, STUDENT, self.teachers, turn))


def betas_of(config: RunConfig) -> dict[str, float]:
    """beta of every model: a branch's own; a student has that of the branch it starts as, and the mean of all where it
    starts as the base."""
    betas = {branch.name: branch.beta for branch in config.branches}
    betas[MIXED] = 1.0
    if config.method in ("static_opd", "mopd"):
        start, _ = distillation_edges(config)
        own = [betas[start]] if start != BASE else [branch.beta for branch in config.branches]
        betas[STUDENT] = sum(own) / len(own)
    return betas


def final_model(config: RunConfig) -> tuple[str, str]:
    """Label and kind, in the result's table, of the model that a method ends with."""
    if config.method == "static_opd":
        student, (teacher,) = distillation_edges(config)
        return f"static OPD {teacher}→{student}", "baseline"
    if config.method == "mopd":
        student, teachers = distillation_edges(config)
        others = [name for name in config.branch_names if name != student]
        label = "MOPD" if list(teachers) == others else f"MOPD {'+'.join(teachers)}"
        return label + (f"→{student}" if student != BASE else ""), "baseline"
    return {
        "copd": ("merged", "merged"),
        "expert": ("average of experts", "baseline"),
        "mixed": ("mixed RLVR", "baseline"),
    }[config.method]
