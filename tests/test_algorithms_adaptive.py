"""Phases and betas by measurement: when they switch, what they cost, and what they remember."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from copd_engine.algorithms import Schedule
from copd_engine.config import RunConfig, build_config
from copd_engine.types import UserError


def config(adaptive: dict[str, Any] | None = None, prompts: int = 4, **schedule: Any) -> RunConfig:
    branches = [{"name": name, "data": {"source": "testbed", "domain": "text"}} for name in ("a", "b")]
    settings = {"cycles": 2, "rl_steps": 3, "opd_steps": 2, "adaptive": adaptive} | schedule
    return build_config({"branches": branches, "schedule": settings, "rollout": {"prompts_per_step": prompts}})


def pairs(value: float, far: float = 0.0) -> list[dict[str, Any]]:
    """Both edges, and one that nobody learns along: its distance must not count."""
    edges = [("a", "b", value), ("b", "a", value), ("a", "base", far)]
    keys = ("overlap", "sum_min", "symmetric_kl", "kl_student_teacher")
    return [{"student": s, "teacher": t, **dict.fromkeys(keys, x)} for s, t, x in edges]


def run(schedule: Schedule, values: list[float]) -> list[str]:
    """Phases of the steps, of which each is followed by one of the values; the last one stays."""
    phases = []
    step = 0
    while step < schedule.num_steps:
        step += 1
        phases.append(schedule.plan(step).phase)
        schedule.observe(step, pairs(values[min(step, len(values)) - 1]) if schedule.is_measured(step) else ())
    return phases


OVERLAP = {"metric": "overlap", "threshold": 0.8, "recover": 0.9}


def test_phases_switch_at_the_thresholds() -> None:
    values = [0.95, 0.85, 0.79, 0.85, 0.91, 0.95, 0.7, 0.95]
    schedule = Schedule(config(OVERLAP))
    assert run(schedule, values)[:8] == ["rl", "rl", "rl", "opd", "opd", "rl", "rl", "opd"]
    # Between the two the phase stays as it is; the value at a threshold itself: phase I goes on, phase II is over.
    assert run(Schedule(config(OVERLAP)), [0.8, 0.7, 0.9, 0.8])[:4] == ["rl", "rl", "opd", "rl"]


def test_a_distance_switches_the_other_way() -> None:
    schedule = Schedule(config({"metric": "symmetric_kl", "threshold": 0.1, "recover": 0.02}))
    assert run(schedule, [0.01, 0.2, 0.05, 0.01, 0.01])[:5] == ["rl", "rl", "opd", "opd", "rl"]


def test_the_bounds_of_what_is_measured_are_no_error() -> None:
    assert config({**OVERLAP, "threshold": 1, "recover": 1}).schedule.adaptive is not None
    assert config({"metric": "symmetric_kl", "threshold": 5, "recover": 2}).schedule.adaptive is not None


def test_cycles_count_returns_to_phase_1() -> None:
    schedule = Schedule(config(OVERLAP))
    cycles = []
    for step, value in enumerate([0.7, 0.95, 0.7, 0.95], start=1):
        cycles.append((schedule.plan(step).cycle, schedule.plan(step).phase))
        schedule.observe(step, pairs(value))
    assert cycles == [(1, "rl"), (1, "opd"), (2, "rl"), (2, "opd")]


def test_phases_have_a_least_length_and_checks_an_interval() -> None:
    slow = OVERLAP | {"min_rl_steps": 3, "min_opd_steps": 2}
    assert run(Schedule(config(slow)), [0.7])[:5] == ["rl", "rl", "rl", "opd", "opd"]
    assert run(Schedule(config(slow)), [0.7, 0.7, 0.7, 0.95])[:6] == ["rl", "rl", "rl", "opd", "opd", "rl"]
    seldom = Schedule(config(OVERLAP | {"check_every": 2}))
    assert [step for step in (1, 2, 3, 4) if seldom.is_measured(step) or seldom.observe(step)] == [2, 4]
    assert run(Schedule(config(OVERLAP | {"check_every": 2})), [0.7])[:4] == ["rl", "rl", "opd", "opd"]


numbers = st.fixed_dictionaries(
    {
        "prompts": st.integers(1, 6),
        "cycles": st.integers(1, 3),
        "rl_steps": st.integers(1, 4),
        "opd_steps": st.integers(0, 4),
        "native_share": st.sampled_from([0.0, 0.5, 1.0]),
        "cross_ratio": st.sampled_from([0.5, 1.0, 2.0]),
    }
)


@given(numbers, st.lists(st.floats(0, 1), min_size=1, max_size=30), st.integers(1, 3))
def test_the_budget_is_that_of_the_fixed_schedule(given: dict[str, Any], values: list[float], every: int) -> None:
    """To a whole step; and a schedule restored in the middle goes on as if nothing had been."""
    fixed = Schedule(config(**given))
    budget = sum(a.num_prompts for s in range(1, fixed.num_steps + 1) for a in fixed.plan(s).assignments)
    adaptive = config(OVERLAP | {"check_every": every}, **given)
    schedule = Schedule(adaptive)
    drawn, step = 0, 0
    while step < schedule.num_steps:
        assert drawn < budget
        step += 1
        resumed = Schedule(adaptive)
        resumed.load_state_dict(json.loads(json.dumps(schedule.state_dict())))
        plan = schedule.plan(step)
        assert plan == resumed.plan(step)
        drawn += sum(a.num_prompts for a in plan.assignments)
        assert schedule.is_measured(step) or drawn < budget  # the end is measured
        schedule.observe(step, pairs(values[step % len(values)]) if schedule.is_measured(step) else ())
    assert budget <= drawn < budget + sum(a.num_prompts for a in plan.assignments)
    assert schedule.num_steps == step


def test_only_the_next_step_can_be_planned() -> None:
    schedule = Schedule(config(OVERLAP))
    schedule.plan(1)
    with pytest.raises(ValueError, match="step 2 cannot be planned before step 1 was measured"):
        schedule.plan(2)


def test_fixed_schedules_remember_nothing() -> None:
    schedule = Schedule(config())
    before = schedule.state_dict()
    schedule.observe(1, pairs(0.1))
    assert schedule.state_dict() == before == {"steps": {}, "beta": {}}


# beta


def scales(schedule: Schedule) -> dict[str, float]:
    plan = schedule.plan(4)
    assert plan.phase == "opd"
    return {f"{a.student}<{a.teacher}": a.beta_scale for a in plan.assignments if a.teacher}


def test_beta_follows_the_kl_over_its_running_mean() -> None:
    schedule = Schedule(config(beta_scale="kl"))
    assert scales(schedule) == {"a<b": 1.0, "b<a": 1.0}
    schedule.observe(1, pairs(0.1))
    assert scales(schedule) == {"a<b": 1.0, "b<a": 1.0}
    schedule.observe(2, pairs(0.15))
    assert scales(schedule)["a<b"] == pytest.approx(1.5)
    schedule.observe(3, pairs(0.105))  # the mean is 0.9 * 0.1 + 0.1 * 0.15
    assert scales(schedule)["b<a"] == pytest.approx(1.0)
    schedule.observe(4, pairs(5.0))
    assert scales(schedule)["a<b"] == 2.0
    schedule.observe(5, pairs(1e-9))
    assert scales(schedule)["a<b"] == 0.5
    assert all(a.beta_scale == 1.0 for a in schedule.plan(4).assignments if a.teacher is None)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), -1e-9])
def test_what_is_no_distance_leaves_beta_alone(value: float) -> None:
    schedule = Schedule(config(beta_scale="kl"))
    schedule.observe(1, pairs(0.1))
    schedule.observe(2, pairs(0.2))
    before = schedule.state_dict()
    schedule.observe(3, pairs(value))
    assert schedule.state_dict() == before


def test_beta_is_remembered() -> None:
    schedule, resumed = (Schedule(config(beta_scale="kl")) for _ in range(2))
    for step, value in enumerate((0.1, 0.13, 0.12), start=1):
        schedule.observe(step, pairs(value))
    resumed.load_state_dict(json.loads(json.dumps(schedule.state_dict())))
    assert scales(resumed) == scales(schedule)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"adaptive": {**OVERLAP, "recover": 0.7}}, "recover = 0.7: must be at least threshold = 0.8"),
        (
            {"adaptive": {"metric": "symmetric_kl", "threshold": 0.1, "recover": 0.2}},
            "recover = 0.2: must be at most threshold = 0.1",
        ),
        ({"adaptive": {**OVERLAP, "recover": 1.01}}, "recover = 1.01: overlap is at most 1, phase II would never end"),
        ({"adaptive": {"metric": "sum_min", "threshold": 80, "recover": 90}}, "recover = 90.0: sum_min is at most 1"),
        ({"adaptive": {"threshold": 0.8}}, "recover"),
        ({"adaptive": OVERLAP, "topology": []}, "no branch has a teacher, so there is no distance"),
        ({"beta_scale": "kl", "beta_range": [1.5, 2]}, "low <= 1 <= high"),
    ],
)
def test_what_does_not_fit_is_named(schedule: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(**schedule)
