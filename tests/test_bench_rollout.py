"""The rollout benchmark at toy size: it measures what it says. No time is asserted.

sglang starts once, for everything but the slow test: what each part of the benchmark starts is the same engine.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench_rollout, rollout_engines, rollout_steps, rollout_swaps
from benchmarks.bench_rollout import Settings, run
from benchmarks.rollout_engines import ending_with, prompts_of
from benchmarks.rollout_tables import render
from copd_engine.rollout.base import Sampling
from copd_engine.rollout.embedded import EmbeddedEngine
from copd_engine.rollout.sglang_engine import SglangEngine
from copd_engine.testbed.model import untrained
from copd_engine.types import RolloutRequest

needs_sglang = pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="sglang is not installed")
SMALL_STEP = ("rollout.prompts_per_step=2", "rollout.group_size=2", "rollout.max_running=16")
TOY = Settings(
    repeats=1,
    sequences=(1, 3),
    new_tokens=4,
    num_requests=8,
    group_size=4,
    max_running=8,
    limit=24,
    end_probability=0.2,
    caches=((1024, ("embedded", "sglang")), (112, ("embedded",))),
    swap_models=((64, 4),),
    swap_repeats=1,
    step_engines=("embedded",),
    steps_per_phase=1,
    step_changes=SMALL_STEP,
)


@pytest.fixture
def one_sglang(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[SglangEngine]]:
    started: list[SglangEngine] = []
    start = rollout_engines.start_sglang

    def shared(*args: Any) -> SglangEngine:
        if not started:
            started.append(start(*args))
        started[0]._labels.clear()  # weights of another model under the same name
        return started[0]

    for module in (rollout_engines, rollout_swaps):
        monkeypatch.setattr(module, "start_sglang", shared)
    close = SglangEngine.close
    monkeypatch.setattr(SglangEngine, "close", lambda engine: None)
    yield started
    for engine in started:
        close(engine)


@needs_sglang
@pytest.mark.timeout(600)
@pytest.mark.xdist_group("sglang")
def test_counts_and_tables(one_sglang: list[SglangEngine]) -> None:
    record = run(TOY) | {"command": "x", "threads": 1}
    assert len(one_sglang) == 1
    together = {(row["sequences"], row["engine"]): row["tokens"] for row in record["together"]}
    # nobody ends early
    assert together == {(1, "embedded"): 4, (1, "sglang"): 4, (3, "embedded"): 12, (3, "sglang"): 12}
    large, theirs, small = record["mixed"]
    assert large["tokens"] == small["tokens"]
    assert 8 <= theirs["tokens"] <= 8 * 24
    assert [row["counts"]["num_rollouts"] for row in record["mixed"]] == [8, 8, 8]
    assert small["counts"]["cached_tokens"] <= 112 < large["counts"]["cached_tokens"]
    check_swaps(record["swaps"])
    check_steps(record["steps"], {"embedded"})
    text = render(record)
    assert "| 1,024 | embedded |" in text
    assert f"| {large['tokens'] / 8:.0f} |" in text
    assert "say nothing about a GPU" in text
    assert "mJ per token" not in text


def check_swaps(rows: list[dict[str, Any]]) -> None:
    (row,) = rows
    policy, _ = untrained(0)
    size = sum(tensor.nbytes for tensor in policy.named_parameters().values())
    assert row["parameters"] * 4 == size
    assert size <= row["bytes"] < 1.1 * size
    assert len(row["rounds"]) == 2
    for number in row["rounds"]:
        assert number["swap_s"] == pytest.approx(sum(number["parts"].values()))
        assert all(seconds > 0 for seconds in number["parts"].values())
        assert number["disk_s"] > 0
        assert number["save_s"] > 0


def check_steps(rows: list[dict[str, Any]], engines: set[str]) -> None:
    assert {(row["phase"], row["engine"]) for row in rows} == {(p, e) for p in ("rl", "opd") for e in engines}
    for row in rows:
        (step,) = row["steps"]
        assert step["total"] == pytest.approx(sum(step.values()) - step["total"])
        assert all(seconds >= 0 for seconds in step.values())
        assert (step["teacher"] > 0) == (row["phase"] == "opd")
        assert step["rollout"] > 0
        if row["engine"] == "sglang":
            assert step["sync"] > 0


@needs_sglang
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.xdist_group("sglang")
def test_swaps_are_taken_out_of_sglangs_rollouts() -> None:
    engines = ("embedded", "sglang")
    check_steps(rollout_steps.steps(engines, 1, SMALL_STEP, "cpu"), set(engines))


def test_a_swap_in_the_metrics_is_a_sync() -> None:
    record = {
        "time_s": {"rollout": 5.0, "verify": 0.5, "teacher": 1.0, "update": 2.0, "sync": 0.25, "diagnostics": 3.0},
        "step_s": 13.0,
        "rollout_engine": {"swap_s": 1.5},
    }
    expected = {"rollout": 3.5, "sync": 1.75, "teacher": 1.0, "verify": 0.5, "update": 2.0}
    assert rollout_steps._seconds(record) == expected | {rollout_steps.OTHER: 1.25, "total": 10.0}


def test_other_weights_after_an_update_from_disk_are_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Engine:
        sync = _place = lambda *args: None

        def stats(self) -> dict[str, float]:
            return {"swap_bytes": 8, "swap_s": 1.0}

    class Host:
        def call(self, *args: Any) -> None: ...

    held = iter([[{"sums": {"a": 1}}], [{"sums": {"a": 2}}]])
    monkeypatch.setattr(rollout_swaps, "_held", lambda *args: next(held))
    policy, _ = untrained(0)
    with pytest.raises(RuntimeError, match="left different weights"):
        rollout_swaps._round(Engine(), rollout_swaps.TimedHost(Host()), policy, tmp_path, 0)


def test_ratios_are_of_rounds() -> None:
    rounds = [{"swap_s": s, "disk_s": d, "save_s": 1.0} for s, d in ((1.0, 20.0), (2.0, 6.0), (4.0, 16.0))]
    assert rollout_swaps.times_faster({"rounds": rounds}, "disk_s") == 4.0  # of 20, 3 and 4
    assert rollout_swaps.times_faster({"rounds": rounds}, "save_s", "disk_s") == 4.25


def test_without_sglang_the_tables_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    record = run(TOY) | {"command": "x", "threads": 1}
    text = render(record)
    assert "| - | sglang | not installed | - |" in text
    assert text.count("sglang is not installed: no figures of it") == 2  # in the head, and in place of the swaps
    assert {row["engine"] for row in record["together"]} == {"embedded"}
    assert "say nothing about a GPU" not in text


def test_energy_has_a_column_where_a_gpu_counts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Meter:
        """2 J in each block."""

        __enter__ = __exit__ = lambda *args: None

        def energy_j(self) -> float:
            return 2.0

    monkeypatch.setattr(bench_rollout, "GpuMeter", Meter)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    policy, encoder = untrained(0)
    rows = bench_rollout.together(dataclasses.replace(TOY, sequences=(1,)), policy, encoder)
    assert rows[0]["energy_per_token_j"] == 0.5


def test_one_in_twenty_reaches_the_limit() -> None:
    policy, encoder = untrained(0)
    policy = ending_with(policy, encoder, 1 / 17)  # a tenth of the benchmark's lengths
    prompts = prompts_of(encoder, 6)
    requests = [RolloutRequest(prompts[i % 6], seed=i, group=0) for i in range(400)]
    rollouts = EmbeddedEngine({"e": policy}, encoder).generate("e", requests, Sampling(1.0, 51))
    assert 0.01 < sum(rollout.finish_reason == "length" for rollout in rollouts) / 400 < 0.12
    assert 10 < sum(rollout.num_tokens for rollout in rollouts) / 400 < 24
    tokens = torch.cat([rollout.response_ids_N for rollout in rollouts])
    assert len(tokens.unique()) > 300  # the rest of the vocabulary is drawn as before
