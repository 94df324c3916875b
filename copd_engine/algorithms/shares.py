"""Who teaches whom, and how many prompts each gets."""

from __future__ import annotations

from collections.abc import Sequence

from copd_engine.algorithms.plan import Assignment
from copd_engine.config import RunConfig


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


def shares_of(names: Sequence[str], count: int, turn: int = 0) -> dict[str, int]:
    """``count`` split evenly over ``names``, whose order does not matter."""
    return dict(zip(sorted(names), split_evenly(count, len(names), turn), strict=True))


def num_prompts(config: RunConfig, share: float) -> int:
    """``share`` of a step's prompts, at least one unless the share is 0."""
    return max(1, round(config.rollout.prompts_per_step * share)) if share else 0


def native(config: RunConfig, name: str, share: float = 1.0) -> list[Assignment]:
    """GRPO of a branch on its own prompts; nothing at a share of 0."""
    count = num_prompts(config, share)
    return [Assignment(name, name, count)] if count else []


def cross(config: RunConfig, student: str, teachers: Sequence[str], turn: int) -> list[Assignment]:
    """The cross batches of a student: one share of the prompts per teacher, weights that sum to 1.

    ``turn``: the phase II steps before this one, over which what does not divide evenly rotates.
    """
    total = num_prompts(config, config.schedule.cross_ratio)
    counts = shares_of(teachers, total, turn)
    return [
        Assignment(student, teacher, counts[teacher], teacher, counts[teacher] / total)
        for teacher in teachers
        if counts[teacher]
    ]


def opd_assignments(config: RunConfig, turn: int) -> tuple[Assignment, ...]:
    """A step of CoPD's phase II: every branch on its own prompts, then those of its teachers."""
    teachers = teachers_of(config)
    assignments = [a for name in config.branch_names for a in native(config, name, config.schedule.native_share)]
    assignments += [a for name in config.branch_names for a in cross(config, name, teachers[name], turn)]
    return tuple(assignments)


def rl_assignments(config: RunConfig, names: Sequence[str]) -> tuple[Assignment, ...]:
    """A step of GRPO of these branches on their own prompts."""
    return tuple(a for name in names for a in native(config, name))


def copd_steps(config: RunConfig) -> int:
    """Steps of the fixed schedule."""
    return config.schedule.cycles * (config.schedule.rl_steps + config.schedule.opd_steps)


def copd_student_steps(config: RunConfig) -> int:
    """Steps of CoPD's branches together. With ``native_share`` 0 a branch without a teacher takes none in phase II."""
    schedule = config.schedule
    num_rl = len(config.branch_names)
    num_opd = len({assignment.student for assignment in opd_assignments(config, 0)})
    return schedule.cycles * (num_rl * schedule.rl_steps + num_opd * schedule.opd_steps)


def copd_prompts(config: RunConfig) -> int:
    """Prompts that CoPD draws over the whole run, all branches together."""
    rl = sum(a.num_prompts for a in rl_assignments(config, config.branch_names))
    opd = sum(a.num_prompts for a in opd_assignments(config, 0))
    return config.schedule.cycles * (rl * config.schedule.rl_steps + opd * config.schedule.opd_steps)
