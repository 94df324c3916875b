"""``copd data check``: counts, lengths, the rows that fail with line and reason, exit codes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner, Result

from copd_engine.cli import app
from copd_engine.config import MediaConfig, SourceConfig
from copd_engine.data_check import Report, check, check_file
from copd_engine.models.processor import load_encoder
from copd_engine.types import UserError
from tests.data_files import GOOD, write
from tests.video_files import write_video


@pytest.fixture
def data(tmp_path: Path) -> Path:
    Image.new("RGB", (32, 16)).save(tmp_path / "ok.png")
    good = (tmp_path / "ok.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(good[: len(good) // 2])
    write_video(tmp_path / "ok.mp4", 60)
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "ok.mp4").read_bytes()[:1000])
    return write(
        tmp_path / "d.jsonl",
        {"prompt": "abcd", "answer": "1"},
        {"prompt": "abcdefgh", "answer": "1", "images": ["ok.png"], "verifier": "numeric"},
        "not json",
        "",
        {"prompt": "<video>", "answer": "1", "videos": ["ok.mp4"]},
        {"prompt": "a", "answer": "1", "images": ["cut.png"]},
        {"prompt": "a", "answer": "1", "videos": ["cut.mp4"]},
        {"prompt": "a", "answer": "1", "images": ["ok.png"], "videos": ["ok.mp4"], "uid": "twice"},
        {"prompt": "a", "answer": "1", "uid": "twice"},
    )


FAILING = {
    3: r"not JSON: ",
    6: r"images: .*cut\.png cannot be read as an image",
    7: r"videos: .*cut\.mp4 (cannot be read as a video|holds no)",
    9: r"uid 'twice' is already that of line 8",
}


def assert_failures(report: Report, data: Path, expected: dict[int, str]) -> None:
    assert len(report.failures) == len(expected), report.failures
    for line, (number, reason) in zip(report.failures, sorted(expected.items()), strict=True):
        assert re.match(rf"{re.escape(str(data))}:{number}: {reason}", line), line


def test_characters_without_a_model(data: Path) -> None:
    report = check(data, None, [], None)
    assert_failures(report, data, FAILING)
    assert report.num_rows == 8
    assert sorted(report.lengths) == [1, 1, 4, 7, 8]
    assert report.modalities == {"text": 2, "image": 1, "video": 1, "image+video": 1}
    assert report.verifiers == {"exact": 4, "numeric": 1}
    lines = report.text().splitlines()
    assert lines[0] == f"{data}: 8 rows, 4 fail"
    assert "characters of a prompt: min 1, median 4, 95 % 7, max 8" in lines
    assert [line.split() for line in lines if "#" in line] == [
        ["0", "-", "1", "#" * 40, "2"],
        ["4", "-", "7", "#" * 40, "2"],
        ["8", "-", "15", "#" * 20, "1"],
    ]


def test_tokens_with_a_model(data: Path) -> None:
    encoder = load_encoder("testbed")
    report = check_file(data, SourceConfig(source="jsonl", path=data), MediaConfig(), encoder)
    assert_failures(report, data, FAILING)
    # One token per 8 x 8 pixels: 32 x 16 are 8; 4 frames of 64 x 48 are 2 x 48, with times and vision tokens around.
    text = len(encoder.tokenizer("<|im_start|>user\nabcdefgh<|im_end|>\n<|im_start|>assistant\n")["input_ids"])
    assert report.lengths[1] == text + 8 + 2
    assert report.unit == "tokens"
    limited = check_file(data, SourceConfig(source="jsonl", path=data), MediaConfig(), encoder, max_tokens=100)
    too_long = r"prompt .* has \d+ tokens, rollout\.max_prompt_tokens is 100"
    once = {number: reason for number, reason in FAILING.items() if number != 9}  # the first of the two has gone
    assert_failures(limited, data, once | {5: too_long, 8: too_long})


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, ["data", "check", *map(str, arguments)])


def test_the_command(data: Path, tmp_path: Path) -> None:
    bad = run(data)
    assert bad.exit_code == 1
    assert f"{data}:3: not JSON" in bad.output
    good = run(write(tmp_path / "good.jsonl", GOOD, GOOD), "--model", "testbed")
    assert good.exit_code == 0
    assert "2 rows, 0 fail" in good.output
    assert "tokens of a prompt" in good.output
    mapped = write(tmp_path / "m.jsonl", {"q": "a", "s": {"t": 1}, "x": 0})
    assert run(mapped).exit_code == 1
    assert run(mapped, "--columns", "prompt=q,answer=s.t").exit_code == 0
    assert run(mapped, "--columns", "prompt=q", "--columns", "answer=s.t").exit_code == 0


def test_the_command_with_a_config(tmp_path: Path) -> None:
    data = write(tmp_path / "d.jsonl", {"q": "a", "a": 1, "rate": 0.5}, {"q": "word " * 50, "a": 1, "rate": 1})
    source = {
        "source": "jsonl",
        "path": str(data),
        "columns": {"prompt": "q", "answer": "a", "pass_rate": "rate"},
        "pass_rate": [0, 0.9],
        "verifier": "numeric",
    }
    config = {
        "branches": [{"name": "a", "data": {"source": "mixture", "sources": [source]}}],
        "rollout": {"max_prompt_tokens": 100},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    ended = run(data, "--config", tmp_path / "c.yaml")
    assert ended.exit_code == 1
    assert "outside of pass_rate: 1" in ended.output
    assert "verifier: numeric 1" in ended.output
    assert "tokens, rollout.max_prompt_tokens is 100" in ended.output
    other = write(tmp_path / "other.jsonl", GOOD)
    ended = run(other, "--config", tmp_path / "c.yaml")
    assert isinstance(ended.exception, UserError)
    assert "no source of it reads" in str(ended.exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone.jsonl"], r"gone\.jsonl does not exist"),
        (["d.jsonl", "--columns", "prompt"], r"--columns 'prompt': must look like ours=theirs"),
        (["d.jsonl", "--columns", "promt=q"], r"unknown field 'promt' \(did you mean 'prompt'\?\)"),
        (["d.jsonl", "--model", "gone"], r"model\.path = 'gone': no such folder"),
        (["d.jsonl", "--config", "gone.yaml"], r"config gone\.yaml does not exist"),
    ],
)
def test_arguments_that_do_not_fit(
    arguments: list[str], message: str, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(data.parent)
    ended = run(*arguments)
    assert isinstance(ended.exception, UserError)
    with pytest.raises(UserError, match=message):
        raise ended.exception


def test_parquet_and_long_lines(tmp_path: Path) -> None:
    rows = [{"prompt": "x" * (i % 100 + 1), "answer": "1"} for i in range(300)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    report = check(tmp_path / "d.parquet", None, [], None)
    assert (report.num_rows, report.failures) == (300, [])
    assert json.dumps(sorted(report.lengths)) == json.dumps(sorted(len(row["prompt"]) for row in rows))
