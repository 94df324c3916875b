"""Held-out prompts: encoded again where their pixels are too many to keep, damaged ones left out; chunks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from copd_engine.config import DataConfig, build_config
from copd_engine.evaluate import evaluate
from copd_engine.held_out import HeldOut
from copd_engine.prompts import HeldOutPrompts, in_chunks
from copd_engine.rollout.base import Sampling
from copd_engine.rollout.embedded import EmbeddedEngine
from copd_engine.testbed import tasks
from copd_engine.types import Example, UserError
from tests.helpers import prompts_of_all_domains, tiny_model

SKIP, RAISE = (DataConfig(domain="image", on_error=mode) for mode in ("skip", "raise"))


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


def images(count: int) -> list[Example]:
    return tasks.testbed_examples("image", "eval", count, 0)


def broken(example: Example, folder: Path) -> Example:
    file = folder / "broken.png"
    file.write_bytes(b"no picture")
    return dataclasses.replace(example, uid="broken", images=(file,))


def test_what_is_not_kept_is_encoded_to_the_same_numbers(model):
    encoder = model[1]
    kept = HeldOutPrompts(images(6), RAISE, encoder, 100, 4)
    size = kept[0].pixel_values.numel() * 4
    anew = HeldOutPrompts(images(6), RAISE, encoder, 100, 4, max_bytes=2 * size)
    assert len(kept) == len(anew) == 4
    assert [anew[i] is anew[i] for i in range(4)] == [True, True, False, False]
    for one, two in zip(kept, anew, strict=True):
        assert torch.equal(one.pixel_values, two.pixel_values)
        assert torch.equal(one.input_ids_T, two.input_ids_T)
    assert [p.example.uid for p in anew[1:3]] == [p.example.uid for p in kept][1:3]


def test_damage_stops_or_is_left_out(model, tmp_path):
    rows = images(5)
    rows[1] = broken(rows[1], tmp_path)
    with pytest.raises(UserError, match=r"broken\.png"):
        HeldOutPrompts(rows, RAISE, model[1], 100, 4)
    held_out = HeldOutPrompts(rows, SKIP, model[1], 100, 4)
    assert [p.example.uid for p in held_out] == [rows[i].uid for i in (0, 2, 3, 4)]
    rows[3] = broken(rows[3], tmp_path)
    with pytest.raises(UserError, match=r"2 of the first 4 held-out prompts could not be encoded.*broken\.png"):
        HeldOutPrompts(rows, SKIP, model[1], 100, 4)
    with pytest.raises(UserError, match="no held-out prompt could be encoded"):
        HeldOutPrompts(rows[3:4], SKIP, model[1], 100, 4)


def test_one_source_that_raises_makes_a_mixture_raise(model, tmp_path):
    row = broken(images(1)[0], tmp_path)
    source = {"source": "testbed", "domain": "image"}
    mixture = DataConfig(source="mixture", sources=({**source, "on_error": "skip"}, source))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"broken\.png"):
        HeldOutPrompts([row, *images(2)], mixture, model[1], 100, 2)


def test_chunks_hold_so_many_bytes(model):
    prompts = prompts_of_all_domains(model[1], 2)  # text, image, video twice
    sizes = [sum(x.numel() * 4 for x in (p.pixel_values, p.pixel_values_videos) if x is not None) for p in prompts]
    for limit in (0, max(sizes), sum(sizes)):
        chunks = list(in_chunks(prompts, limit))
        assert [p for chunk in chunks for p in chunk] == prompts
        for chunk in chunks:
            inside = [sizes[prompts.index(p)] for p in chunk]
            assert sum(inside) <= limit or sum(size > 0 for size in inside) == 1
    assert [len(chunk) for chunk in in_chunks(prompts, sum(sizes))] == [6]
    assert list(in_chunks([])) == []


def test_evaluation_in_chunks_draws_what_one_call_draws(model, monkeypatch):
    policy, encoder = model
    engine = EmbeddedEngine({"text": policy}, encoder)
    prompts = {"image": HeldOutPrompts(images(8), RAISE, encoder, 100, 8)}
    arguments = (engine, "text", prompts, Sampling(1.0, 8), 3)
    whole = evaluate(*arguments)
    monkeypatch.setattr("copd_engine.prompts.MAX_KEPT_BYTES", 1)
    monkeypatch.setattr(in_chunks, "__defaults__", (1,))
    parts = evaluate(*arguments)
    assert [r.response_ids_N.tolist() for _, r, _ in whole[1]] == [r.response_ids_N.tolist() for _, r, _ in parts[1]]
    assert whole[0] == parts[0]
    assert all(r.request.prompt.pixel_values is None for _, r, _ in whole[1])
    assert len(evaluate(*arguments, num_prompts=3)[1]) == 3


def held_out(
    model: Any,
    folder: Path,
    eval_size: int,
    method: str = "copd",
    schedule: dict[str, Any] | None = None,
    **diagnostics: int,
) -> HeldOut:
    branches = [{"name": d, "data": {"domain": d, "eval_size": eval_size}} for d in ("text", "image")]
    config = build_config(
        {
            "method": method,
            "branches": branches,
            "schedule": schedule or {},
            "rollout": {"max_new_tokens": 2},
            "eval": {"num_prompts": 9, "final_num_prompts": 6},
            "diagnostics": diagnostics,
        }
    )
    return HeldOut(config, model[1], folder)


STEERED = {"adaptive": {"threshold": 0.8, "recover": 0.9}}


@pytest.mark.parametrize(
    ("method", "schedule", "steered_by"),
    [
        ("copd", {}, None),
        ("copd", STEERED, "schedule.adaptive"),
        ("copd", {"beta_scale": "kl"}, "schedule.beta_scale"),
        ("mopd", {"beta_scale": "kl"}, "schedule.beta_scale"),
        ("mopd", STEERED, None),  # its phases are fixed
        ("expert", {**STEERED, "beta_scale": "kl"}, None),
    ],
)
def test_a_run_that_is_steered_by_prompts_of_its_test_is_warned_of(
    model, tmp_path, caplog, method, schedule, steered_by
):
    """Warnings are shown on standard error, what is less is not."""
    held_out(model, tmp_path, 7, method, schedule, num_prompts=2).probes()
    told = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(told) == (2 if steered_by else 0)
    for line, name in zip(told, ("text", "image"), strict=False):
        assert line.startswith(f"branch '{name}': 7 held-out prompts, so its probe prompts are the first of them")
        assert f"{steered_by} goes by prompts of the test. It would not with 8 (data.eval_size)" in line
    caplog.clear()
    held_out(model, tmp_path, 8, method, schedule, num_prompts=2).probes()
    assert not caplog.records


def test_probes_stand_behind_the_prompts_of_the_test(model, tmp_path, caplog):
    """Both are the same with and without the other; too few prompts are said."""
    expected = {d: [e.uid for e in tasks.testbed_examples(d, "eval", 8, 0)] for d in ("text", "image")}
    enough, few = held_out(model, tmp_path, 8, num_prompts=2), held_out(model, tmp_path, 7, num_prompts=2)
    assert [p.prompt.example.uid for p in enough.probes()] == [u for uids in expected.values() for u in uids[6:8]]
    assert not caplog.records
    with caplog.at_level("INFO"):
        assert [p.prompt.example.uid for p in few.probes()] == [u for uids in expected.values() for u in uids[:2]]
    assert [record.message.split(",")[0] for record in caplog.records] == [
        "branch 'text': 7 held-out prompts",
        "branch 'image': 7 held-out prompts",
    ]
    policy, encoder = model
    engine = EmbeddedEngine({"text": policy}, encoder)
    for tested in (enough, few):
        samples = tested.evaluate(engine, "text", 9)[1]  # more than the test has
        assert [r.request.prompt.example.uid for _, r, _ in samples] == [
            u for uids in expected.values() for u in uids[:6]
        ]
