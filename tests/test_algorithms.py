"""Schedules: who rolls out whose prompts, who teaches, with which weight, and how much data each method draws."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from copd_engine.algorithms import MIXED, Schedule, StepPlan, split_evenly, teachers_of
from copd_engine.config import RunConfig, build_config
from copd_engine.types import UserError

ABC = ("text", "image", "video")
MANY = tuple("abcde")


def config(names: tuple[str, ...] = ABC, method: str = "copd", prompts: int = 8, **schedule: Any) -> RunConfig:
    branches = [{"name": name, "data": {"source": "testbed", "domain": "text"}} for name in names]
    return build_config(
        {
            "method": method,
            "branches": branches,
            "schedule": {"cycles": 2, "rl_steps": 3, "opd_steps": 2} | schedule,
            "rollout": {"prompts_per_step": prompts},
        }
    )


def plans(settings: RunConfig) -> list[StepPlan]:
    schedule = Schedule(settings)
    return [schedule.plan(step) for step in range(1, schedule.num_steps + 1)]


def num_prompts(settings: RunConfig) -> int:
    return sum(a.num_prompts for plan in plans(settings) for a in plan.assignments)


def test_phases_and_cycles_follow_algorithm_1():
    steps = plans(config())
    assert [plan.phase for plan in steps] == ["rl", "rl", "rl", "opd", "opd"] * 2
    assert [plan.cycle for plan in steps] == [1] * 5 + [2] * 5
    assert [plan.step for plan in steps] == list(range(1, 11))


@pytest.mark.parametrize(("rl", "opd", "phases"), [(0, 2, ["opd", "opd"]), (2, 0, ["rl", "rl"])])
def test_a_phase_of_no_steps_is_left_out(rl, opd, phases):
    assert [plan.phase for plan in plans(config(rl_steps=rl, opd_steps=opd, cycles=1))] == phases


@pytest.mark.parametrize("step", [0, -1, 11])
def test_steps_outside_the_run_are_refused(step):
    with pytest.raises(ValueError, match=r"outside 1\.\.10"):
        Schedule(config()).plan(step)


def test_phase_1_is_grpo_of_every_branch_on_its_own_prompts():
    for assignment, name in zip(plans(config())[0].assignments, ABC, strict=True):
        assert (assignment.student, assignment.source, assignment.teacher) == (name, name, None)
        assert (assignment.num_prompts, assignment.weight, assignment.term) == (8, 1.0, "grpo")


def test_phase_2_keeps_grpo_and_adds_the_teachers_prompts_and_scores():
    plan = plans(config())[3]
    rows = [(a.student, a.source, a.teacher, a.num_prompts, a.weight, a.term) for a in plan.assignments]
    native = [(name, name, None, 8, 1.0, "grpo") for name in ABC]
    assert rows[:3] == native
    assert sorted(rows[3:]) == [
        ("image", "text", "text", 8, 1.0, "opd:text"),
        ("text", "image", "image", 4, 0.5, "opd:image"),
        ("text", "video", "video", 4, 0.5, "opd:video"),
        ("video", "text", "text", 8, 1.0, "opd:text"),
    ]
    assert [a.term for a in plan.of("text")] == ["grpo", "opd:image", "opd:video"]


@pytest.mark.parametrize(
    ("topology", "hub", "expected"),
    [
        ("hub", None, {"text": ("image", "video"), "image": ("text",), "video": ("text",)}),
        ("hub", "video", {"text": ("video",), "image": ("video",), "video": ("text", "image")}),
        ("full", None, {"text": ("image", "video"), "image": ("text", "video"), "video": ("text", "image")}),
        ("ring", None, {"text": ("video",), "image": ("text",), "video": ("image",)}),
        ([("text", "image")], None, {"text": ("image",), "image": (), "video": ()}),
        (
            [("video", "text"), ("video", "image"), ("video", "text")],
            None,
            {"text": (), "image": (), "video": ("text", "image")},
        ),
    ],
)
def test_teachers_by_topology(topology, hub, expected):
    assert teachers_of(config(topology=topology, hub=hub)) == expected


@pytest.mark.parametrize("topology", ["hub", "full", "ring"])
def test_two_branches_teach_each_other_in_every_topology(topology):
    assert teachers_of(config(("a", "b"), topology=topology)) == {"a": ("b",), "b": ("a",)}


@pytest.mark.parametrize("topology", ["hub", "full", "ring", []])
def test_one_branch_has_no_teacher_and_trains_on_in_phase_2(topology):
    settings = config(("a",), topology=topology)
    assert teachers_of(settings) == {"a": ()}
    steps = plans(settings)
    assert steps[3].phase == "opd"
    assert [(a.student, a.source, a.teacher) for a in steps[3].assignments] == [("a", "a", None)]
    assert num_prompts(settings) == 10 * 8


def test_a_student_without_teachers_only_does_grpo():
    plan = plans(config(topology=[("text", "image")]))[3]
    assert [a.term for a in plan.of("text")] == ["grpo", "opd:image"]
    assert [a.term for a in plan.of("image")] == ["grpo"]
    assert [a.term for a in plan.of("video")] == ["grpo"]


topologies = st.one_of(
    st.sampled_from(["hub", "full", "ring"]),
    st.lists(st.sampled_from([(s, t) for s in MANY[:2] for t in MANY[:2] if s != t]), max_size=3),
)
schedules = st.fixed_dictionaries(
    {
        "num_branches": st.integers(2, 5),
        "prompts": st.integers(1, 9),
        "cycles": st.integers(1, 3),
        "rl_steps": st.integers(0, 4),
        "opd_steps": st.integers(1, 4),
        "cross_ratio": st.sampled_from([0.1, 0.5, 1.0, 1.7]),
        "topology": topologies,
    }
)


def built(numbers: dict[str, Any], method: str) -> RunConfig:
    numbers = dict(numbers)
    return config(MANY[: numbers.pop("num_branches")], method, **numbers)


@given(schedules)
def test_cross_weights_sum_to_1_and_follow_the_prompts(numbers):
    settings = built(numbers, "copd")
    teachers = teachers_of(settings)
    wanted = max(1, round(numbers["prompts"] * numbers["cross_ratio"]))
    for plan in plans(settings):
        for student in settings.branch_names:
            native, *cross = plan.of(student)
            assert (native.teacher, native.source, native.weight) == (None, student, 1.0)
            assert {a.teacher for a in cross} <= set(teachers[student])
            assert all(a.source == a.teacher != student for a in cross)
            if plan.phase == "opd" and teachers[student]:
                assert sum(a.weight for a in cross) == pytest.approx(1)
                assert sum(a.num_prompts for a in cross) == wanted
                # Every cross response of the step weighs the same: weight_m / num_responses_m.
                assert all(a.weight / a.num_prompts == pytest.approx(1 / wanted) for a in cross)
            else:
                assert not cross


@given(schedules)
def test_baselines_draw_as_many_prompts_as_copd(numbers):
    drawn = num_prompts(built(numbers, "copd"))
    for method, per_step in (("expert", numbers["num_branches"] * numbers["prompts"]), ("mixed", numbers["prompts"])):
        baseline = num_prompts(built(numbers, method))
        assert drawn <= baseline < drawn + per_step


def test_experts_and_mixed_match_the_demo_exactly():
    """3 branches, 9 : 6, 8 prompts: CoPD draws 3*8*15 + 3*8*6 prompts per cycle."""
    numbers = {"cycles": 6, "rl_steps": 9, "opd_steps": 6}
    assert num_prompts(config(**numbers)) == 6 * (3 * 8 * 15 + 3 * 8 * 6)
    assert Schedule(config(method="expert", **numbers)).num_steps == 6 * (15 + 6)
    assert Schedule(config(method="mixed", **numbers)).num_steps == 6 * (15 + 6) * 3


def test_experts_never_distil():
    steps = plans(config(method="expert"))
    assert {plan.phase for plan in steps} == {"rl"}
    assert all(a.teacher is None and a.student == a.source for plan in steps for a in plan.assignments)
    assert Schedule(config(method="expert")).students == ABC
    assert Schedule(config(method="expert")).teachers == {}


@given(st.integers(1, 5), st.integers(1, 12))
def test_mixed_pools_all_prompts_in_one_student_and_rotates_the_rest(num_branches, prompts):
    settings = config(MANY[:num_branches], "mixed", prompts)
    assert Schedule(settings).students == (MIXED,)
    drawn: Counter[str] = Counter()
    for plan in plans(settings):
        assert {a.student for a in plan.assignments} == {MIXED}
        assert all(a.teacher is None for a in plan.assignments)
        assert sum(a.num_prompts for a in plan.assignments) == prompts
        # Pooled GRPO: every response of the step weighs 1 / all responses, whichever domain it is of.
        assert all(a.weight / a.num_prompts == pytest.approx(1 / prompts) for a in plan.assignments)
        drawn.update({a.source: a.num_prompts for a in plan.assignments})
    assert len(drawn) == num_branches
    assert max(drawn.values()) - min(drawn.values()) <= 1


def test_teachers_take_turns_when_prompts_do_not_divide_evenly():
    """One cross prompt and two spokes: both teach the hub, not only the first."""
    drawn: Counter[str] = Counter()
    for plan in plans(config(prompts=1, cycles=6, rl_steps=1, opd_steps=1)):
        drawn.update(a.teacher for a in plan.of("text") if a.teacher)
    assert drawn == {"image": 3, "video": 3}


@given(st.integers(0, 40), st.integers(1, 8), st.integers(0, 20))
def test_split_evenly(count, parts, turn):
    split = split_evenly(count, parts, turn)
    assert sum(split) == count
    assert len(split) == parts
    assert max(split) - min(split) <= 1
    over_all_turns = [
        sum(column) for column in zip(*(split_evenly(count, parts, t) for t in range(parts)), strict=True)
    ]
    assert over_all_turns == [count] * parts


def test_split_evenly_into_nothing():
    assert split_evenly(5, 0) == []


def test_native_share_thins_grpo_in_phase_2_alone():
    """0 leaves distillation alone; the budget of the baselines follows."""
    none, half = (plans(config(native_share=share)) for share in (0, 0.5))
    assert [a.num_prompts for a in none[0].assignments] == [8] * 3
    assert {a.term for a in none[3].assignments} == {"opd:text", "opd:image", "opd:video"}
    assert [a.num_prompts for a in half[3].assignments if a.teacher is None] == [4] * 3
    assert num_prompts(config(native_share=0)) == 2 * (3 * 3 * 8 + 2 * 3 * 8)
    assert num_prompts(config(method="mixed", native_share=0)) == 2 * (3 * 3 * 8 + 2 * 3 * 8)


def test_phase_2_without_anything_to_learn_is_refused():
    with pytest.raises(UserError, match=r"native_share = 0: no branch has a teacher"):
        Schedule(config(native_share=0, topology=[]))


def test_only_the_ends_of_phases_are_always_measured():
    schedule = Schedule(config())
    assert [step for step in range(1, 11) if schedule.is_measured(step)] == [3, 5, 8, 10]
    for method in ("expert", "mixed"):
        schedule = Schedule(config(method=method))
        assert [s for s in range(1, schedule.num_steps + 1) if schedule.is_measured(s)] == [schedule.num_steps]
