"""Baselines at equal steps and at equal FLOPs: schedules that go on, their rows, resume, folders that do not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import copd_engine.report
from copd_engine.algorithms import Schedule, result_labels
from copd_engine.checkpoint import complete_checkpoints
from copd_engine.config import RunConfig, build_config
from copd_engine.metrics import read_metrics
from copd_engine.trainer import Trainer
from copd_engine.types import UserError
from tests.small_run import contents, numbers, small_config, train, write_base, write_data
from tests.test_algorithms import config as schedule_config

NAMES = tuple("abcd")


@pytest.fixture(autouse=True, scope="module")
def _no_figures() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copd_engine.report, "write_report", lambda run_dir: run_dir)
        yield


# Schedules


@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 4), st.integers(1, 4), st.sampled_from(["hub", "full"]))
def test_equal_steps_are_those_of_all_branches_together(
    num: int, cycles: int, rl_steps: int, opd_steps: int, topology: str
) -> None:
    numbers = {"cycles": cycles, "rl_steps": rl_steps, "opd_steps": opd_steps, "topology": topology}
    copd = Schedule(schedule_config(NAMES[:num], "copd", **numbers))
    total = num * copd.num_steps
    for method, models in (("expert", num), ("mixed", 1)):
        schedule = Schedule(schedule_config(NAMES[:num], method, **numbers))
        if schedule.equal_steps is None:
            assert schedule.num_steps * models <= total
        else:
            assert schedule.equal_steps * models == total
            assert schedule.equal_steps < schedule.num_steps


@given(st.integers(2, 4), st.integers(1, 4), st.integers(1, 4), st.sampled_from([0, 0.5]), st.sampled_from([2.0, 5.0]))
def test_a_step_counts_for_those_who_take_it(
    num: int, rl_steps: int, opd_steps: int, native: float, cross: float
) -> None:
    """One edge alone: without native prompts the others do nothing in phase II."""
    numbers = {"cycles": 2, "rl_steps": rl_steps, "opd_steps": opd_steps, "native_share": native}
    numbers |= {"cross_ratio": cross, "topology": [("a", "b")]}
    copd = Schedule(schedule_config(NAMES[:num], "copd", **numbers))
    total = sum(len(copd.plan(step).students) for step in range(1, copd.num_steps + 1))
    assert total == 2 * (num * rl_steps + (num if native else 1) * opd_steps)
    for method, models in (("expert", num), ("mixed", 1)):
        schedule = Schedule(schedule_config(NAMES[:num], method, **numbers))
        expected = -(-total // models)
        assert schedule.equal_steps == (expected if expected < schedule.num_steps else None)
    experts = Schedule(schedule_config(NAMES[:num], "expert", **numbers))
    assert experts.experts_step == (copd.num_steps if copd.num_steps < experts.num_steps else None)


ADAPTIVE = {"adaptive": {"metric": "overlap", "threshold": 0.8, "recover": 0.9}}


def test_under_adaptive_phases_only_the_experts_of_the_fixed_schedule_are_kept() -> None:
    """How many steps CoPD will take is not known; static distillation still needs its experts."""
    numbers = {"cycles": 2, "rl_steps": 3, "opd_steps": 2, **ADAPTIVE}
    configs = {m: schedule_config(NAMES[:2], m, **numbers) for m in ("expert", "mixed", "mopd")}
    schedules = {method: Schedule(config) for method, config in configs.items()}
    assert schedules["expert"].equal_steps is schedules["mixed"].equal_steps is None
    assert schedules["expert"].experts_step == schedules["mopd"].experts_step == 10
    at_equal_steps = ("expert:a, equal steps", "expert:b, equal steps")
    assert result_labels(configs["expert"]) == ("base", "expert:a", "expert:b", "average of experts", *at_equal_steps)
    assert result_labels(configs["mixed"]) == ("base", "mixed RLVR")
    assert result_labels(configs["mopd"]) == ("base", *at_equal_steps, "MOPD")


def test_a_run_does_not_go_on_to_another_goal() -> None:
    settings = schedule_config(NAMES[:2], "mixed")
    begun, other = Schedule(settings, 100), Schedule(settings, 120)
    begun.observe(1, flops=10)
    with pytest.raises(UserError, match="its 120 FLOPs are another goal than the 100 that this run was begun with"):
        other.load_state_dict(begun.state_dict())
    again = Schedule(settings, 100)
    again.load_state_dict(begun.state_dict())
    assert again.num_steps == begun.num_steps
    old = begun.state_dict()
    del old["steps"]["flops_goal"]  # as checkpoints were written before
    other.load_state_dict(old)
    assert other.flops_goal == 120


def run_to_the_end(schedule: Schedule, per_step: int) -> int:
    step = 0
    while step < schedule.num_steps:
        step += 1
        schedule.plan(step)
        schedule.observe(step, flops=step * per_step)
    return step


@given(st.integers(1, 60), st.integers(1, 2000))
def test_a_baseline_goes_on_until_its_flops_are_reached(per_step: int, goal: int) -> None:
    """12 steps for equal rollouts; the goal is reached at the first step that is not below it, before or after."""
    settings = schedule_config(NAMES[:2], "expert", cycles=2, rl_steps=2, opd_steps=2)
    schedule = Schedule(settings, goal)
    assert schedule.num_steps == schedule.equal_rollouts == 12
    reached = -(-goal // per_step)
    assert run_to_the_end(schedule, per_step) == max(12, reached)
    assert (schedule.equal_flops, schedule.num_steps) == (reached, max(12, reached))
    assert schedule.equal_rollouts == 12
    again = Schedule(settings, goal)
    again.load_state_dict(schedule.state_dict())
    assert (again.equal_flops, again.num_steps) == (reached, max(12, reached))


# Runs


def settings_of(folder: Path, method: str, name: str, num_branches: int = 2, **changes: Any) -> RunConfig:
    schedule = {"cycles": 1, "rl_steps": 2, "opd_steps": 2}
    evaluated = {"every": 3, "num_prompts": 2, "final_num_prompts": 3}
    kept = {"every": 1, "keep": 99}
    config = small_config(folder / "base", folder / "data", folder / "runs", schedule=schedule, eval=evaluated)
    config |= {"branches": config["branches"][:num_branches], "checkpoint": kept}
    return build_config({**config, "method": method, "name": name, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a finished CoPD run in ``runs/copd`` ."""
    folder = tmp_path_factory.mktemp("flops")
    write_base(folder / "base")
    write_data(folder / "data")
    train(settings_of(folder, "copd", "copd"))
    return folder


def rows_of(run_dir: Path) -> dict[str, dict[str, Any]]:
    return {row["model"]: row for row in json.loads((run_dir / "result.json").read_text())["rows"]}


def flops_by_step(run_dir: Path) -> list[int]:
    """Of all models up to each step, from step 0 on."""
    total, found = 0, []
    for record in read_metrics(run_dir):
        total += sum(branch["work"]["flops"] for branch in record["branches"].values())
        found.append(total)
    return found


def with_more_flops(copd: Path, target: Path, factor: float) -> Path:
    """The CoPD run as if it had computed that much more."""
    shutil.copytree(copd, target)
    result = json.loads((target / "result.json").read_text())
    for row in result["rows"]:
        row["train_flops"] = int(row["train_flops"] * factor)
    (target / "result.json").write_text(json.dumps(result))
    return target


@pytest.mark.parametrize("method", ["expert", "mixed"])
@pytest.mark.parametrize("factor", [0.4, 1.6])
def test_rows_at_equal_flops(folder: Path, tmp_path: Path, method: str, factor: float) -> None:
    """All other rows are those of the run that stops at equal rollouts, to the bit."""
    goal_run = with_more_flops(folder / "runs/copd", tmp_path / "copd", factor)
    goal = rows_of(goal_run)["merged"]["train_flops"]
    plain = train(settings_of(folder, method, f"{method}-plain-{factor}"))
    config = settings_of(folder, method, f"{method}-{factor}", flops_of=str(goal_run))
    run_dir = train(config)
    usual, rows = rows_of(plain), rows_of(run_dir)
    label = {"expert": "average of experts", "mixed": "mixed RLVR"}[method]
    assert {name: rows[name] for name in usual} == usual
    added = set(rows) - set(usual)
    experts = {f"expert:{name}, equal FLOPs" for name in config.branch_names} if method == "expert" else set()
    assert added == {f"{label}, equal FLOPs", *experts}
    assert set(rows) == set(result_labels(config))
    assert set(usual) == set(result_labels(config.model_copy(update={"flops_of": None})))
    result = json.loads((run_dir / "result.json").read_text())
    assert result["flops_goal"] == goal
    assert json.loads((plain / "result.json").read_text())["flops_goal"] is None
    counted = flops_by_step(run_dir)
    reached = next(step for step, flops in enumerate(counted) if flops >= goal)
    row = rows[f"{label}, equal FLOPs"]
    assert row["train_flops"] == counted[reached]
    assert row["steps"] == reached * (2 if method == "expert" else 1)
    end_of_usual = usual[label]["steps"] // (2 if method == "expert" else 1)
    assert len(counted) - 1 == max(reached, end_of_usual)
    assert (reached > end_of_usual) == (factor > 1)
    models = {name: data for name, data in contents(run_dir / "models").items() if "equal-FLOPs" not in name}
    assert contents(plain / "models") == models


def test_a_run_at_equal_flops_goes_on_bitwise(folder: Path, tmp_path: Path) -> None:
    """From a checkpoint before equal rollouts, from one at it, and from those after it."""
    goal_run = with_more_flops(folder / "runs/copd", tmp_path / "copd", 1.6)
    whole = train(settings_of(folder, "expert", "whole", flops_of=str(goal_run)))
    steps = [int(path.name.partition("-")[2]) for path in complete_checkpoints(whole / "checkpoints")]
    equal_rollouts = Schedule(settings_of(folder, "expert", "x")).num_steps
    assert max(steps) > equal_rollouts + 1
    for stop in (equal_rollouts - 1, equal_rollouts, equal_rollouts + 1, max(steps)):
        cut = tmp_path / f"cut-{stop}"
        shutil.copytree(whole, cut)
        (cut / "result.json").unlink()
        for path in complete_checkpoints(cut / "checkpoints"):
            if int(path.name.partition("-")[2]) > stop:
                shutil.rmtree(path)
        config = settings_of(folder, "expert", "whole", flops_of=str(goal_run))
        Trainer(config, cut).run()
        assert rows_of(cut) == rows_of(whole)
        assert numbers(cut) == numbers(whole)
        assert contents(cut / "models") == contents(whole / "models")
        assert contents(cut / "scores") == contents(whole / "scores")
        assert (cut / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()


def test_experts_that_went_on_are_taken_where_they_had_taken_copds_steps(folder: Path, tmp_path: Path) -> None:
    goal_run = with_more_flops(folder / "runs/copd", tmp_path / "copd", 1.6)
    rows = {}
    for name, changes in (("stops", {}), ("goes-on", {"flops_of": str(goal_run)})):
        experts = train(settings_of(folder, "expert", f"experts-{name}", **changes))
        student = train(settings_of(folder, "mopd", f"mopd-{name}", mopd={"experts": str(experts)}))
        rows[name] = (rows_of(student), contents(student / "models"))
    assert rows["stops"] == rows["goes-on"]


def test_rows_under_adaptive_phases(folder: Path) -> None:
    schedule = {"cycles": 1, "rl_steps": 2, "opd_steps": 2, **ADAPTIVE}
    config = settings_of(folder, "expert", "adaptive-experts", schedule=schedule)
    experts = train(config)
    assert set(rows_of(experts)) == set(result_labels(config))
    assert rows_of(experts)["expert:text, equal steps"]["steps"] == 4
    config = settings_of(folder, "mopd", "adaptive-mopd", schedule=schedule, mopd={"experts": str(experts)})
    assert set(rows_of(train(config))) == set(result_labels(config))


def test_labels_are_those_of_the_result(folder: Path) -> None:
    for method, num_branches in (("copd", 1), ("copd", 2), ("expert", 1), ("mixed", 1), ("static_opd", 2), ("mopd", 2)):
        config = settings_of(folder, method, f"labels-{method}-{num_branches}", num_branches)
        assert set(rows_of(train(config))) == set(result_labels(config)), (method, num_branches)


def test_folders_whose_flops_are_no_goal(folder: Path, tmp_path: Path) -> None:
    def error(**changes: Any) -> str:
        with pytest.raises(UserError) as caught:
            Trainer(settings_of(folder, "mixed", "none", **changes), tmp_path / "none")
        return str(caught.value)

    copd = folder / "runs/copd"
    assert "flops_of = /nowhere: not a run folder (no config.yaml)" in error(flops_of="/nowhere")
    mixed = train(settings_of(folder, "mixed", "another"))
    assert "holds a run of method 'mixed', not 'copd'" in error(flops_of=str(mixed))
    found = error(flops_of=str(copd), model={"path": str(folder / "base"), "freeze_vision": True})
    assert "no measure for this config (model.freeze_vision was False, is True)" in found
    assert "(branches.0.data" in error(
        flops_of=str(copd), branches=[{"name": n, "data": {"domain": n}} for n in ("text", "image")]
    )
    shutil.copytree(copd, tmp_path / "copd")
    (tmp_path / "copd/result.json").unlink()
    assert "the run is not finished (no result.json)" in error(flops_of=str(tmp_path / "copd"))
    with pytest.raises(UserError, match="flops_of: only expert and mixed go on until a number of FLOPs, not copd"):
        settings_of(folder, "copd", "none", flops_of=str(copd))
    with pytest.raises(UserError, match="not mopd"):
        settings_of(folder, "expert", "none", flops_of=str(copd), baselines=["mopd"])
