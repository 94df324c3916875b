"""CoPD whose phases end by measurement, and beta by measurement: what a schedule remembers between steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from copd_engine.algorithms.plan import StepPlan
from copd_engine.algorithms.shares import copd_prompts, opd_assignments, rl_assignments
from copd_engine.algorithms.steps import Steps
from copd_engine.config import RunConfig

#: How much of the running mean of a KL stays at each measurement.
REFERENCE_DECAY = 0.9


class AdaptiveSteps(Steps):
    """Phase I until the branches have drifted too far apart, phase II until they are back; ends with CoPD's number of
    prompts. Only the step after the last one observed can be planned."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config, config.branch_names)
        assert config.schedule.adaptive is not None
        self._adaptive = config.schedule.adaptive
        self._budget = copd_prompts(config)
        self._state = {"done": 0, "cycle": 1, "in_opd": 0, "steps_in_phase": 0, "opd_steps": 0, "prompts": 0}

    @property
    def num_steps(self) -> int:  # type: ignore[override]
        """The steps taken, and how many more it would be if the phase never changed."""
        left = self._budget - self._state["prompts"]
        return self._state["done"] + max(0, -(-left // self._prompts_per_step()))

    def plan(self, step: int) -> StepPlan:
        if step != self._state["done"] + 1:
            raise ValueError(f"step {step} cannot be planned before step {step - 1} was measured")
        if self._state["in_opd"]:
            assignments = opd_assignments(self.config, self._state["opd_steps"])
        else:
            assignments = rl_assignments(self.config, self.students)
        return StepPlan(step, self._state["cycle"], "opd" if self._state["in_opd"] else "rl", assignments)

    def is_measured(self, step: int) -> bool:
        return step % self._adaptive.check_every == 0 or step == self.num_steps

    def observe(self, step: int, distances: dict[str, float], flops: int) -> None:
        state, in_opd = self._state, self._state["in_opd"]
        state["prompts"] += self._prompts_per_step()
        state["done"] = step
        state["opd_steps"] += in_opd
        state["steps_in_phase"] += 1
        enough = self._adaptive.min_opd_steps if in_opd else self._adaptive.min_rl_steps
        if step % self._adaptive.check_every or state["steps_in_phase"] < enough or not distances:
            return
        if self._is_over(distances[self._adaptive.metric]):
            state["in_opd"], state["steps_in_phase"] = 1 - in_opd, 0
            state["cycle"] += in_opd

    def _is_over(self, value: float) -> bool:
        sign = -1.0 if self._adaptive.metric == "symmetric_kl" else 1.0  # a distance instead of a likeness
        if self._state["in_opd"]:
            return sign * value >= sign * self._adaptive.recover
        return sign * value < sign * self._adaptive.threshold

    def _prompts_per_step(self) -> int:
        opd = self._state["in_opd"]
        assignments = opd_assignments(self.config, 0) if opd else rl_assignments(self.config, self.students)
        return sum(a.num_prompts for a in assignments)

    def state_dict(self) -> dict[str, Any]:
        return dict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._state = dict(state)


class BetaScale:
    """``schedule.beta_scale: kl``: for each student and teacher, scale = clip(KL_t / m_t, low, high), where KL_t is
    KL(student || teacher) at the last diagnostics and m_t the running mean of those before it,
    m_{t+1} = 0.9 m_t + 0.1 KL_t, m_1 = KL_1."""

    def __init__(self, config: RunConfig) -> None:
        self._low, self._high = config.schedule.beta_range
        self._mean: dict[str, float] = {}
        self._scale: dict[str, float] = {}

    def observe(self, pairs: Sequence[Mapping[str, Any]]) -> None:
        for pair in pairs:
            edge, kl = f"{pair['student']}/{pair['teacher']}", float(pair["kl_student_teacher"])
            if not (0 < kl < math.inf):
                continue
            mean = self._mean.get(edge, kl)
            self._scale[edge] = min(max(kl / mean, self._low), self._high)
            self._mean[edge] = REFERENCE_DECAY * mean + (1 - REFERENCE_DECAY) * kl

    def scaled(self, plan: StepPlan) -> StepPlan:
        assignments = tuple(
            a if a.teacher is None else replace(a, beta_scale=self._scale.get(f"{a.student}/{a.teacher}", 1.0))
            for a in plan.assignments
        )
        return replace(plan, assignments=assignments)

    def state_dict(self) -> dict[str, Any]:
        return {"mean": dict(self._mean), "scale": dict(self._scale)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._mean, self._scale = dict(state["mean"]), dict(state["scale"])
