"""Which steps a run has."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from copd_engine.config.base import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section


class AdaptiveConfig(Section):
    """Phases that end by what is measured on the probe prompts instead of by a count of steps.

    Every ``check_every`` steps ``metric`` is taken as the mean over all edges of the topology. Phase I ends when the
    branches have drifted past ``threshold`` (overlap and sum_min below it, symmetric_kl above it), phase II when they
    are back at ``recover``; neither before it has had ``min_rl_steps`` or ``min_opd_steps``. The run ends when it has
    drawn as many prompts as the fixed schedule of ``cycles``, ``rl_steps`` and ``opd_steps`` would.
    """

    metric: Literal["overlap", "sum_min", "symmetric_kl"] = "overlap"
    threshold: PositiveFloat
    recover: PositiveFloat
    min_rl_steps: PositiveInt = 1
    min_opd_steps: PositiveInt = 1
    check_every: PositiveInt = 1

    @model_validator(mode="after")
    def _recovers_on_the_near_side(self) -> AdaptiveConfig:
        far = self.recover > self.threshold if self.metric == "symmetric_kl" else self.recover < self.threshold
        if far:
            side = "at most" if self.metric == "symmetric_kl" else "at least"
            raise ValueError(f"recover = {self.recover}: must be {side} threshold = {self.threshold} for {self.metric}")
        if self.metric != "symmetric_kl" and self.recover > 1:  # the larger of the two
            raise ValueError(f"recover = {self.recover}: {self.metric} is at most 1, phase II would never end")
        return self


class ScheduleConfig(Section):
    """N cycles of ``rl_steps`` (phase I) and ``opd_steps`` (phase II); the paper's best ratio is 1.5 : 1.

    ``topology``: hub (the hub exchanges with every other branch), full, ring, or a list of [student, teacher] edges.
    ``hub``: the branch at the centre; default the first. In phase II, ``native_share`` times ``prompts_per_step`` is
    the number of native prompts (0: distillation alone), and ``cross_ratio`` times it that of the cross prompts, shared
    equally by a student's teachers. ``adaptive`` lets measurements end the phases.

    ``beta_scale`` kl multiplies the branch's beta, per student and teacher, by KL(student || teacher) at the last
    diagnostics over its running mean, clipped to ``beta_range``: who has drifted further than usual is pulled harder.
    CoPD is measured at the end of each phase at least; ``static_opd`` and ``mopd``, whose student has one phase alone,
    need ``diagnostics.every`` above 0 for it.
    """

    cycles: PositiveInt = 4
    rl_steps: NonNegativeInt = 6
    opd_steps: NonNegativeInt = 4
    topology: Literal["hub", "full", "ring"] | list[tuple[str, str]] = "hub"
    hub: str | None = None
    native_share: NonNegativeFloat = 1.0
    cross_ratio: PositiveFloat = 1.0
    adaptive: AdaptiveConfig | None = None
    beta_scale: Literal["none", "kl"] = "none"
    beta_range: tuple[PositiveFloat, PositiveFloat] = (0.5, 2.0)

    @model_validator(mode="after")
    def _has_steps(self) -> ScheduleConfig:
        if self.rl_steps + self.opd_steps == 0:
            raise ValueError("rl_steps and opd_steps are both 0: a cycle must have at least one step")
        if not self.beta_range[0] <= 1 <= self.beta_range[1]:
            raise ValueError(f"beta_range = {list(self.beta_range)}: must be [low, high] with low <= 1 <= high")
        return self


class DistillationPhase(Section):
    """What ``static_opd`` and ``mopd`` share. ``opd_steps``: steps of distillation; default as many as CoPD's number of
    rollouts leaves. ``native_share``: the student's own GRPO prompts in them per ``prompts_per_step``.

    ``experts``: the folder of a finished run of ``method: expert`` with the same model, branches, seed and steps, whose
    experts are taken instead of trained again; its rollouts count.
    """

    opd_steps: PositiveInt | None = None
    native_share: NonNegativeFloat = 0.0
    experts: Path | None = None


class StaticOpdConfig(DistillationPhase):
    """The expert ``student`` (default the first branch) learns from the finished expert ``teacher`` (default the
    second) on that one's prompts."""

    student: str | None = None
    teacher: str | None = None


class MopdConfig(DistillationPhase):
    """The ``student``, a fresh copy of the ``base`` or a branch's expert, learns from the finished ``teachers``
    (default all other branches), from each on its own prompts."""

    student: str = "base"
    teachers: tuple[str, ...] | None = Field(default=None, min_length=1)
