"""A whole run in seconds: what it writes, that it is what the files say, and that NaN never reaches the weights."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import copd_engine.report
from copd_engine.algorithms import Schedule
from copd_engine.branch import Branch
from copd_engine.checkpoint import complete_checkpoints, read_manifest
from copd_engine.config import ModelConfig, build_config, load_config
from copd_engine.data import load_examples
from copd_engine.metrics import read_metrics
from copd_engine.models.loading import load_model
from copd_engine.packing import pack
from copd_engine.resolve import resolve
from copd_engine.testbed.tasks import DOMAINS
from copd_engine.trainer import GPU_MAX_TOP_K, MAX_SKIPPED_IN_A_ROW, Trainer, check_top_k
from copd_engine.types import Rollout, UserError
from tests.plain import plain_inputs
from tests.small_run import contents, numbers, small_config, train, write_base, write_data


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("material")
    return write_base(folder / "base"), write_data(folder / "data")


@pytest.fixture(scope="module")
def run(material: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CoPD with both baselines."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copd_engine.report, "write_report", lambda run_dir: run_dir)
        return train(small_config(*material, tmp_path_factory.mktemp("runs"), baselines=["expert", "mixed"]))


def test_more_top_tokens_than_can_be_compared_are_an_error_before_anything_is_trained() -> None:
    check_top_k(384, 384, "cpu")
    check_top_k(GPU_MAX_TOP_K, 384, "cuda:1")
    for top_k, vocab_size, device, message in (
        (385, 384, "cpu", "diagnostics.top_k = 385: the model's vocabulary has 384 tokens"),
        (33, 384, "cuda", "diagnostics.top_k = 33: must be at most 32 on a GPU"),
        (33, 16, "cuda", "the model's vocabulary has 16 tokens"),
    ):
        with pytest.raises(UserError, match=message):
            check_top_k(top_k, vocab_size, device)
    topk = pytest.importorskip("copd_kernels.gpu.topk")
    assert topk.MAX_TOP_K == GPU_MAX_TOP_K


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_rows_of_the_result(run: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    assert [(row["model"], row["kind"]) for row in result["rows"]] == [
        ("base", "base"),
        ("expert:text", "expert"),
        ("expert:image", "expert"),
        ("expert:video", "expert"),
        ("expert:text, equal steps", "expert"),
        ("expert:image, equal steps", "expert"),
        ("expert:video, equal steps", "expert"),
        ("average of experts", "baseline"),
        ("average of experts, equal steps", "baseline"),
        ("mixed RLVR", "baseline"),
        ("mixed RLVR, equal steps", "baseline"),
        ("branch:text", "branch"),
        ("branch:image", "branch"),
        ("branch:video", "branch"),
        ("merged", "merged"),
    ]
    assert result["domains"] == list(DOMAINS)
    for row in result["rows"]:
        means = [row["accuracy"][domain] for domain in DOMAINS]
        errors = [row["stderr"][domain] for domain in DOMAINS]
        assert row["accuracy"]["average"] == pytest.approx(sum(means) / 3)
        assert row["stderr"]["average"] == pytest.approx(math.sqrt(sum(e**2 for e in errors)) / 3)
        assert row["num_prompts"] == 4
        for mean, error in zip(means, errors, strict=True):
            assert mean * 4 == round(mean * 4)
            assert error == pytest.approx(math.sqrt(mean * (1 - mean) / 3))  # of four zeros and ones
    assert (result["method"], result["seed"], result["num_steps"]) == ("copd", 0, 6)


def test_every_method_draws_the_same_number_of_rollouts(run: Path) -> None:
    rows = {row["model"]: row["rollouts"] for row in json.loads((run / "result.json").read_text())["rows"]}
    native, cross = 6 * 2 * 4, 2 * 2 * 4  # steps x prompts x group, and cycles x prompts x group
    assert rows["merged"] == rows["average of experts"] == rows["mixed RLVR"] == 3 * (native + cross)
    for domain in DOMAINS:
        assert rows[f"branch:{domain}"] == rows[f"expert:{domain}"] == native + cross


def test_the_log_counts_what_was_drawn(run: Path) -> None:
    for folder, steps in ((run, 6), (run / "baselines/expert", 8), (run / "baselines/mixed", 24)):
        records = read_metrics(folder)
        assert [record["step"] for record in records] == list(range(steps + 1))
        drawn = [
            part["num_rollouts"] for r in records for b in r["branches"].values() for part in b["rollout"].values()
        ]
        assert sum(drawn) == 3 * 64
    assert [record["phase"] for record in read_metrics(run)] == ["base", "rl", "rl", "opd", "rl", "rl", "opd"]
    assert [record["cycle"] for record in read_metrics(run)] == [0, 1, 1, 1, 2, 2, 2]


def test_each_phase_trains_on_its_terms(run: Path) -> None:
    teachers = {"text": {"image", "video"}, "image": {"text"}, "video": {"text"}}
    for record in read_metrics(run)[1:]:
        for name, branch in record["branches"].items():
            others = teachers[name] if record["phase"] == "opd" else set()
            assert set(branch["rollout"]) == {name} | others
            assert {term for term in branch["terms"] if term != "grpo"} == {f"opd:{other}" for other in others}
            for other in others:  # two prompts in groups of four, shared by the teachers
                assert branch["terms"][f"opd:{other}"]["num_responses"] == 8 // len(others)


def test_versions_count_updates(run: Path) -> None:
    """Up by one in a step with something to learn from, unchanged where every group had equal rewards."""
    versions = dict.fromkeys(DOMAINS, 0)
    for record in read_metrics(run)[1:]:
        for name, branch in record["branches"].items():
            versions[name] += branch["num_tokens"] > 0
            assert branch["version"] == versions[name]
            assert not branch["skipped"]
    assert min(versions.values()) >= 3
    manifest = read_manifest(complete_checkpoints(run / "checkpoints")[-1])
    assert {name: saved["version"] for name, saved in manifest["branches"].items()} == versions


def test_merged_is_the_base_plus_the_mean_of_the_changes(run: Path, material: tuple[Path, Path]) -> None:
    base = weights(material[0])
    for merged, branches in (("merged", "branch-"), ("baselines/expert/models/average-of-experts", "expert-")):
        folder = run / merged if "/" in merged else run / "models" / merged
        one = weights(folder)
        several = [weights(folder.parent / f"{branches}{domain}") for domain in DOMAINS]
        assert set(one) == set(base)
        moved = 0.0
        for name, start in base.items():
            expected = start.double() + sum(branch[name].double() - start.double() for branch in several) / 3
            torch.testing.assert_close(one[name].double(), expected, atol=1e-7, rtol=1e-7)
            moved = max(moved, float((one[name] - start).abs().max()))
        assert moved > 1e-3
    text, image = (weights(run / f"models/branch-{d}")["model.language_model.norm.weight"] for d in ("text", "image"))
    assert not torch.equal(text, image)


def test_the_saved_branches_are_those_of_the_last_checkpoint(run: Path) -> None:
    last = complete_checkpoints(run / "checkpoints")[-1]
    assert last.name == "step-000006"
    for domain in DOMAINS:
        saved = load_file(last / f"model-{domain}.safetensors")
        exported = weights(run / "models" / f"branch-{domain}")
        assert all(torch.equal(saved[name], exported[name]) for name in saved)


@pytest.mark.parametrize("model", ["merged", "branch-video"])
def test_saved_models_load_in_plain_transformers(run: Path, material: tuple[Path, Path], model: str) -> None:
    """Text, image and video prompts: transformers' own forward gives the policy's logits."""
    plain = AutoModelForImageTextToText.from_pretrained(run / "models" / model).float().eval()
    policy, encoder = load_model(ModelConfig(path=str(run / "models" / model)))
    response = torch.tensor([*encoder.tokenizer("12")["input_ids"], encoder.end_token_id])
    for branch in load_config(run / "config.yaml").branches:
        prompt = encoder.encode(load_examples(branch.data, "eval")[0])
        with torch.no_grad():
            logits = plain(**plain_inputs(plain, prompt, response)).logits[0, prompt.num_tokens - 1 : -1]
            batch = pack([prompt], [response], encoder.visual_token_ids, encoder.spatial_merge_size)
            own = policy.hidden_states(batch) @ policy.lm_head_weight.T
        torch.testing.assert_close(logits, own, atol=2e-4, rtol=1e-5)


def test_baselines_start_from_the_base_and_differ_from_copd(run: Path) -> None:
    assert numbers(run / "baselines/expert")[1]["branches"] == numbers(run)[1]["branches"]
    expert, branch = (weights(run / path) for path in ("baselines/expert/models/expert-text", "models/branch-text"))
    assert not all(torch.equal(expert[name], branch[name]) for name in expert)


def test_weighted_merge(material: tuple[Path, Path], tmp_path: Path) -> None:
    shares = {"text": 3.0, "image": 1.0, "video": 0.0}
    config = small_config(*material, tmp_path, merge={"method": "weighted", "weights": shares})
    trainer = Trainer(build_config(config), tmp_path / "run")
    base = trainer.base.named_parameters()
    with torch.no_grad():
        for branch in trainer.branches.values():
            for parameter in branch.parameters.values():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(branch.name))))
    for name, value in trainer.rows.merged_parameters().items():
        text, image = (trainer.branches[d].parameters[name].double() - base[name].double() for d in ("text", "image"))
        torch.testing.assert_close(
            value.double(), base[name].double() + 0.75 * text + 0.25 * image, atol=1e-6, rtol=1e-6
        )


def test_two_runs_of_one_config_give_the_same_numbers(material: tuple[Path, Path], tmp_path: Path, run: Path) -> None:
    again = Trainer(load_config(run / "config.yaml"), tmp_path / "again")
    again.run()
    assert numbers(tmp_path / "again") == numbers(run)
    other = load_config(run / "config.yaml").model_copy(update={"seed": 1})
    Trainer(other, tmp_path / "other").run()
    assert numbers(tmp_path / "other")[1:] != numbers(run)[1:]


def test_teachers_score_before_any_branch_is_updated(
    material: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the result would depend on the order of the branches."""
    events: list[str] = []
    score, update = Branch.score, Branch.update

    def logged_score(self: Branch, rollouts: list[Rollout]) -> Any:
        events.append(f"{self.name}{self.version}")
        return score(self, rollouts)

    def logged_update(self: Branch, samples: Any) -> Any:
        events.append("update")
        return update(self, samples)

    monkeypatch.setattr(Branch, "score", logged_score)
    monkeypatch.setattr(Branch, "update", logged_update)
    config = small_config(*material, tmp_path, schedule={"cycles": 1, "rl_steps": 0, "topology": "full"})
    trainer = Trainer(build_config(config), tmp_path / "run")
    trainer.step(trainer.schedule.plan(1))
    assert events[6:] == ["update"] * 3
    assert sorted(events[:6]) == sorted(f"{domain}0" for domain in DOMAINS for _ in range(2))


def test_a_vocabulary_smaller_than_top_k(material: tuple[Path, Path], tmp_path: Path) -> None:
    config = small_config(*material, tmp_path, diagnostics={"top_k": 385})
    with pytest.raises(UserError, match=r"diagnostics.top_k = 385: the model's vocabulary has 384 tokens"):
        Trainer(build_config(config), tmp_path / "run")


def test_a_prompt_that_is_too_long_is_named(material: tuple[Path, Path], tmp_path: Path) -> None:
    config = small_config(*material, tmp_path, rollout={"max_prompt_tokens": 5})
    with pytest.raises(UserError, match=r"prompt 'text-12' .*text.jsonl:13\) has \d+ tokens, .*max_prompt_tokens is 5"):
        Trainer(build_config(config), tmp_path / "run")


# NaN


def poison_teacher(patch: pytest.MonkeyPatch, teacher: str, times: int) -> None:
    """The first ``times`` scores of a teacher hold a NaN."""
    score, left = Branch.score, [times]

    def poisoned(self: Branch, rollouts: list[Rollout]) -> list[torch.Tensor]:
        scores = score(self, rollouts)
        if self.name == teacher and left[0]:
            left[0] -= 1
            scores[0][0] = math.nan
        return scores

    patch.setattr(Branch, "score", poisoned)


def only_distillation(material: tuple[Path, Path], folder: Path, steps: int, **changes: Any) -> dict[str, Any]:
    """Two branches that teach each other in every step."""
    config = small_config(*material, folder, schedule={"cycles": 1, "rl_steps": 0, "opd_steps": steps}, **changes)
    return {**config, "branches": config["branches"][:2], "eval": {"num_prompts": 1, "final_num_prompts": 1}}


def snapshot(branch: Branch) -> list[torch.Tensor]:
    moments = [value for state in branch.optimizer.state.values() for value in state.values()]
    return [tensor.detach().clone() for tensor in [*branch.parameters.values(), *moments]]


def test_a_step_with_a_nan_loss_is_left_out_and_counted(
    material: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(build_config(only_distillation(material, tmp_path, 4)), tmp_path / "run")
    trainer.step(trainer.schedule.plan(1))
    text, image = trainer.branches["text"], trainer.branches["image"]
    before, image_before, version = snapshot(text), snapshot(image), text.version
    with monkeypatch.context() as patch:
        poison_teacher(patch, "image", 1)
        record = trainer.step(trainer.schedule.plan(2))
    row = record["branches"]["text"]
    assert (row["skipped"], row["num_skipped"], row["version"], row["loss"]) == (True, 1, version, None)
    assert all(map(torch.equal, before, snapshot(text)))
    assert all(parameter.grad is None for parameter in text.parameters.values())
    assert not record["branches"]["image"]["skipped"]
    assert not all(map(torch.equal, image_before, snapshot(image)))
    row = trainer.step(trainer.schedule.plan(3))["branches"]["text"]
    assert (row["skipped"], row["num_skipped"], row["version"]) == (False, 1, version + 1)
    assert text.num_skipped_in_a_row == 0
    assert all(tensor.isfinite().all() for tensor in snapshot(text))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_no_bad_score_of_a_teacher_reaches_the_weights(
    material: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: float
) -> None:
    """In every update of a step that is split into two, so also behind the first one's parameters."""
    config = only_distillation(material, tmp_path, 1, objective={"updates_per_step": 2})
    trainer = Trainer(build_config(config), tmp_path / "run")
    score = Branch.score

    def poisoned(self: Branch, rollouts: list[Rollout]) -> list[torch.Tensor]:
        scores = score(self, rollouts)
        if self.name == "image" and rollouts[0].request.prompt.example.uid.startswith("image"):
            scores[-1][-1] = bad
        return scores

    monkeypatch.setattr(Branch, "score", poisoned)
    row = trainer.step(trainer.schedule.plan(1))["branches"]["text"]
    assert (row["skipped"], row["num_skipped"], row["version"]) == (True, 1, 1)
    assert all(tensor.isfinite().all() for tensor in snapshot(trainer.branches["text"]))


def test_ten_in_a_row_stop_the_run_with_its_last_checkpoint(
    material: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = build_config(only_distillation(material, tmp_path, 14, checkpoint={"every": 6, "keep": 2}))
    score, calls = Branch.score, [0]

    def poisoned(self: Branch, rollouts: list[Rollout]) -> list[torch.Tensor]:
        scores = score(self, rollouts)
        calls[0] += self.name == "image"
        if self.name == "image" and calls[0] > 2:
            scores[0][0] = math.nan
        return scores

    with monkeypatch.context() as patch:
        patch.setattr(Branch, "score", poisoned)
        with pytest.raises(UserError) as caught:
            Trainer(config, tmp_path / "run").run()
    assert MAX_SKIPPED_IN_A_ROW == 10
    last = tmp_path / "run/checkpoints/step-000006"
    assert str(caught.value) == (
        f"branch 'text': 10 updates in a row had a NaN or infinite loss or gradient; stopped. Last checkpoint: {last}"
    )
    records = read_metrics(tmp_path / "run")
    assert [record["step"] for record in records] == list(range(13))
    assert [r["branches"]["text"]["num_skipped"] for r in records[1:]] == [0, 0, *range(1, 11)]
    assert [r["branches"]["text"]["version"] for r in records[1:]] == [1] + [2] * 11
    # Step 12 would have been a checkpoint: what cannot go on is not saved.
    assert complete_checkpoints(tmp_path / "run/checkpoints") == [last]
    assert not (tmp_path / "run/result.json").exists()
    state = read_manifest(last)["branches"]["text"]
    assert (state["num_skipped"], state["num_skipped_in_a_row"]) == (4, 4)
    # Without the cause it goes on from there.
    Trainer(config, tmp_path / "run").run()
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == list(range(15))
    assert read_metrics(tmp_path / "run")[-1]["branches"]["text"]["num_skipped"] == 4


def test_a_run_that_diverges_before_its_first_checkpoint(
    material: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison_teacher(monkeypatch, "image", 99)
    config = build_config(only_distillation(material, tmp_path, 12, checkpoint={"every": 0}))
    with pytest.raises(UserError, match=r"stopped\. Last checkpoint: none"):
        Trainer(config, tmp_path / "run").run()
    assert not (tmp_path / "run/checkpoints").exists()


# The saved config


def test_the_run_folder_holds_the_resolved_config(run: Path, material: tuple[Path, Path]) -> None:
    config = build_config(small_config(*material, run.parent, baselines=["expert", "mixed"]))
    assert load_config(run / "config.yaml") == resolve(config)
    assert resolve(config).rollout.engine == "embedded"
    baseline = yaml.safe_load((run / "baselines/expert/config.yaml").read_text())
    assert (baseline["method"], baseline["baselines"]) == ("expert", [])
    assert Schedule(load_config(run / "baselines/expert/config.yaml")).num_steps == 8


def test_samples_have_their_pictures(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert {(row["step"], row["branch"]) for row in rows} == {
        *((step, domain) for step in (3, 6) for domain in DOMAINS),
        (6, "merged"),
    }
    files = contents(run)
    for row in rows:
        assert len(row["media"]) == (row["domain"] != "text")
        assert all(name in files for name in row["media"])


def test_auto_is_settled_for_this_machine(material: tuple[Path, Path], tmp_path: Path) -> None:
    config = build_config(small_config(*material, tmp_path, device="auto", num_threads=0))
    settled = resolve(config)
    assert settled.device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert settled.num_threads == len(os.sched_getaffinity(0))
    assert settled.rollout.engine == "embedded"
    assert resolve(settled) == settled
    with pytest.raises(UserError, match="device = 'no_such_device'"):
        resolve(config.model_copy(update={"device": "no_such_device"}))
