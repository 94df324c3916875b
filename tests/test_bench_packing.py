"""The packing benchmark at toy size: its peers compute the same, and what it counts is right. No time is asserted."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks import bench_packing
from benchmarks.bench_packing import PEERS, Settings, steps_of
from benchmarks.packing_problem import Lengths, build_model, padded_efficiency, samples, workload
from benchmarks.packing_tables import render

TOY = Settings(
    num_samples=256,
    max_tokens=32_768,
    ranks=(1, 2),
    partition_samples=(64,),
    efficiency_prompts=24,
    hidden=64,
    layers=2,
    step_prompts=3,
    step_group=2,
    lengths=Lengths(median=10, sigma=0.9, limit=64, prompt_median=8),
    repeats=2,
    long_tokens=512,
    models=("text",),
)


@pytest.fixture
def no_children(monkeypatch):
    """In this process: a child would import torch again."""
    monkeypatch.setattr(bench_packing, "_in_child", lambda call, *arguments: call(*arguments))


@pytest.mark.parametrize("name", ["text", "mixed"])
def test_all_peers_compute_the_same_loss(name):
    model = build_model(name, 64, 2)
    rows = samples(model, TOY.lengths, 3, 2, seed=0)
    assert {row.prompt.pixel_values is not None for row in rows} == ({False, True} if name == "mixed" else {False})
    losses = [step() for step in steps_of(model, rows).values()]
    assert len(losses) == len(PEERS)
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    assert losses[0] > 0


def test_the_lengths_are_those_that_it_says():
    generator = np.random.default_rng(0)
    lengths = Lengths(median=300, sigma=0.5, limit=4000).responses(generator, 20_000)
    below = lengths[lengths < 4000]
    assert abs(1 - len(below) / len(lengths) - 0.05) < 0.005
    assert abs(np.median(below) - 300) < 10
    assert abs(np.log(below).std() - 0.5) < 0.02


def test_counts_by_hand():
    counted = bench_packing._padded(np.array([3, 5, 4, 1]), 10)
    # 2 x 5, then 2 x 4.
    assert counted == {
        "forwards": 2,
        "needed": 13,
        "computed": 18,
        "pairs_needed": 6 + 15 + 10 + 1,
        "pairs_computed": 82,
    }
    load = workload(TOY.lengths, 3, 2)
    counted = bench_packing._packed(load, 10**6, 128)
    assert counted["needed"] == int(load.prompt_rows_P.sum() + load.response_rows_B.sum())
    assert counted["computed"] == -(-counted["needed"] // 128) * 128
    split = bench_packing._packed(load, 1)
    assert split["forwards"] == 6
    assert split["computed"] == counted["needed"] + int(load.prompt_rows_P.sum())  # every prompt twice
    model = build_model("text", 64, 1)
    rows = samples(model, TOY.lengths, 1, 2, seed=0)
    lengths = [row.prompt.num_tokens + len(row.response_N) for row in rows]
    assert padded_efficiency(rows) == sum(lengths) / (2 * max(lengths))


@pytest.mark.usefixtures("no_children")
def test_it_runs_and_renders_at_toy_size():
    record = bench_packing.run(TOY)
    for row in record["efficiency"]["rows"]:
        if row["way"].startswith("packed"):
            assert row["needed"] / row["computed"] >= 0.98
            assert 0.8 < row["pairs_needed"] / row["pairs_computed"] <= 1
    (step,) = record["steps"]
    assert 0.43 <= step["efficiency"] <= 0.47
    assert all(len(seconds) == 2 for seconds in step["seconds"].values())
    text = render({**record, "command": "python -m benchmarks.bench_packing", "threads": torch.get_num_threads()})
    for title in ("Bounds", "Token efficiency", "Forward and backward", "Planning", "Karmarkar-Karp", "Long rows"):
        assert title in text
    assert all(peer in text for peer in PEERS)
