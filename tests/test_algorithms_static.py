"""Static distillation as a schedule: who is trained when, from whom, and at which price."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from copd_engine.algorithms import STUDENT, Schedule, StepPlan, betas_of, distillation_edges, final_model
from copd_engine.config import RunConfig, build_config
from copd_engine.types import UserError

ABC = ("text", "image", "video")


def config(method: str, names: tuple[str, ...] = ABC, prompts: int = 8, **sections: Any) -> RunConfig:
    branches = [
        {"name": n, "beta": 1.0 + i, "data": {"source": "testbed", "domain": "text"}} for i, n in enumerate(names)
    ]
    schedule = {"cycles": 2, "rl_steps": 3, "opd_steps": 2} | sections.pop("schedule", {})
    rollout = {"prompts_per_step": prompts}
    return build_config({"method": method, "branches": branches, "schedule": schedule, "rollout": rollout, **sections})


def plans(settings: RunConfig) -> list[StepPlan]:
    schedule = Schedule(settings)
    return [schedule.plan(step) for step in range(schedule.first_step, schedule.num_steps + 1)]


def num_prompts(steps: list[StepPlan]) -> int:
    return sum(a.num_prompts for plan in steps for a in plan.assignments)


def test_static_opd_trains_two_experts_and_then_a_copy_of_one() -> None:
    settings = config("static_opd", static_opd={"student": "video", "teacher": "text"})
    schedule = Schedule(settings)
    assert schedule.students == ("text", "video", STUDENT)
    assert schedule.teachers == {STUDENT: ("text",)}
    steps = plans(settings)
    rl, opd = steps[:10], steps[10:]
    assert schedule.experts_step == 10
    assert [plan.phase for plan in steps] == ["rl"] * 10 + ["opd"] * len(opd)
    for plan in rl:
        assert [(a.student, a.source, a.teacher, a.num_prompts) for a in plan.assignments] == [
            ("text", "text", None, 8),
            ("video", "video", None, 8),
        ]
        assert plan.copies == ()
    for plan in opd:
        (a,) = plan.assignments
        assert (a.student, a.source, a.teacher, a.num_prompts, a.weight) == (STUDENT, "text", "text", 8, 1.0)
    assert opd[0].copies == ((STUDENT, "video"),)
    assert not any(plan.copies for plan in opd[1:])
    assert [step.step for step in steps if schedule.is_measured(step.step)] == [10, schedule.num_steps]


def test_mopd_teaches_the_base_from_every_expert_in_turn() -> None:
    settings = config("mopd", prompts=7)
    steps = plans(settings)
    opd = [plan for plan in steps if plan.phase == "opd"]
    assert Schedule(settings).students == (*ABC, STUDENT)
    assert not any(plan.copies for plan in steps)  # the student is the base until then
    drawn = dict.fromkeys(ABC, 0)
    for plan in opd:
        assert {a.student for a in plan.assignments} == {STUDENT}
        assert all(a.source == a.teacher for a in plan.assignments)
        assert sum(a.weight for a in plan.assignments) == pytest.approx(1)
        for a in plan.assignments:
            drawn[a.source] += a.num_prompts
    assert max(drawn.values()) - min(drawn.values()) <= 2
    assert set(opd[0].models) == {*ABC, STUDENT}


def test_mopd_into_a_branch_that_keeps_its_own_prompts() -> None:
    settings = config("mopd", mopd={"student": "image", "native_share": 0.5})
    first = next(plan for plan in plans(settings) if plan.phase == "opd")
    assert first.copies == ((STUDENT, "image"),)
    assert [(a.source, a.teacher, a.num_prompts) for a in first.assignments] == [
        ("image", None, 4),
        ("text", "text", 4),
        ("video", "video", 4),
    ]


@pytest.mark.parametrize(
    ("method", "sections", "edges", "label"),
    [
        ("static_opd", {}, ("text", ("image",)), "static OPD image→text"),
        ("static_opd", {"static_opd": {"student": "video"}}, ("video", ("text",)), "static OPD text→video"),
        ("static_opd", {"static_opd": {"teacher": "text"}}, ("image", ("text",)), "static OPD text→image"),
        ("mopd", {}, ("base", ABC), "MOPD"),
        ("mopd", {"mopd": {"student": "text"}}, ("text", ("image", "video")), "MOPD→text"),
        ("mopd", {"mopd": {"teachers": ["text", "video"]}}, ("base", ("text", "video")), "MOPD text+video"),
    ],
)
def test_defaults_and_labels(method: str, sections: dict[str, Any], edges: Any, label: str) -> None:
    settings = config(method, **sections)
    assert distillation_edges(settings) == edges
    assert final_model(settings) == (label, "baseline")


def test_beta_of_a_student() -> None:
    assert betas_of(config("static_opd", static_opd={"student": "video"}))[STUDENT] == 3.0
    assert betas_of(config("mopd"))[STUDENT] == 2.0
    assert betas_of(config("copd"))["image"] == 2.0


numbers = st.fixed_dictionaries(
    {
        "names": st.sampled_from([("a", "b"), ("a", "b", "c"), ("a", "b", "c", "d")]),
        "prompts": st.integers(1, 9),
        "cycles": st.integers(1, 3),
        "rl_steps": st.integers(0, 4),
        "opd_steps": st.integers(1, 4),
        "cross_ratio": st.sampled_from([0.3, 1.0, 1.7]),
        "topology": st.sampled_from(["hub", "full", "ring"]),
        "native_share": st.sampled_from([0.0, 0.5]),
    }
)


@given(numbers, st.sampled_from(["static_opd", "mopd"]), st.booleans())
def test_static_methods_draw_as_many_prompts_as_copd(given: dict[str, Any], method: str, own: bool) -> None:
    """To a whole step of the student; and the experts take as many steps as CoPD's branches."""
    names, prompts = given["names"], given["prompts"]
    schedule = {key: given[key] for key in ("cycles", "rl_steps", "opd_steps", "cross_ratio", "topology")}
    sections = {method: {"student": names[-1], "native_share": given["native_share"]}} if own else {}
    drawn = num_prompts(plans(config("copd", names, prompts, schedule=schedule)))
    settings = config(method, names, prompts, schedule=schedule, **sections)
    steps = plans(settings)
    per_step = num_prompts(steps[-1:])
    assert drawn <= num_prompts(steps) < drawn + per_step
    num_rl = sum(plan.phase == "rl" for plan in steps)
    assert num_rl == given["cycles"] * (given["rl_steps"] + given["opd_steps"])
    assert [plan.step for plan in steps] == list(range(1, len(steps) + 1))
    for plan in steps:
        assert {a.student for a in plan.assignments if a.teacher} <= {STUDENT}


def test_steps_of_distillation_may_be_given() -> None:
    assert Schedule(config("mopd", mopd={"opd_steps": 3})).num_steps == 13
    settings = config("static_opd", schedule={"opd_steps": 0}, static_opd={"student": "text"})
    assert Schedule(settings).num_steps == 6 + 6  # the third branch's prompts
    with pytest.raises(UserError, match=r"mopd: .* none are left .* set mopd.opd_steps"):
        Schedule(config("mopd", schedule={"opd_steps": 0}))


@pytest.mark.parametrize("method", ["static_opd", "mopd"])
def test_beta_by_kl_needs_measurements_while_the_student_learns(method: str) -> None:
    kl = {"schedule": {"beta_scale": "kl"}}
    message = f"beta_scale 'kl': with diagnostics.every = 0 nothing is measured while {method} distils"
    for methods in ({"method": method}, {"method": "copd", "baselines": ["expert", method]}):
        with pytest.raises(UserError, match=message):
            config(**methods, **kl, diagnostics={"every": 0})
        config(**methods, diagnostics={"every": 0})
        config(**methods, **kl, diagnostics={"every": 3})
    config("copd", **kl, diagnostics={"every": 0})  # measured at the ends of its phases


def test_experts_of_another_run_are_not_planned_again(tmp_path: Any) -> None:
    settings = config("mopd", mopd={"experts": str(tmp_path)})
    schedule, whole = Schedule(settings), Schedule(config("mopd"))
    assert (schedule.first_step, schedule.num_steps) == (11, whole.num_steps)
    assert [schedule.plan(step) for step in range(11, 14)] == [whole.plan(step) for step in range(11, 14)]
    with pytest.raises(ValueError, match=r"step 10 is outside 11\.\."):
        schedule.plan(10)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"static_opd": {"student": "imago"}},
            r"static_opd.student: no branch is named 'imago' .*mean 'image'",
        ),
        ({"mopd": {"teachers": ["vidio"]}}, r"mopd.teachers: no branch is named 'vidio' \(did you mean 'video'"),
        ({"static_opd": {"student": "text", "teacher": "text"}}, "branch 'text' cannot teach itself"),
        ({"mopd": {"student": "text", "teachers": ["text"]}}, "branch 'text' cannot teach itself"),
        ({"mopd": {"teachers": ["text", "image", "text"]}}, "mopd.teachers = .*: names a branch twice"),
        ({"mopd": {"native_share": 0.5}}, "the base has no prompts of its own"),
        ({"names": ("mixed", "b")}, "branch name 'mixed' is taken"),
        ({"names": ("student", "b")}, "branch name 'student' is taken"),
        ({"names": ("a",)}, "needs at least two branches"),
        ({"static_opd": {"techer": "text"}}, "techer.*teacher"),
    ],
)
def test_what_does_not_fit_is_named(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config("static_opd", **sections)
