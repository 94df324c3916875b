"""Static distillation and adaptive schedules through the trainer: results, resume, experts of another run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import copd_engine.report
from copd_engine.checkpoint import complete_checkpoints, read_manifest
from copd_engine.config import RunConfig, build_config
from copd_engine.metrics import read_metrics
from copd_engine.runs import run_with_baselines
from copd_engine.trainer import Trainer
from copd_engine.types import UserError
from tests.small_run import contents, numbers, small_config, write_base, write_data

STATIC = {"static_opd": {"student": "text", "teacher": "image"}}


@pytest.fixture(autouse=True, scope="module")
def _no_figures() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copd_engine.report, "write_report", lambda run_dir: run_dir)
        yield


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("material")
    return write_base(folder / "base"), write_data(folder / "data")


def config_of(material: tuple[Path, Path], folder: Path, method: str, **changes: Any) -> RunConfig:
    """Two branches; CoPD draws 2 * 2 * 3 + 2 * 2 = 16 prompts, of which two experts of three steps leave 4."""
    settings: dict[str, Any] = {
        "schedule": {"cycles": 1, "rl_steps": 2, "opd_steps": 1},
        "eval": {"every": 2, "num_prompts": 2, "final_num_prompts": 3},
        "checkpoint": {"every": 1, "keep": 9},
        "diagnostics": {"every": 0, "num_prompts": 1, "update_angle": True},
        **changes,
    }
    config = small_config(*material, folder, **settings)
    return build_config({**config, "method": method, "name": method, "branches": config["branches"][:2]})


def folder_of(config: RunConfig) -> Path:
    return config.output_dir / config.name


def run(config: RunConfig) -> Path:
    run_with_baselines(config, folder_of(config))
    return folder_of(config)


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["model"]: row for row in json.loads((folder / "result.json").read_text())["rows"]}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def expert(material: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(config_of(material, tmp_path_factory.mktemp("expert"), "expert"))


@pytest.fixture(scope="module")
def static(material: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(config_of(material, tmp_path_factory.mktemp("static"), "static_opd", **STATIC))


@pytest.fixture(scope="module")
def mopd(material: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(config_of(material, tmp_path_factory.mktemp("mopd"), "mopd"))


def test_rows_and_what_they_took(static: Path, mopd: Path, expert: Path) -> None:
    experts = ["expert:text, equal steps", "expert:image, equal steps"]
    assert list(rows_of(static)) == ["base", *experts, "static OPD image→text"]
    assert list(rows_of(mopd)) == ["base", *experts, "MOPD"]
    assert [row["kind"] for row in rows_of(mopd).values()] == ["base", "expert", "expert", "baseline"]
    for folder in (static, mopd, expert):
        for label in experts:  # three steps of two prompts in groups of four
            assert (rows_of(folder)[label]["rollouts"], rows_of(folder)[label]["steps"]) == (24, 3)
            assert rows_of(folder)[label]["train_flops"] == rows_of(expert)[label]["train_flops"] > 0
    for folder, label in ((static, "static OPD image→text"), (mopd, "MOPD"), (expert, "average of experts")):
        row = rows_of(folder)[label]
        assert (row["rollouts"], row["steps"]) == (64, 8)
        logged = [b["work"] for r in read_metrics(folder) for b in r["branches"].values()]
        assert row["train_flops"] == sum(work["flops"] for work in logged)
        assert row["train_tokens"]["generated"] == sum(work["generated_tokens"] for work in logged)
    assert rows_of(static)["static OPD image→text"]["train_tokens"]["scored"] > 0
    assert rows_of(expert)["average of experts"]["train_tokens"]["scored"] == 0
    assert (static / "models" / "static-OPD-image-to-text" / "config.json").is_file()


def test_phases_and_who_is_measured(static: Path, mopd: Path) -> None:
    for folder, sources in ((static, {"image"}), (mopd, {"text", "image"})):
        records = read_metrics(folder)
        assert [record["phase"] for record in records] == ["base", *["rl"] * 3, *["opd"] * 2]
        for record in records[1:4]:
            assert set(record["branches"]) == {"text", "image"}
        for record in records[4:]:
            assert set(record["branches"]) == {"student"}
            assert set(record["branches"]["student"]["rollout"]) == sources
            assert set(record["branches"]["student"]["terms"]) == {f"opd:{source}" for source in sources}
        last = records[-1]["diagnostics"]
        assert {pair["student"] for pair in last["pairs"]} == {"student", *sources}
        assert {row["student"] for row in last["base"]} == {"student", *sources}
        assert set(records[4]["evaluate"]) == {"student"}


def test_students_start_where_they_should(
    material: tuple[Path, Path], static: Path, mopd: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Static OPD's is its expert, MOPD's the base, at the first sample of phase II; teachers stay frozen."""
    for folder, start in ((static, "expert-text-equal-steps"), (mopd, None)):
        before, after = (complete_checkpoints(folder / "checkpoints")[i] for i in (2, 4))
        for name in ("text", "image"):
            frozen = [load_file(path / f"model-{name}.safetensors") for path in (before, after)]
            assert same(*frozen)
        student = load_file(after / "model-student.safetensors")
        origin = weights(folder / "models" / start) if start else weights(material[0])
        distance = max(float((student[name] - origin[name]).abs().max()) for name in student)
        # Two steps of Adam at 3e-3 move no weight further than that; the experts are three steps away from the base.
        assert 0 < distance <= 2 * 3e-3 * 1.01
    moments = load_file(complete_checkpoints(static / "checkpoints")[-1] / "optim-student.safetensors")
    assert {int(value) for name, value in moments.items() if name.endswith("/step")} == {2}


def test_the_experts_are_those_of_an_expert_run(static: Path, mopd: Path, expert: Path) -> None:
    for name in ("text", "image"):
        model = f"models/expert-{name}-equal-steps"
        assert same(weights(static / model), weights(expert / model))
        assert same(weights(mopd / model), weights(expert / model))
    assert numbers(static)[1]["branches"] == numbers(expert)[1]["branches"]


@pytest.mark.parametrize("method", ["static_opd", "mopd"])
def test_taking_the_experts_gives_bitwise_the_single_run(
    material: tuple[Path, Path], expert: Path, static: Path, mopd: Path, tmp_path: Path, method: str
) -> None:
    """In fp32, where a saved model is what was trained."""
    whole, sections = (static, STATIC) if method == "static_opd" else (mopd, {"mopd": {}})
    changes = {method: sections[method] | {"experts": str(expert)}}
    taken = run(config_of(material, tmp_path, method, **changes))
    assert [record["step"] for record in read_metrics(taken)] == [0, 4, 5]
    assert numbers(taken)[1:] == numbers(whole)[4:]
    # Its line 0 is the base's, not the experts'.
    assert read_metrics(taken)[0]["evaluate"]["text"] == read_metrics(whole)[0]["evaluate"]["text"]
    assert read_metrics(taken)[0]["diagnostics"]["pairs"][0]["symmetric_kl"] == pytest.approx(0, abs=1e-9)
    label = "static-OPD-image-to-text" if method == "static_opd" else "MOPD"
    assert same(weights(taken / "models" / label), weights(whole / "models" / label))
    assert rows_of(taken) == rows_of(whole)
    # Paired comparisons read the scores of each of these rows.
    assert contents(taken / "scores") == contents(whole / "scores")
    assert len(contents(taken / "scores")) == len(rows_of(taken))


def test_taking_the_experts_gives_bitwise_the_single_student_in_bf16(
    material: tuple[Path, Path], tmp_path: Path
) -> None:
    """A student starts from what its expert's model holds, not from the fp32 masters, which are not saved."""
    changes = {"model": {"dtype": "bfloat16"}, "static_opd": STATIC["static_opd"]}
    whole = run(config_of(material, tmp_path / "whole", "static_opd", **changes))
    experts = run(config_of(material, tmp_path, "expert", **changes))
    changes["static_opd"] = {**STATIC["static_opd"], "experts": str(experts)}
    taken = run(config_of(material, tmp_path / "taken", "static_opd", **changes))
    model = "models/static-OPD-image-to-text"
    assert same(weights(taken / model), weights(whole / model))
    assert rows_of(taken) == rows_of(whole)


def test_behind_single_experts_a_baseline_takes_them(
    material: tuple[Path, Path], static: Path, expert: Path, tmp_path: Path
) -> None:
    """In the order that allows it, whatever the config's; each expert stands once in the table."""
    config = config_of(material, tmp_path, "copd", baselines=["mopd", "static_opd", "expert"], **STATIC)
    folder = run(config)
    for method in ("mopd", "static_opd"):
        assert [record["step"] for record in read_metrics(folder / "baselines" / method)] == [0, 4, 5]
    rows = [row["model"] for row in json.loads((folder / "result.json").read_text())["rows"]]
    assert len(rows) == len(set(rows))
    assert {"MOPD", "static OPD image→text", "average of experts", "expert:text, equal steps", "merged"} <= set(rows)
    assert rows_of(folder)["static OPD image→text"] == rows_of(static)["static OPD image→text"]
    assert len({rows_of(folder)[m]["rollouts"] for m in ("merged", "MOPD", "average of experts")}) == 1
    run_with_baselines(config, folder)  # finished: nothing is trained again


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("at", [2, 3, 4])
@pytest.mark.parametrize("method", ["static_opd", "mopd"])
def test_a_run_that_was_stopped_goes_on_bitwise(
    material: tuple[Path, Path],
    static: Path,
    mopd: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    at: int,
) -> None:
    """Before, at and behind the change of phases."""
    whole = static if method == "static_opd" else mopd
    stop_behind(config_of(material, tmp_path, method, **STATIC), at, monkeypatch)
    resumed = run(config_of(material, tmp_path, method, **STATIC))
    assert numbers(resumed) == numbers(whole)
    assert rows_of(resumed) == rows_of(whole)
    ours, theirs = contents(resumed / "models"), contents(whole / "models")
    assert ours == theirs


def stop_behind(config: RunConfig, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train up to the checkpoint of ``step``."""
    save = Trainer._save

    def saved(self: Trainer, at: int) -> None:
        save(self, at)
        if at == step:
            raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save", saved)
        with pytest.raises(StoppedError):
            run(config)


def test_experts_without_further_updates_give_their_moments_back(material: tuple[Path, Path], tmp_path: Path) -> None:
    """In the checkpoints too: of a large model they are most of what is held."""
    config = config_of(material, tmp_path, "static_opd")
    trainer = Trainer(config, folder_of(config))
    trainer.run()
    held = {name: len(branch.optimizer.state) for name, branch in trainer.branches.items()}
    assert held["text"] == held["image"] == 0 < held["student"]
    for step, is_held in ((3, True), (4, False)):
        moments = load_file(folder_of(config) / "checkpoints" / f"step-{step:06d}" / "optim-image.safetensors")
        assert bool(moments) == is_held


def test_a_started_run_cannot_take_its_experts_from_another(
    material: tuple[Path, Path], expert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = config_of(material, tmp_path, "mopd")
    stop_behind(started, 2, monkeypatch)
    config = config_of(material, tmp_path, "mopd", mopd={"experts": str(expert)})
    with pytest.raises(UserError, match=r"step-000002: its experts are still in training, and mopd.experts takes"):
        Trainer(config, folder_of(config)).run()


# Experts that do not fit


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 5}, r"its experts are not those of this config \(seed was 0, is 5\)"),
        ({"optim": {"lr": 1e-3}}, r"\(optim.lr was 0.003, is 0.001\)"),
        ({"schedule": {"cycles": 2, "rl_steps": 2, "opd_steps": 1}}, r"\(schedule.steps was 3, is 6\)"),
        ({"rollout": {"group_size": 2}}, r"\(rollout.group_size was 4, is 2\)"),
        # Their rows would stand beside those of models that were tested on other prompts.
        ({"eval": {"final_num_prompts": 2}}, r"\(eval.final_num_prompts was 3, is 2\)"),
        ({"merge": {"method": "search"}}, r"\(merge.method 'search' was False, is True\)"),
        ({"model": {"lora": {"rank": 2}}}, "under model.lora a finished run has no adapters"),
    ],
)
def test_experts_of_another_config_are_refused(
    material: tuple[Path, Path], expert: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    config = config_of(material, tmp_path, "mopd", mopd={"experts": str(expert)}, **changes)
    with pytest.raises(UserError, match=rf"mopd.experts = .*{message}"):
        Trainer(config, folder_of(config))
    assert not folder_of(config).exists()


def test_what_decides_nothing_about_experts_may_differ(
    material: tuple[Path, Path], expert: Path, tmp_path: Path
) -> None:
    """So one run of experts serves a whole study of betas and topologies."""
    changes = {"schedule": {"cycles": 1, "rl_steps": 1, "opd_steps": 2, "topology": "ring", "cross_ratio": 2.0}}
    config = config_of(material, tmp_path, "mopd", mopd={"experts": str(expert)}, **changes)
    branches = [branch.model_copy(update={"beta": 3.0}) for branch in config.branches]
    assert Trainer(config.model_copy(update={"branches": tuple(branches)}), folder_of(config)).schedule.first_step == 4


def test_experts_that_stopped_early_are_refused(material: tuple[Path, Path], tmp_path: Path) -> None:
    """Where CoPD draws little in phase II, lone experts have drawn as much before they have taken as many steps."""
    schedule = {"cycles": 1, "rl_steps": 1, "opd_steps": 2, "native_share": 0, "topology": [["text", "image"]]}
    early = config_of(material, tmp_path / "early", "expert", schedule=schedule)
    run(early)
    config = config_of(material, tmp_path, "mopd", mopd={"experts": str(folder_of(early))})
    with pytest.raises(UserError, match=r"'text' took 2 steps, CoPD's branches take 3"):
        Trainer(config, folder_of(config))


def test_folders_that_hold_no_experts(
    material: tuple[Path, Path], static: Path, expert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def error(folder: Path) -> str:
        config = config_of(material, tmp_path, "mopd", mopd={"experts": str(folder)})
        with pytest.raises(UserError) as caught:
            Trainer(config, folder_of(config))
        return str(caught.value)

    assert error(tmp_path / "none").endswith("not a run folder (no config.yaml)")
    assert error(static).endswith("holds a run of method 'static_opd', not 'expert'")
    shutil.copytree(expert, tmp_path / "without")
    (tmp_path / "without/scores/expert-image-equal-steps.json").unlink()
    assert error(tmp_path / "without").endswith("without/scores/expert-image-equal-steps.json is missing")
    unfinished = config_of(material, tmp_path / "unfinished", "expert")
    stop_behind(unfinished, 2, monkeypatch)
    assert error(folder_of(unfinished)).endswith("the run is not finished (no result.json)")


# Adaptive


ADAPTIVE = {"adaptive": {"metric": "symmetric_kl", "threshold": 1e-9, "recover": 1e-10, "min_rl_steps": 2}}


def test_an_adaptive_run_switches_by_its_own_measurements(
    material: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Branches that differ at all are past a threshold of 1e-9 and never back at 1e-10: phase II from step 3 on, until
    the fixed schedule's 2 * 2 * 4 + 2 * 4 prompts are drawn. Stopped and resumed it takes the same decisions."""
    changes = {
        "schedule": {"cycles": 2, "rl_steps": 2, "opd_steps": 2, "beta_scale": "kl", **ADAPTIVE},
        "diagnostics": {"every": 0, "num_prompts": 1, "update_angle": True},
    }
    whole = run(config_of(material, tmp_path / "whole", "copd", **changes))
    records = read_metrics(whole)
    # 2 * 2 + 2 * 2 * 4 native prompts and 2 * 2 * 4 cross ones are 48; two steps of 4, then five of 8.
    assert [record["phase"] for record in records] == ["base", "rl", "rl", *["opd"] * 5]
    assert all(record["diagnostics"]["pairs"] for record in records[1:])
    assert json.loads((whole / "result.json").read_text())["num_steps"] == 7
    assert rows_of(whole)["merged"]["rollouts"] == 48 * 4
    betas = {r["branches"]["text"]["rollout"]["image"]["beta"] for r in records if r["phase"] == "opd"}
    assert len(betas) > 1
    assert min(betas) >= 0.5
    assert max(betas) <= 2.0
    for at in (2, 4):
        folder = tmp_path / str(at)
        stop_behind(config_of(material, folder, "copd", **changes), at, monkeypatch)
        saved = read_manifest(complete_checkpoints(folder / "copd/checkpoints")[-1])["state"]["schedule"]["steps"]
        assert (saved["done"], saved["in_opd"]) == (at, 1)
        resumed = run(config_of(material, folder, "copd", **changes))
        assert numbers(resumed) == numbers(whole)
        assert contents(resumed / "models") == contents(whole / "models")


def test_angles_between_what_branches_learned(material: tuple[Path, Path], tmp_path: Path) -> None:
    """From one diagnosis to the next against the checkpoints in between."""
    changes = {"diagnostics": {"every": 1, "num_prompts": 1, "update_angle": True}}
    folder = run(config_of(material, tmp_path, "expert", **changes))
    records = read_metrics(folder)
    base = weights(material[0])

    def flat(step: int, name: str) -> torch.Tensor:
        tensors = load_file(folder / f"checkpoints/step-{step:06d}/model-{name}.safetensors") if step else base
        return torch.cat([tensors[key].double().flatten() for key in sorted(tensors)])

    for step in (2, 3):
        (pair, other) = records[step]["diagnostics"]["pairs"]
        for key, start in (("task_cosine", 0), ("update_cosine", step - 1)):
            text, image = (flat(step, name) - flat(start, name) for name in ("text", "image"))
            expected = torch.nn.functional.cosine_similarity(text, image, dim=0)
            assert pair[key] == pytest.approx(float(expected), abs=1e-6)
            assert pair[key] == other[key]
    assert records[0]["diagnostics"]["pairs"][0]["task_cosine"] is None  # nothing was learned yet
    assert pair["update_cosine"] != pair["task_cosine"]


def test_mixed_rlvr_is_measured_against_the_base(material: tuple[Path, Path], tmp_path: Path) -> None:
    records = read_metrics(run(config_of(material, tmp_path, "mixed")))
    assert records[0]["diagnostics"]["base"][0]["symmetric_kl"] == pytest.approx(0, abs=1e-9)
    (row,) = records[-1]["diagnostics"]["base"]
    assert (row["student"], row["teacher"]) == ("mixed", "base")
    assert row["symmetric_kl"] > 0
    assert records[-1]["diagnostics"]["pairs"] == []


def test_samples_are_kept_of_who_was_trained_and_of_the_result(static: Path) -> None:
    rows = [json.loads(line) for line in (static / "samples.jsonl").read_text().splitlines()]
    assert {row["branch"] for row in rows} == {"text", "image", "student", "static OPD image→text"}
