"""The pilot: students between base and experts, and what they gain from one teacher."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from copd_engine.config import ModelConfig, RunConfig, build_config
from copd_engine.models.loading import load_model
from copd_engine.study import pilot as pilot_module
from copd_engine.study.config import PilotConfig
from copd_engine.study.pilot import _between, run_pilot
from tests.small_run import small_config, train, write_base, write_data

PILOT = PilotConfig(experts="expert", teacher="image", students=("text",), fractions=(0.5, 1.0), opd_steps=2)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path]:
    folder = tmp_path_factory.mktemp("pilot")
    config = small_config(write_base(folder / "base"), write_data(folder / "data"), folder, method="expert")
    config = build_config({**config, "branches": config["branches"][:2], "optim": {"lr": 1e-2}})
    return config, train(config)


def test_students_stand_between_the_base_and_an_expert(experts: tuple[RunConfig, Path]) -> None:
    config, folder = experts
    base = load_model(config.model)[0]
    expert = load_model(ModelConfig(path=str(folder / "models" / "expert-text")))[0]
    start, end = base.full_parameters(), expert.full_parameters()
    moved = 0
    for fraction in (0.25, 1.0):
        for name, student in _between(base, expert, fraction).items():
            torch.testing.assert_close(student, start[name] + fraction * (end[name] - start[name]))
            moved += not torch.equal(start[name], end[name])
    assert moved > 20


def test_points_are_kept_and_go_on_where_they_were(
    experts: tuple[RunConfig, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, folder = experts
    result = run_pilot(config, PILOT, folder, tmp_path / "whole")
    points = result["points"]
    assert [(p["student"], p["fraction"]) for p in points] == [("text", 0.5), ("text", 1.0)]
    for point in points:
        assert point["gain"] == pytest.approx(point["after"] - point["before"])
        row = next(r for r in json.loads((folder / "result.json").read_text())["rows"] if r["model"] == "expert:image")
        assert point["teacher_accuracy"] == row["accuracy"]["image"]  # equal prompts, equal random numbers
        assert 0 < point["overlap"] <= 1
        assert point["symmetric_kl"] > 0

    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "points.json").write_text(json.dumps({"points": points[:1]}))
    distilled: list[object] = []
    distil = pilot_module._distil
    monkeypatch.setattr(pilot_module, "_distil", lambda *args: distilled.append(args) or distil(*args))
    assert run_pilot(config, PILOT, folder, tmp_path / "half")["points"] == points
    assert len(distilled) == 1


def test_the_student_learns_from_the_teacher_alone(
    experts: tuple[RunConfig, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """KL to the teacher falls, the teacher stays, and no reward is needed."""
    config, folder = experts
    seen = []
    runner = pilot_module.StepRunner

    class Watched(runner):  # type: ignore[valid-type,misc]
        def run(self, plan: object, timer: object) -> object:
            metrics = super().run(plan, timer)
            teacher = self.branches["image"].full_parameters()
            seen.append((metrics["student"]["terms"], {name: t.clone() for name, t in teacher.items()}))
            return metrics

    monkeypatch.setattr(pilot_module, "StepRunner", Watched)
    pilot = PILOT.model_copy(update={"fractions": (1.0,), "opd_steps": 12})
    run_pilot(config, pilot, folder, tmp_path)
    assert all(list(terms) == ["opd:image"] for terms, _ in seen)
    kls = [terms["opd:image"]["reverse_kl"] for terms, _ in seen]
    assert sum(kls[-4:]) < sum(kls[:4])
    first, last = seen[0][1], seen[-1][1]
    assert all(torch.equal(first[name], last[name]) for name in first)


def test_the_pilot_distils_as_the_study_does(
    experts: tuple[RunConfig, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its signal over the vocabulary, and an objective with a reference."""
    config, folder = experts
    seen: list[dict[str, object]] = []
    runner = pilot_module.StepRunner

    class Watched(runner):  # type: ignore[valid-type,misc]
        def run(self, plan: object, timer: object) -> object:
            metrics = super().run(plan, timer)
            seen.append(metrics["student"]["terms"]["opd:image"])
            return metrics

    monkeypatch.setattr(pilot_module, "StepRunner", Watched)
    changed = config.model_dump(mode="json") | {
        "distillation": {"signal": "full"},
        "objective": {"kl": {"weight": 0.1}},
    }
    pilot = PILOT.model_copy(update={"fractions": (1.0,), "opd_steps": 1})
    run_pilot(build_config(changed), pilot, folder, tmp_path)
    assert "exact_reverse_kl" in seen[0]


def test_overlap_is_that_of_all_prompts_of_the_test(
    experts: tuple[RunConfig, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Not that of the few that a run probes: between students it differs by little."""
    config, folder = experts
    probed: list[object] = []
    compare = pilot_module.compare_branches
    monkeypatch.setattr(
        pilot_module,
        "compare_branches",
        lambda *args: probed.append([r.prompt.example.uid for r in args[2]]) or compare(*args),
    )
    run_pilot(config, PILOT.model_copy(update={"fractions": (1.0,), "opd_steps": 1}), folder, tmp_path)
    assert config.diagnostics.num_prompts < config.eval.final_num_prompts
    assert [len(set(uids)) for uids in probed] == [config.eval.final_num_prompts]  # type: ignore[call-overload]
