"""Loading examples: files, splits, generated questions."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from copd_engine.config import DataConfig
from copd_engine.data import load_examples
from copd_engine.types import UserError
from copd_engine.verifiers import get_verifier
from tests.data_files import GOOD, jsonl, rows, write

# Files and splits


@pytest.mark.parametrize("split", ["train", "eval"])
def test_bad_files(split: Any, tmp_path: Path) -> None:
    def fails(config: DataConfig, message: str) -> None:
        with pytest.raises(UserError, match=message):
            load_examples(config, split, where="branches.1.data")

    fails(jsonl(tmp_path / "gone.jsonl"), r"branches\.1\.data\.path: .*gone\.jsonl does not exist")
    fails(jsonl(tmp_path), r"branches\.1\.data\.path: .* does not exist")
    fails(jsonl(write(tmp_path / "empty.jsonl", "", "  ")), r"branches\.1\.data\.path: .*empty\.jsonl is empty")
    fails(jsonl(write(tmp_path / "one.jsonl", GOOD)), r"one\.jsonl has 1 row")
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é", "answer": 1}'.encode("latin-1"))
    fails(jsonl(tmp_path / "latin.jsonl"), r"latin\.jsonl:1: not UTF-8 text \(byte 12")
    good = write(tmp_path / "good.jsonl", *rows(3))
    fails(jsonl(good, eval_path=good), r"branches\.1\.data\.eval_path: .*good\.jsonl is the training file")
    fails(jsonl(write(tmp_path / "array.jsonl", "[", "{}", "]")), r"data\.path: .*array\.jsonl is one JSON array")
    fails(jsonl(write(tmp_path / "array.jsonl", '[{"prompt": "q"}]')), r"array\.jsonl is one JSON array")
    fails(jsonl(good, verifier="exakt"), r"branches\.1\.data\.verifier: unknown verifier 'exakt'")


def test_bad_eval_path(tmp_path: Path) -> None:
    good = write(tmp_path / "good.jsonl", *rows(1))
    config = jsonl(good, eval_path=tmp_path / "gone.jsonl")
    assert len(load_examples(config, "train")) == 1
    with pytest.raises(UserError, match=r"data\.eval_path: .*gone\.jsonl does not exist"):
        load_examples(config, "eval")


@given(num_rows=st.integers(2, 30), eval_size=st.integers(1, 40))
def test_held_out_rows(num_rows: int, eval_size: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = write(tmp_path_factory.mktemp("held") / "d.jsonl", *rows(num_rows))
    train = [example.prompt for example in load_examples(jsonl(path, eval_size=eval_size), "train")]
    held_out = [example.prompt for example in load_examples(jsonl(path, eval_size=eval_size), "eval")]
    assert train + held_out == [f"q{i}" for i in range(num_rows)]
    assert len(held_out) == (eval_size if eval_size < num_rows else num_rows // 2)


def test_eval_path_leaves_all_rows_to_train(tmp_path: Path) -> None:
    config = jsonl(
        write(tmp_path / "a.jsonl", *rows(5)), eval_path=write(tmp_path / "b.jsonl", *rows(2, start=5)), eval_size=1
    )
    assert [example.answer for example in load_examples(config, "train")] == list("01234")
    assert [example.answer for example in load_examples(config, "eval")] == list("56")


# reasoning-gym


def gym(task: str, **options: Any) -> DataConfig:
    pytest.importorskip("reasoning_gym")
    return DataConfig(source="reasoning_gym", task=task, **options)


@pytest.mark.parametrize(
    ("task", "task_config"), [("chain_sum", {"max_terms": 3}), ("letter_counting", {"max_words": 6}), ("gcd", {})]
)
def test_reasoning_gym_task(task: str, task_config: dict[str, Any]) -> None:
    config = gym(task, task_config=task_config, size=60, eval_size=30, instruction="Reply with the number only.")
    train, held_out = load_examples(config, "train"), load_examples(config, "eval")
    assert len(train) == 60
    assert len(held_out) == 30
    assert not {e.prompt for e in train} & {e.prompt for e in held_out}
    assert len({e.uid for e in [*train, *held_out]}) == 90
    assert load_examples(config, "train") == train
    assert load_examples(config, "eval") == held_out
    for example in [*train[:10], *held_out[:10]]:
        assert example.prompt.endswith("\nReply with the number only.")
        verify = get_verifier(example.verifier)
        assert verify(example.answer, example) == 1.0
        assert verify(f"{example.answer}1", example) == 0.0


def test_reasoning_gym_seeds_differ_and_do_not_shift() -> None:
    first, second = (load_examples(gym("gcd", size=40, seed=seed), "train") for seed in (0, 10**6))
    assert not {e.prompt for e in first} & {e.prompt for e in second}


def test_reasoning_gym_small_task_keeps_the_splits_apart() -> None:
    tiny = {"min_terms": 2, "max_terms": 2, "max_digits": 1}  # some 200 different questions
    config = gym("chain_sum", task_config=tiny, size=100, eval_size=400)
    train, held_out = load_examples(config, "train"), load_examples(config, "eval")
    prompts = [e.prompt for e in held_out]
    assert 0 < len(prompts) < 200
    assert max(Counter(prompts).values()) == 1
    assert not {e.prompt for e in train} & set(prompts)
    with pytest.raises(UserError, match=r"branches\.0\.data: none of 40 held-out questions of task 'chain_sum'"):
        load_examples(gym("chain_sum", task_config=tiny, size=5000, eval_size=10), "eval")


def test_reasoning_gym_config_verifier() -> None:
    (example,) = load_examples(gym("chain_sum", size=1, verifier="math"), "train")
    assert example.verifier == "math"
    assert get_verifier("math")(f"The final answer is {example.answer}.", example) == 1.0


@pytest.mark.parametrize(
    ("task", "task_config", "message"),
    [
        ("chain_sm", {}, r"data\.task: reasoning-gym has no task 'chain_sm' \(did you mean 'chain_sum'\?\)"),
        ("chain_sum", {"max_term": 3}, r"data\.task_config: .*no option 'max_term' \(did you mean 'max_terms'\?\)"),
        ("chain_sum", {"seed": 3}, r"data\.task_config: .*no option 'seed'"),
        ("chain_sum", {"min_terms": 9}, r"data\.task_config: task 'chain_sum' refuses it: max_terms must be"),
        ("chain_sum", {"min_terms": "a"}, r"data\.task_config: task 'chain_sum' refuses it: "),
    ],
)
def test_reasoning_gym_errors(task: str, task_config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_examples(gym(task, task_config=task_config, size=5), "train")


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    with pytest.raises(UserError, match=r"data\.source: 'reasoning_gym' needs .* install the extra 'llm'"):
        load_examples(DataConfig(source="reasoning_gym", task="gcd"), "train")


# Testbed


def test_testbed_source() -> None:
    config = DataConfig(domain="text", size=20, eval_size=10)
    train, held_out = load_examples(config, "train"), load_examples(config, "eval")
    assert (len(train), len(held_out)) == (20, 10)
    assert not {e.prompt for e in train} & {e.prompt for e in held_out}
    assert {e.verifier for e in train} == {"answer_after_hash"}
    assert load_examples(DataConfig(domain="text", size=1, verifier="exact"), "train")[0].verifier == "exact"
    with pytest.raises(UserError, match=r"branches\.2\.data\.domain: .*'txt'"):
        load_examples(DataConfig(domain="txt"), "train", where="branches.2.data")
