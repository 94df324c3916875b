"""Which steps a run has."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from copd_engine.config.base import NonNegativeInt, PositiveFloat, PositiveInt, Section


class ScheduleConfig(Section):
    """N cycles of ``rl_steps`` (phase I) and ``opd_steps`` (phase II); the paper's best ratio is 1.5 : 1.

    ``topology``: hub (the hub exchanges with every other branch), full, ring, or a list of [student, teacher] edges.
    ``hub``: the branch at the centre; default the first. ``cross_ratio``: prompts of the cross batches per native
    prompt in phase II, shared equally by a student's teachers.
    """

    cycles: PositiveInt = 4
    rl_steps: NonNegativeInt = 6
    opd_steps: NonNegativeInt = 4
    topology: Literal["hub", "full", "ring"] | list[tuple[str, str]] = "hub"
    hub: str | None = None
    cross_ratio: PositiveFloat = 1.0

    @model_validator(mode="after")
    def _has_steps(self) -> ScheduleConfig:
        if self.rl_steps + self.opd_steps == 0:
            raise ValueError("rl_steps and opd_steps are both 0: a cycle must have at least one step")
        return self
