"""Algorithms are data: which branch rolls out whose prompts in a step, who teaches, and with which weight.

The trainer executes a :class:`StepPlan` and does not know which method made it. CoPD is Algorithm 1 of arXiv 2604.27083
(``copd.md`` section 4); ``expert`` trains every branch alone, ``mixed`` trains one model on the pooled prompts. Both
baselines take as many steps as it needs to draw as many rollouts as CoPD draws under the same schedule.
"""

from __future__ import annotations

from dataclasses import dataclass

from copd_engine.config import RunConfig

MIXED = "mixed"


@dataclass(frozen=True)
class Assignment:
    """``student`` rolls out ``num_prompts`` prompts of branch ``source``.

    ``teacher`` None: GRPO with the source's reward. Otherwise the teacher scores the student's tokens (OPD-ADV).
    ``weight`` scales the term's loss, which is normalised by its own number of responses.
    """

    student: str
    source: str
    num_prompts: int
    teacher: str | None = None
    weight: float = 1.0

    @property
    def term(self) -> str:
        return "grpo" if self.teacher is None else f"opd:{self.teacher}"


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step of every student; ``step`` and ``cycle`` count from 1, ``phase`` is ``rl`` or ``opd``."""

    step: int
    cycle: int
    phase: str
    assignments: tuple[Assignment, ...]

    def of(self, student: str) -> tuple[Assignment, ...]:
        return tuple(a for a in self.assignments if a.student == student)


class Schedule:
    """All steps of a run, computed from the config alone."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self.teachers = teachers_of(config) if config.method == "copd" else {}
        self.students = (MIXED,) if config.method == "mixed" else config.branch_names
        copd_prompts = _prompts_of_copd(config)
        copd_steps = config.schedule.cycles * (config.schedule.rl_steps + config.schedule.opd_steps)
        if config.method == "copd":
            self.num_steps = copd_steps
        else:
            self.num_steps = -(-copd_prompts // (len(self.students) * config.rollout.prompts_per_step))
        #: where a baseline has taken as many steps as CoPD; it goes on until it has drawn as many rollouts
        self.equal_steps = copd_steps if copd_steps < self.num_steps else None

    def plan(self, step: int) -> StepPlan:
        """The plan of step 1..num_steps; ValueError outside."""
        if not 1 <= step <= self.num_steps:
            raise ValueError(f"step {step} is outside 1..{self.num_steps}")
        cycle, phase = self._place(step)
        if self._config.method == "mixed":
            return StepPlan(step, cycle, phase, self._mixed(step))
        num_prompts = self._config.rollout.prompts_per_step
        assignments = [Assignment(name, name, num_prompts) for name in self.students]
        if phase == "opd":
            for student in self.students:
                assignments += self._cross(student, step, cycle)
        return StepPlan(step, cycle, phase, tuple(assignments))

    def _place(self, step: int) -> tuple[int, str]:
        schedule = self._config.schedule
        per_cycle = schedule.rl_steps + schedule.opd_steps
        cycle, within = divmod(step - 1, per_cycle)
        in_opd = self._config.method == "copd" and within >= schedule.rl_steps
        return cycle + 1, "opd" if in_opd else "rl"

    def _cross(self, student: str, step: int, cycle: int) -> list[Assignment]:
        """The cross batches of a student: one share of the prompts per teacher, weights that sum to 1."""
        teachers = self.teachers[student]
        opd_step = step - 1 - cycle * self._config.schedule.rl_steps  # phase II steps before this one
        counts = split_evenly(_num_cross_prompts(self._config), len(teachers), opd_step)
        total = sum(counts)
        return [
            Assignment(student, teacher, count, teacher, count / total)
            for teacher, count in zip(teachers, counts, strict=True)
            if count
        ]

    def _mixed(self, step: int) -> tuple[Assignment, ...]:
        """The pooled prompts of one step; what does not divide evenly rotates over the branches."""
        names = self._config.branch_names
        num_prompts = self._config.rollout.prompts_per_step
        counts = split_evenly(num_prompts, len(names), step - 1)
        return tuple(
            Assignment(MIXED, name, count, None, count / num_prompts)
            for name, count in zip(names, counts, strict=True)
            if count
        )


def teachers_of(config: RunConfig) -> dict[str, tuple[str, ...]]:
    """Teachers of each branch.

    hub: the hub and every spoke teach each other; full: everyone teaches everyone; ring: each branch
    learns from the one before it.
    """
    names = config.branch_names
    topology = config.schedule.topology
    if topology == "full":
        return {name: tuple(other for other in names if other != name) for name in names}
    if topology == "ring":
        return {name: (names[index - 1],) if len(names) > 1 else () for index, name in enumerate(names)}
    if topology == "hub":
        hub = config.schedule.hub or names[0]
        return {name: tuple(n for n in names if n != hub) if name == hub else (hub,) for name in names}
    return {name: tuple(dict.fromkeys(t for s, t in topology if s == name)) for name in names}


def split_evenly(count: int, parts: int, turn: int = 0) -> list[int]:
    """``count`` in ``parts`` whole numbers that differ by at most one; over the turns, each part gets its share."""
    if not parts:
        return []
    base, extra = divmod(count, parts)
    favoured = {(turn * extra + i) % parts for i in range(extra)}
    return [base + (index in favoured) for index in range(parts)]


def _num_cross_prompts(config: RunConfig) -> int:
    return max(1, round(config.rollout.prompts_per_step * config.schedule.cross_ratio))


def _prompts_of_copd(config: RunConfig) -> int:
    """Prompts that CoPD draws over the whole run, all branches together."""
    native = config.rollout.prompts_per_step
    num_taught = sum(bool(teachers) for teachers in teachers_of(config).values())
    num_branches = len(config.branches)
    schedule = config.schedule
    per_cycle = num_branches * native * (schedule.rl_steps + schedule.opd_steps)
    return schedule.cycles * (per_cycle + num_taught * _num_cross_prompts(config) * schedule.opd_steps)
