"""Validation prompts share nothing with what is trained on or with what the tables use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from copd_engine.config import DataConfig, build_config
from copd_engine.data import load_examples
from copd_engine.inputs import held_out_prompts
from copd_engine.testbed.tasks import DOMAINS
from copd_engine.types import UserError
from copd_engine.validation import is_validation, table_examples, validation_examples
from tests.helpers import tiny_model


def write(file: Path, num_rows: int) -> Path:
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1), "uid": f"row-{i}"} for i in range(num_rows)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def uids(examples: Any) -> set[str]:
    return {example.uid for example in examples}


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_testbeds_are_other_problems(domain):
    data = DataConfig(domain=domain, size=500, eval_size=200)
    validation = validation_examples(data, 150, "data")
    assert len(uids(validation)) == 150
    assert not uids(validation) & uids(load_examples(data, "train"))
    assert not uids(validation) & uids(load_examples(data, "eval"))
    assert uids(validation) == uids(validation_examples(data, 150, "data"))
    assert uids(table_examples(data, "data")) == uids(load_examples(data, "eval"))


def test_reasoning_gyms_are_other_questions():
    pytest.importorskip("reasoning_gym")
    # A task of few questions, so that splits drawn apart would meet.
    config = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    data = DataConfig(source="reasoning_gym", task="basic_arithmetic", task_config=config, size=100, eval_size=20)
    found = {example.prompt for example in validation_examples(data, 20, "data")}
    assert len(found) == 20
    for split in ("train", "eval"):
        assert not found & {example.prompt for example in load_examples(data, split)}


def test_files_are_halved_by_the_hash_of_the_uid(tmp_path):
    data = DataConfig(source="jsonl", path=write(tmp_path / "a.jsonl", 300), eval_size=200)
    validation, tested = uids(validation_examples(data, 1, "data")), uids(table_examples(data, "data"))
    assert validation | tested == uids(load_examples(data, "eval"))
    assert not validation & tested
    assert 70 < len(validation) < 130
    assert all(map(is_validation, validation))
    assert not any(map(is_validation, tested))
    # By the row itself: it stays where it is when others come or go.
    fewer = data.model_copy(update={"eval_size": 50})
    assert uids(validation_examples(fewer, 1, "data")) <= validation


def test_mixtures_are_split_source_by_source(tmp_path):
    file = {"source": "jsonl", "path": str(write(tmp_path / "a.jsonl", 40)), "eval_size": 20}
    data = DataConfig.model_validate({"source": "mixture", "sources": [file, {"domain": "text", "eval_size": 20}]})
    validation, tested = uids(validation_examples(data, 20, "data")), uids(table_examples(data, "data"))
    assert not validation & tested
    assert not validation & uids(load_examples(data, "train"))
    for part in (validation, tested):
        assert {uid.partition("-")[0] for uid in part} == {"row", "text"}


def test_a_half_without_rows(tmp_path):
    data = DataConfig(source="jsonl", path=write(tmp_path / "a.jsonl", 2), eval_size=1)
    wrong = table_examples if is_validation("row-1") else lambda data, where: validation_examples(data, 1, where)
    with pytest.raises(UserError, match=r"branches.0.data: none of the 1 held-out rows is left for"):
        wrong(data, "branches.0.data")


def test_the_tables_leave_them_out_where_the_merge_is_searched(tmp_path):
    encoder = tiny_model()[1]
    branch = {"name": "a", "data": {"source": "jsonl", "path": str(write(tmp_path / "a.jsonl", 40)), "eval_size": 20}}

    def shown(method: str) -> set[str]:
        config = build_config({"branches": [branch], "merge": {"method": method}})
        return {prompt.example.uid for prompt in held_out_prompts(config, 0, encoder, 20)}

    assert len(shown("mean")) == 20
    assert shown("search") == {uid for uid in shown("mean") if not is_validation(uid)}
