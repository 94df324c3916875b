"""The schedule of a run: its method's steps, and beta where measurements scale it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from copd_engine.algorithms.adaptive import AdaptiveSteps, BetaScale
from copd_engine.algorithms.fixed import CopdSteps, ExpertSteps, MixedSteps
from copd_engine.algorithms.plan import STUDENT, StepPlan
from copd_engine.algorithms.shares import teachers_of
from copd_engine.algorithms.static import StaticSteps, distillation_edges
from copd_engine.algorithms.steps import Steps
from copd_engine.config import RunConfig
from copd_engine.types import UserError

DISTANCES = ("overlap", "sum_min", "symmetric_kl")


class Schedule:
    """All steps of a run. Fixed schedules follow from the config alone and have no state; others learn from
    :meth:`observe`, which must be called after every step.

    ``flops_goal``: the training FLOPs of a CoPD run, until which ``expert`` and ``mixed`` go on. ``students``: all
    models that are trained; ``teachers``: who teaches each. UserError where a step would train nobody.
    """

    def __init__(self, config: RunConfig, flops_goal: int | None = None) -> None:
        self._steps = _steps_of(config, flops_goal)
        self._beta = BetaScale(config) if config.schedule.beta_scale == "kl" else None
        self.students = self._steps.students
        self.teachers = _teachers(config)
        if config.method == "copd" and config.schedule.native_share == 0 and not any(self.teachers.values()):
            raise UserError("schedule.native_share = 0: no branch has a teacher, phase II would train nobody")

    @property
    def first_step(self) -> int:
        """1, or the first step that is not taken from another run."""
        return self._steps.first_step

    @property
    def num_steps(self) -> int:
        """The last step; where measurements end phases or the run, an estimate until it is reached."""
        return self._steps.num_steps

    @property
    def equal_steps(self) -> int | None:
        """Where a baseline has taken as many steps as CoPD, all models of either together; it goes on until it has
        drawn as many rollouts. None where it has drawn them by then, and under ``schedule.adaptive``."""
        return self._steps.equal_steps

    @property
    def equal_rollouts(self) -> int:
        """The step after which the run has drawn CoPD's number of rollouts: its last, unless it goes on."""
        return self._steps.equal_rollouts

    @property
    def equal_flops(self) -> int | None:
        """The first step after which ``flops_goal`` was reached; None until it is."""
        return self._steps.equal_flops

    @property
    def flops_goal(self) -> int | None:
        """Training FLOPs until which the run goes on."""
        return self._steps.flops_goal

    @property
    def experts_step(self) -> int | None:
        """After this step the single experts have taken as many steps as the fixed schedule has, and are evaluated and
        saved."""
        return self._steps.experts_step

    def plan(self, step: int) -> StepPlan:
        """The plan of step first_step..num_steps; ValueError outside."""
        if not self.first_step <= step <= self.num_steps:
            raise ValueError(f"step {step} is outside {self.first_step}..{self.num_steps}")
        plan = self._steps.plan(step)
        return self._beta.scaled(plan) if self._beta else plan

    def is_measured(self, step: int) -> bool:
        """Whether diagnostics are due after this step, whatever ``diagnostics.every`` says."""
        return self._steps.is_measured(step)

    def observe(self, step: int, pairs: Sequence[Mapping[str, Any]] = (), flops: int = 0) -> None:
        """A step was taken; ``pairs``: rows of :func:`copd_engine.diagnostics.compare_branches` if it was measured;
        ``flops``: training FLOPs of all models up to this step."""
        on_edges = [pair for pair in pairs if pair["teacher"] in self.teachers.get(pair["student"], ())]
        distances = {
            name: sum(float(pair[name]) for pair in on_edges) / len(on_edges) for name in DISTANCES if on_edges
        }
        self._steps.observe(step, distances, flops)
        if self._beta:
            self._beta.observe(on_edges)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self._steps.state_dict(), "beta": self._beta.state_dict() if self._beta else {}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._steps.load_state_dict(state["steps"])
        if self._beta:
            self._beta.load_state_dict(state["beta"])


def _steps_of(config: RunConfig, flops_goal: int | None) -> Steps:
    if config.method == "copd":
        return AdaptiveSteps(config) if config.schedule.adaptive else CopdSteps(config)
    if config.method == "expert":
        return ExpertSteps(config, flops_goal)
    if config.method == "mixed":
        return MixedSteps(config, flops_goal)
    return StaticSteps(config)


def _teachers(config: RunConfig) -> dict[str, tuple[str, ...]]:
    if config.method == "copd":
        return teachers_of(config)
    if config.method in ("static_opd", "mopd"):
        return {STUDENT: distillation_edges(config)[1]}
    return {}
