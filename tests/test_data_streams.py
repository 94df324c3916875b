"""Streams resume at the exact next example; mixtures keep their weights; skipped prompts are replaced and counted."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from copd_engine.config import DataConfig
from copd_engine.data import DataStream, MixtureStream, load_examples, load_stream, make_stream
from copd_engine.models.processor import load_encoder
from copd_engine.prompts import PromptSource
from copd_engine.types import Example, UserError
from tests.data_files import GOOD, jsonl, rows, write


def numbered(n: int, name: str = "") -> list[Example]:
    return [Example(uid=f"{name}{i}", prompt="q", answer="1", verifier="exact") for i in range(n)]


def uids(examples: list[Example]) -> list[str]:
    return [example.uid for example in examples]


@given(
    n=st.integers(1, 12),
    seed=st.integers(0, 2**32),
    before=st.lists(st.integers(0, 30), max_size=5),
    after=st.integers(0, 40),
)
def test_a_resumed_stream_equals_the_undisturbed_one(n: int, seed: int, before: list[int], after: int) -> None:
    undisturbed, stopped = DataStream(numbered(n), seed), DataStream(numbered(n), seed)
    expected = uids(undisturbed.take(sum(before) + after))
    for size in before:
        stopped.take(size)
    state = json.loads(json.dumps(stopped.state_dict()))  # the checkpoint's manifest is JSON
    resumed = DataStream(numbered(n), seed)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == stopped.state_dict()
    assert uids(resumed.take(after)) == expected[sum(before) :] == uids(stopped.take(after))


@given(n=st.integers(1, 12), epochs=st.integers(1, 4), seed=st.integers(0, 100))
def test_every_epoch_holds_every_example_once(n: int, epochs: int, seed: int) -> None:
    taken = uids(DataStream(numbered(n), seed).take(n * epochs))
    for epoch in range(epochs):
        assert sorted(taken[epoch * n : (epoch + 1) * n], key=int) == [str(i) for i in range(n)]


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    taken = uids(DataStream(numbered(50), 0).take(100))
    assert taken[:50] != taken[50:]
    assert taken[:50] != uids(DataStream(numbered(50), 1).take(50))
    assert taken[:50] == uids(DataStream(numbered(50), 0).take(50))


def test_stream_errors() -> None:
    with pytest.raises(UserError, match="at least one example"):
        DataStream([], 0)
    stream = DataStream(numbered(3), 0)
    with pytest.raises(ValueError, match="n = -1"):
        stream.take(-1)
    for state in ({"epoch": 0, "cursor": 4}, {"epoch": -1, "cursor": 0}, {"epoch": 0, "cursor": -1}):
        with pytest.raises(UserError, match="does not fit 3 examples"):
            stream.load_state_dict(state)


@pytest.mark.parametrize("seed", [0, 1, 2**62])
def test_the_shuffle_is_that_of_earlier_checkpoints(seed: int) -> None:
    """{epoch, cursor} of a run from before mixtures must go on with the same examples."""
    stream = DataStream(numbered(7), seed)
    stream.load_state_dict({"epoch": 2, "cursor": 3})
    expected = np.random.default_rng([seed, 2]).permutation(7).tolist()[3:]
    assert uids(stream.take(4)) == [str(i) for i in expected]


# Mixtures


def mixture(weights: list[float], sizes: list[int], seed: int = 0) -> MixtureStream:
    names = "abcdef"
    streams = [DataStream(numbered(size, names[i]), seed + 100 + i) for i, size in enumerate(sizes)]
    return MixtureStream(streams, weights, seed)


def test_shares_converge_to_the_weights() -> None:
    taken = uids(mixture([1, 2, 5], [3, 50, 1000]).take(4000))
    shares = {name: count / 4000 for name, count in Counter(uid[0] for uid in taken).items()}
    # Four standard errors of a share of 4,000 draws are at most .032.
    assert shares == pytest.approx({"a": 1 / 8, "b": 2 / 8, "c": 5 / 8}, abs=0.03)


def test_every_source_has_epochs_of_its_own() -> None:
    taken = uids(mixture([1, 1], [3, 50], seed=3).take(60))
    small = [uid for uid in taken if uid[0] == "a"]
    for epoch in range(len(small) // 3):
        assert sorted(small[3 * epoch : 3 * epoch + 3]) == ["a0", "a1", "a2"]
    assert max(Counter(uid for uid in taken if uid[0] == "b").values()) == 1


@given(
    seed=st.integers(0, 2**32),
    weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=4),
    before=st.lists(st.integers(0, 20), max_size=4),
    after=st.integers(0, 30),
)
def test_a_resumed_mixture_equals_the_undisturbed_one(
    seed: int, weights: list[float], before: list[int], after: int
) -> None:
    sizes = [2 + i for i in range(len(weights))]
    undisturbed, stopped = mixture(weights, sizes, seed), mixture(weights, sizes, seed)
    expected = uids(undisturbed.take(sum(before) + after))
    for size in before:
        stopped.take(size)
    resumed = mixture(weights, sizes, seed)
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    assert uids(resumed.take(after)) == expected[sum(before) :] == uids(stopped.take(after))


def test_mixture_states_that_do_not_fit() -> None:
    stream = mixture([1, 1], [3, 4])
    with pytest.raises(UserError, match=r"1 source\(s\) does not fit a mixture of 2"):
        stream.load_state_dict({"epoch": 0, "cursor": 0})
    with pytest.raises(UserError, match="the data was a mixture"):
        DataStream(numbered(3), 0).load_state_dict(stream.state_dict())


def mixed(tmp_path: Path) -> DataConfig:
    a, b = write(tmp_path / "a.jsonl", *rows(12)), write(tmp_path / "b.jsonl", *rows(5, start=100))
    return DataConfig.model_validate(
        {
            "source": "mixture",
            "sources": [
                {"source": "jsonl", "path": a, "eval_size": 4, "weight": 3, "instruction": "Short."},
                {"source": "jsonl", "path": b, "eval_size": 2, "on_error": "skip"},
            ],
        }
    )


def test_the_splits_of_a_mixture_are_joined_in_turns(tmp_path: Path) -> None:
    config = mixed(tmp_path)
    held_out = load_examples(config, "eval")
    assert [e.answer for e in held_out] == ["8", "103", "9", "104", "10", "11"]
    assert [e.answer for e in held_out[:3]] == ["8", "103", "9"]
    assert held_out[0].prompt == "q8\nShort."
    assert len(load_examples(config, "train")) == 8 + 3


def test_load_stream_of_a_mixture_and_of_one_source(tmp_path: Path) -> None:
    config = mixed(tmp_path)
    stream = load_stream(config, seed=5)
    drawn = stream.draw(400)
    assert {(int(e.answer) < 100, on_error) for e, on_error in drawn} == {(True, "raise"), (False, "skip")}
    assert sum(int(e.answer) < 100 for e, _ in drawn) / 400 == pytest.approx(0.75, abs=0.09)
    assert isinstance(make_stream(config.sources[0], load_examples(config.sources[0], "train"), 0), DataStream)  # type: ignore[arg-type]
    (tmp_path / "b.jsonl").unlink()
    with pytest.raises(UserError, match=r"branches\.2\.data\.sources\.1\.path: .* does not exist"):
        load_stream(config, 0, "branches.2.data")


def test_what_stands_beside_the_sources_of_a_mixture(tmp_path: Path) -> None:
    config = mixed(tmp_path).model_dump() | {"instruction": "Be short."}
    with pytest.raises(UserError, match=r"data\.instruction: of a mixture, 'instruction' stands with each"):
        load_examples(DataConfig.model_validate(config), "train")


# Prompts that cannot be encoded


@pytest.fixture(scope="module")
def encoder() -> Any:
    return load_encoder("testbed")


def damaged(tmp_path: Path, num_rows: int, bad: set[int], on_error: str) -> DataConfig:
    Image.new("RGB", (8, 8)).save(tmp_path / "ok.png")
    (tmp_path / "bad.png").write_text("no image")
    data = [row | {"images": ["bad.png" if i in bad else "ok.png"]} for i, row in enumerate(rows(num_rows))]
    return jsonl(write(tmp_path / "d.jsonl", *data, GOOD), eval_size=1, on_error=on_error)


def test_raise_stops_at_the_first(tmp_path: Path, encoder: Any) -> None:
    source = PromptSource(load_stream(damaged(tmp_path, 5, {0, 1, 2, 3, 4}, "raise"), 0), encoder, 100)
    with pytest.raises(UserError, match=r"d\.jsonl:\d: images: .*bad\.png cannot be read as an image"):
        source.take(1)


def test_skipped_prompts_are_replaced_and_counted(tmp_path: Path, encoder: Any) -> None:
    source = PromptSource(load_stream(damaged(tmp_path, 200, {77}, "skip"), 0), encoder, 100)
    prompts = source.take(199)  # an epoch without the damaged row
    assert sorted(int(p.example.answer) for p in prompts) == [i for i in range(200) if i != 77]
    assert (source.num_drawn, source.num_skipped) == (200, 1)
    state = json.loads(json.dumps(source.state_dict()))
    again = PromptSource(load_stream(damaged(tmp_path, 200, {77}, "skip"), 0), encoder, 100)
    again.load_state_dict(state)
    assert (again.num_drawn, again.num_skipped) == (200, 1)
    assert [p.example.uid for p in again.take(5)] == [p.example.uid for p in source.take(5)]
    again.load_state_dict({"epoch": 0, "cursor": 3})  # a checkpoint from before there were counts
    assert (again.num_drawn, again.num_skipped) == (0, 0)


@pytest.mark.parametrize(
    ("num_rows", "num_bad", "message"),
    [(50, 2, r"2 of \d+ prompts could not be encoded, more than 1 %"), (250, 3, r"\d of \d+ prompts could not be")],
)
def test_too_many_skipped_prompts_stop(num_rows: int, num_bad: int, message: str, tmp_path: Path, encoder: Any) -> None:
    source = PromptSource(load_stream(damaged(tmp_path, num_rows, set(range(num_bad)), "skip"), 0), encoder, 100)
    with pytest.raises(UserError, match=message):
        source.take(num_rows)


def test_one_failure_in_the_first_hundred_does_not_stop(tmp_path: Path, encoder: Any) -> None:
    for seed in range(3):
        source = PromptSource(load_stream(damaged(tmp_path, 20, {4}, "skip"), seed), encoder, 100)
        assert len(source.take(19)) == 19
        assert source.num_skipped == 1


def test_prompts_that_are_too_long(tmp_path: Path, encoder: Any) -> None:
    data = [{"prompt": "long " * 200 if i == 3 else "q", "answer": "1"} for i in range(150)]
    for on_error in ("raise", "skip"):
        config = jsonl(write(tmp_path / "d.jsonl", *data, GOOD), eval_size=1, on_error=on_error)
        source = PromptSource(load_stream(config, 0), encoder, 64)
        if on_error == "raise":
            with pytest.raises(UserError, match=r"d\.jsonl:4.* has \d+ tokens, rollout\.max_prompt_tokens is 64"):
                source.take(150)
        else:
            assert len(source.take(149)) == 149
            assert source.num_skipped == 1
