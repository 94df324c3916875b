"""The files that benchmarks come in, which of them are read together, and what is wrong in them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from copd_engine.data.benchmarks import read_benchmark
from tests.benchmark_files import dump, dump_lines, error_of, mmmu_row, parquet, png, read


def test_folders_and_patterns(tmp_path: Path):
    for subject in ("Art", "Math"):
        parquet(tmp_path / subject / "validation-00000-of-00001.parquet", [mmmu_row(1, id=f"validation_{subject}_1")])
        parquet(tmp_path / subject / "dev-00000-of-00001.parquet", [mmmu_row(1, id=f"dev_{subject}_1")])
    found = read("mmmu", tmp_path / "*/validation-*.parquet")
    assert [example.uid for example in found] == ["validation_Art_1", "validation_Math_1"]
    for subject in ("Art", "Math"):
        parquet(tmp_path / f"subjects/{subject}.parquet", [mmmu_row(1, id=f"validation_{subject}_1")])
    assert len(read("mmmu", tmp_path / "subjects")) == 2


def test_splits_are_not_pooled(tmp_path: Path):
    """A folder as its repository has it. Shards of one split are read together."""
    for split in ("dev", "validation"):
        parquet(tmp_path / f"Art/{split}-00000-of-00001.parquet", [mmmu_row(1, id=f"{split}_Art_1")])
    error = error_of("mmmu", tmp_path / "Art")
    assert error == (
        f"mmmu: {tmp_path}/Art/dev-00000-of-00001.parquet and {tmp_path}/Art/validation-00000-of-00001.parquet look "
        "like several splits: give one of them, or each with a --data mmmu= of its own"
    )
    for split in ("train", "test"):
        dump(tmp_path / f"holmes/{split}_Video-Holmes.json", [{}])
    assert "test_Video-Holmes.json and " in error_of("video_holmes", tmp_path / "holmes")
    for year in (2024, 2025):
        dump_lines(tmp_path / f"aime_{year}.jsonl", [AIME | {"id": year}])
    assert "aime_2024.jsonl and " in error_of("aime_2024", tmp_path / "aime_*.jsonl")
    for shard, end in (("00000", ""), ("00001", "-0f3a")):
        parquet(tmp_path / f"shards/train-{shard}-of-00002{end}.parquet", [AIME | {"id": shard}])
    assert [example.uid for example in read("aime_2024", tmp_path / "shards")] == ["00000", "00001"]


def test_zerobench_is_its_subquestions(tmp_path: Path):
    row = {"question_text": "How many?", "question_images_decoded": [png(1)], "question_answer": "11"}
    main = parquet(tmp_path / "zerobench-00000-of-00001.parquet", [row | {"question_id": "1"}])
    parquet(tmp_path / "zerobench_subquestions-00000-of-00001.parquet", [row | {"question_id": "1_1"}])
    assert [example.uid for example in read("zerobench", tmp_path)] == ["1_1"]
    assert error_of("zerobench", main) == (
        f"zerobench: {main} is not of the split that ZeroBench(sub) reads: give its files *subquestions*"
    )


def test_golds_in_the_solution(tmp_path: Path):
    rows = [{"problem": "p", "solution": r"First \boxed{3}, then $\boxed{\frac{1}{2}}$."}]
    (example,) = read("minerva", dump_lines(tmp_path / "a.jsonl", rows))
    assert (example.answer, example.verifier) == (r"\frac{1}{2}", "math")
    (example,) = read("aime_2024", dump_lines(tmp_path / "b.jsonl", [{"problem": "p", "solution": r"\boxed{073}"}]))
    assert example.answer == "73"
    (example,) = read("aime_2024", dump_lines(tmp_path / "c.jsonl", [AIME | {"solution": r"\boxed{6}"}]))
    assert example.answer == "5"


def test_slices_read_the_same_rows(tmp_path: Path):
    examples = read_benchmark(
        "minerva", dump_lines(tmp_path / "a.jsonl", [{"question": f"q{i}", "answer": i} for i in range(5)])
    )
    assert [example.answer for example in examples[1:3]] == ["1", "2"]
    assert len(examples[:100]) == 5


AIME = {"id": 1, "problem": "p", "answer": "5"}
OPEN = {"id": 1, "question_type": "open-ended", "question": "", "choices": 0, "answer": "", "video": ""}
MVBENCH = {"video": "v", "question": "q", "candidates": ["x"], "answer": "x"}
WEMATH = {"ID": 1, "key": 1, "question": "q", "option": "A. x; B. y", "answer": "A", "image_path": 7}
VISTA = {"pid": 1, "question": 1, "choices": 1, "precision": 1, "image": "i.png", "question_type": "free_form"}


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        (
            "aime_2024",
            [{"problem": "p", "text": "s"}],
            "no column 'answer': aime_2024 expects problem or Problem or question, answer or Answer; "
            "found problem, text",
        ),
        ("aime_2024", [{"problem": "p", "solution": "s"}], ":1: there is no 'answer', and 'solution' has no \\boxed{}"),
        ("aime_2024", [AIME, AIME], ":2: '1' is already the name of"),
        ("aime_2024", [{**AIME, "answer": ""}], "prompt '1'"),
        ("aime_2024", [], "must be a list of rows, with at least one"),
        ("aime_2024", ["p"], "no column 'problem'"),
        ("mmvu", [OPEN], "has no rows"),
        (
            "video_holmes",
            [{"video ID": "x", "Question ID": 1, "Question": "q", "Options": {"A": "a"}, "Answer": "Z"}],
            ":1: answer = 'Z': is none of the options A",
        ),
        (
            "video_holmes",
            [{"video ID": "x", "Question ID": 1, "Question": "q", "Options": {"A": "a"}, "Answer": "A"}],
            "x.mp4 does not exist",
        ),
        ("mvbench", [MVBENCH], "no task of MVBench is called 'rows'"),
        ("wemath", [WEMATH], "an image must be"),
        ("mmmu", [mmmu_row(1, options="['a'", image_1="i.png")], "must be a Python list"),
        (
            "mathvista",
            [VISTA | {"answer": 1, "answer_type": "odd"}],
            ":1: not a row of MathVista: KeyError: 'odd'",
        ),
    ],
)
def test_errors(tmp_path: Path, name: str, rows: Any, message: str):
    path = dump(tmp_path / "rows.json", rows)
    error = error_of(name, path)
    assert message in error
    assert str(tmp_path) in error


def test_other_errors(tmp_path: Path):
    assert error_of("aime_2026", "x").startswith("unknown benchmark 'aime_2026' (did you mean 'aime_202")
    assert error_of("mmmu", tmp_path / "no.parquet") == f"mmmu: {tmp_path}/no.parquet does not exist"
    assert error_of("mmmu", tmp_path) == f"mmmu: {tmp_path} holds no data files"
    (tmp_path / "a.json").write_text("{")
    assert re.match(r"mmmu: .*a\.json cannot be read: Expecting", error_of("mmmu", tmp_path / "a.json"))
    (tmp_path / "a.txt").write_text("x")
    assert "the name must end in .parquet, .jsonl, .json, .tsv" in error_of("mmmu", tmp_path / "a.txt")
