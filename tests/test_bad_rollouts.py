"""What a run does with samples above ``optim.max_length`` and with prompts that cannot be encoded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from copd_engine.config import build_config
from copd_engine.metrics import read_metrics
from copd_engine.objectives import TrainSample
from copd_engine.step import Timer
from copd_engine.trainer import Trainer
from copd_engine.types import UserError
from tests.small_run import small_config, train, write_base, write_data, write_rows


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("material")
    return write_base(folder / "base"), write_data(folder / "data")


def trainer_of(material: tuple[Path, Path], output_dir: Path, **optim: Any) -> Trainer:
    """Text alone. Its prompts have 23 tokens, its responses 1 to 8."""
    config = small_config(*material, output_dir, optim=optim, rollout={"max_prompt_tokens": 23})
    return Trainer(build_config({**config, "branches": config["branches"][:1], "method": "expert"}), output_dir / "run")


def first_update(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> tuple[list[TrainSample], dict[str, Any]]:
    """What the branch is trained on in steps 1 to 4, and the counts of those steps."""
    branch = trainer.branches["text"]
    seen: list[TrainSample] = []
    update = branch.update
    monkeypatch.setattr(branch, "update", lambda samples: (seen.extend(samples), update(samples))[1])
    sums = {"too_long_truncated": 0, "too_long_dropped": 0, "num_rollouts": 0}
    for number in range(1, 5):
        stats = trainer.steps.run(trainer.schedule.plan(number), Timer())["text"]["rollout"]["text"]
        for key in sums:
            sums[key] += stats[key]
    return seen, sums


def test_responses_are_cut(material, tmp_path, monkeypatch):
    whole, _ = first_update(trainer_of(material, tmp_path / "whole", lr=1e-9), monkeypatch)
    cut, counts = first_update(
        trainer_of(material, tmp_path / "cut", lr=1e-9, max_length=25, too_long="truncate_response"), monkeypatch
    )
    assert {s.rollout.num_tokens for s in whole} - {1, 2}  # something to cut
    assert len(cut) == len(whole)
    for one, two in zip(whole, cut, strict=True):
        assert two.rollout.response_ids_N.tolist() == one.rollout.response_ids_N[:2].tolist()
        assert two.advantage == one.advantage  # of the whole responses
        assert two.token_weight == pytest.approx(one.token_weight * one.rollout.num_tokens / two.rollout.num_tokens)
    assert counts["too_long_truncated"] > 0
    assert counts["too_long_dropped"] == 0


def test_too_long_samples_are_left_out_and_counted(material, tmp_path, monkeypatch):
    whole, _ = first_update(trainer_of(material, tmp_path / "whole", lr=1e-9), monkeypatch)
    kept, counts = first_update(
        trainer_of(material, tmp_path / "dropped", lr=1e-9, max_length=25, too_long="drop"), monkeypatch
    )
    expected = [s for s in whole if s.rollout.num_tokens <= 2]
    assert 0 < len(expected) < len(whole)
    assert [s.rollout.response_ids_N.tolist() for s in kept] == [s.rollout.response_ids_N.tolist() for s in expected]
    assert [(s.advantage, s.token_weight) for s in kept] == [(s.advantage, s.token_weight) for s in expected]
    assert counts["too_long_dropped"] >= len(whole) - len(expected)


def test_too_long_samples_are_an_error_by_default(material, tmp_path, monkeypatch):
    trainer = trainer_of(material, tmp_path, max_length=25)
    with pytest.raises(UserError, match=r"prompt 'text-\d+' .* has 23 \+ \d+ tokens, optim.max_length is 25"):
        first_update(trainer, monkeypatch)


def test_a_limit_that_a_prompt_could_reach_is_refused(material, tmp_path):
    with pytest.raises(UserError, match=r"optim.max_length = 23: must be above rollout.max_prompt_tokens = 23"):
        trainer_of(material, tmp_path, max_length=23)


def data_with_damage(folder: Path) -> Path:
    """200 rows with one picture; of the first of them the file holds no picture."""
    from tests.model_inputs import image

    folder.mkdir()
    image(8, 8).save(folder / "good.png")
    (folder / "bad.png").write_bytes(b"no picture")
    rows = [
        {"prompt": "<image>?", "answer": 1 + n % 2, "images": ["bad.png" if n == 0 else "good.png"]} for n in range(200)
    ]
    return write_rows(folder / "rows.jsonl", rows)


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_damaged_picture_stops_the_run_or_is_left_out(material, tmp_path, on_error):
    """All 200 prompts but the four held out are drawn in 49 steps of four."""
    file = data_with_damage(tmp_path / "data")
    config = small_config(*material, tmp_path, schedule={"cycles": 1, "rl_steps": 49, "opd_steps": 0})
    data = {"source": "jsonl", "path": str(file), "eval_size": 4, "on_error": on_error}
    config |= {"method": "expert", "branches": [{"name": "image", "data": data}]}
    config["rollout"] |= {"prompts_per_step": 4, "group_size": 2, "max_new_tokens": 2}
    if on_error == "raise":
        with pytest.raises(UserError, match=r"rows\.jsonl:1.*bad\.png"):
            train(config)
        return
    run_dir = train(config)
    rows = [row["branches"]["image"]["rollout"]["image"] for row in read_metrics(run_dir)[1:]]
    assert [row["num_rollouts"] for row in rows] == [8] * 49
    assert rows[-1]["prompts_skipped"] == 1


def test_the_reward_is_the_sum_of_its_terms_and_accuracy_the_verifier_alone(material, tmp_path):
    """``1`` alone is no sentence: the format term is 0; responses of 7 and 8 tokens are punished."""
    config = small_config(*material, tmp_path, schedule={"cycles": 1, "rl_steps": 4, "opd_steps": 0})
    reward = [
        {"kind": "verifier", "weight": 0.5},
        {"kind": "format", "pattern": "[12]+"},
        {"kind": "overlong", "buffer_tokens": 2},
    ]
    config |= {"method": "expert", "branches": [config["branches"][0] | {"reward": reward}]}
    run_dir = train(config)
    seen = []
    for row in read_metrics(run_dir)[1:]:
        stats = row["branches"]["text"]["rollout"]["text"]
        terms = stats["reward_terms"]
        assert stats["reward_mean"] == pytest.approx(0.5 * terms["verifier"] + terms["format"] + terms["overlong"])
        seen.append(terms)
    assert any(terms["verifier"] > 0 for terms in seen)
    assert any(0 < terms["format"] < 1 for terms in seen)
    assert any(-1 < terms["overlong"] < 0 for terms in seen)
    result = json.loads((run_dir / "result.json").read_text())
    for line in result["rows"]:
        assert line["accuracy"]["text"] in (0, 0.25, 0.5, 0.75, 1)  # of four prompts, unshaped


def test_a_reward_term_whose_verifier_cannot_read_the_golds(material, tmp_path):
    config = small_config(*material, tmp_path)
    config["branches"] = [config["branches"][0] | {"reward": [{"kind": "verifier", "name": "iou_box"}]}]
    with pytest.raises(UserError, match=r"branches\.0\.reward\.0\.name = 'iou_box': .*text"):
        Trainer(build_config(config | {"method": "expert"}), tmp_path / "run")
