"""The metrics file: what is written is what is read, also after a kill and a resume."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from copd_engine.metrics import (
    MetricsLog,
    drop_later_steps,
    flatten_scalars,
    peak_rss_bytes,
    read_jsonl,
    read_metrics,
    step_tokens,
    system_stats,
)
from copd_engine.types import UserError


def write_steps(folder: Path, steps: range) -> Path:
    with MetricsLog(folder) as log:
        for step in steps:
            log.write({"step": step, "loss": step / 4})
    return folder / "metrics.jsonl"


def test_lines_are_on_disk_when_write_returns(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "new" / "run")
    log.write({"step": 1, "branches": {"text": {"loss": 0.25}}})
    assert read_metrics(tmp_path / "new" / "run") == [{"step": 1, "branches": {"text": {"loss": 0.25}}}]
    log.close()


def test_nan_and_infinity_become_null_at_any_depth(tmp_path: Path) -> None:
    record = {"step": 1, "a": math.nan, "b": {"c": [math.inf, -math.inf, 2.0]}, "d": np.float32("nan"), "t": (1, None)}
    with MetricsLog(tmp_path) as log:
        log.write(record)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text) == {"step": 1, "a": None, "b": {"c": [None, None, 2.0]}, "d": None, "t": [1, None]}
    assert "NaN" not in text
    assert "Infinity" not in text
    assert math.isnan(record["a"])  # type: ignore[arg-type]  # the caller's record is left alone


def test_nan_literals_of_other_writers_are_read_as_none(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": NaN, "ratio": -Infinity}\n')
    assert read_metrics(tmp_path) == [{"step": 1, "loss": None, "ratio": None}]


def test_numpy_scalars_are_written_as_numbers(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.write({"step": 1, "x": np.float32(0.5), "n": np.int64(7), "flag": True})
    assert read_metrics(tmp_path) == [{"step": 1, "x": 0.5, "n": 7, "flag": True}]


@pytest.mark.parametrize(
    ("record", "named"),
    [
        ({"step": 1, "branches": {"text": {"loss": torch.tensor(1.0)}}}, r"branches\.text\.loss: Tensor"),
        ({"step": 1, "list": [1, {2}]}, r"list\[1\]: set"),
        ({"step": 1, "d": {3: 1}}, "d: key 3"),
        ({"loss": 1.0}, "integer 'step'"),
    ],
)
def test_what_json_does_not_know_is_refused_by_name_and_not_written(
    tmp_path: Path, record: dict[str, Any], named: str
) -> None:
    with MetricsLog(tmp_path) as log:
        with pytest.raises(TypeError, match=named):
            log.write(record)
        log.write({"step": 1})
    assert read_metrics(tmp_path) == [{"step": 1}]


def test_a_fresh_log_overwrites_nothing(tmp_path: Path) -> None:
    path = write_steps(tmp_path, range(1, 3))
    before = path.read_bytes()
    with pytest.raises(UserError, match="already holds a run"):
        MetricsLog(tmp_path)
    assert path.read_bytes() == before


def test_resume_drops_later_steps_and_goes_on(tmp_path: Path) -> None:
    path = write_steps(tmp_path, range(6))
    with path.open("a") as file:
        file.write('{"step": 6, "lo')  # killed here
    with MetricsLog(tmp_path, resume_step=3) as log:
        log.write({"step": 4, "again": True})
    assert [record["step"] for record in read_metrics(tmp_path)] == [0, 1, 2, 3, 4]
    assert read_metrics(tmp_path)[-1] == {"step": 4, "again": True}
    assert list(tmp_path.iterdir()) == [path]  # nothing left aside


def test_resume_at_the_torn_line_does_not_glue_two_records(tmp_path: Path) -> None:
    path = write_steps(tmp_path, range(1, 3))
    path.write_bytes(path.read_bytes()[:-1])  # the record is complete, its newline is not
    with MetricsLog(tmp_path, resume_step=2) as log:
        log.write({"step": 3})
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3]


def test_resume_keeps_a_file_that_is_broken_in_the_middle(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: not a JSON line"):
        MetricsLog(tmp_path, resume_step=1)
    assert path.read_bytes() == before


def test_resume_without_a_file_starts_one(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, resume_step=0) as log:
        log.write({"step": 1})
    assert read_metrics(tmp_path) == [{"step": 1}]
    drop_later_steps(tmp_path / "samples.jsonl", 3)
    assert not (tmp_path / "samples.jsonl").exists()


@pytest.mark.parametrize("torn", [b'{"step": 3, "a', b"\x00\x00\x00", b'{"step": 3, "a": "\xc3', b"12\n"])
def test_a_torn_last_line_is_left_out(tmp_path: Path, torn: bytes) -> None:
    path = write_steps(tmp_path, range(1, 3))
    path.write_bytes(path.read_bytes() + torn)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]


@pytest.mark.parametrize("broken", ["{oops", "[1, 2]", '"text"'])
def test_a_broken_middle_line_is_named(tmp_path: Path, broken: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n\n{broken}\n{{"step": 2}}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:3: ") as caught:
        read_metrics(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_without_metrics_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere is not a run folder: it has no metrics\.jsonl"):
        read_metrics(tmp_path / "nowhere")


@given(cut=st.integers(min_value=0, max_value=400), keep=st.integers(min_value=0, max_value=12))
def test_a_file_cut_at_any_byte_resumes(tmp_path_factory: pytest.TempPathFactory, cut: int, keep: int) -> None:
    folder = tmp_path_factory.mktemp("cut")
    whole = "".join(json.dumps({"step": step, "x": "é" * 3}, ensure_ascii=False) + "\n" for step in range(1, 11))
    (folder / "metrics.jsonl").write_bytes(whole.encode()[:cut])
    complete = [record["step"] for record in read_metrics(folder)]
    assert complete == list(range(1, len(complete) + 1))
    with MetricsLog(folder, resume_step=keep) as log:
        log.write({"step": keep + 1})
    assert [record["step"] for record in read_metrics(folder)] == [*range(1, min(keep, len(complete)) + 1), keep + 1]


def test_scalar_names() -> None:
    record = {
        "step": 3,
        "phase": "opd",
        "branches": {"text": {"loss": 0.5, "skipped": False, "grad_norm": None}},
        "diagnostics": {"pairs": [{"student": "text", "teacher": "image", "overlap": 0.9}]},
        "system": {"gpu": [{"power_w": 300.0}]},
    }
    assert dict(flatten_scalars(record)) == {
        "step": 3.0,
        "branches/text/loss": 0.5,
        "branches/text/skipped": 0.0,
        "diagnostics/pairs/text_from_image/overlap": 0.9,
        "system/gpu/0/power_w": 300.0,
    }


def test_tensorboard_holds_the_numbers(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with MetricsLog(tmp_path, tensorboard=True) as log:
        log.write({"step": 1, "branches": {"text": {"loss": 0.5}}})
        log.write({"step": 2, "branches": {"text": {"loss": 0.25}}})
    loaded = events.EventAccumulator(str(tmp_path / "tensorboard"))
    loaded.Reload()
    assert [(s.step, s.value) for s in loaded.Scalars("branches/text/loss")] == [(1, 0.5), (2, 0.25)]


def test_a_missing_tensorboard_names_the_extra_and_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"copd-engine\[tensorboard\]"):
        MetricsLog(tmp_path / "run", tensorboard=True)
    assert not (tmp_path / "run").exists()


def test_tokens_of_a_step_are_those_packed_and_those_sampled() -> None:
    """Of the ``rollout`` there are the groups alone that were chosen to be trained on."""
    branches = {
        "text": {
            "num_packed_tokens": 100,
            "work": {"prefilled_tokens": 1000, "generated_tokens": 11},
            "rollout": {"text": {"num_rollouts": 3, "response_tokens_mean": 7 / 3}},
        },
        "image": {"num_packed_tokens": 0, "work": {"generated_tokens": 5}, "rollout": {}},
    }
    assert step_tokens(branches) == 100 + 11 + 5


def test_memory_is_that_of_this_process() -> None:
    rss, peak = system_stats()["rss_bytes"], peak_rss_bytes()
    # torch alone takes tens of MB; the peak is counted in pages now and then, so it may lag a little
    assert 20e6 < rss < 100e9
    assert peak > 0.9 * rss


def test_samples_are_cut_like_metrics(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps({"step": s, "response": "x"}) + "\n" for s in (1, 1, 2, 3)))
    drop_later_steps(path, 2)
    assert [sample["step"] for sample in read_jsonl(path)] == [1, 1, 2]
