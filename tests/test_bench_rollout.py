"""The rollout benchmark at toy size: it measures what it says. No time is asserted."""

from __future__ import annotations

from benchmarks.bench_rollout import Settings, ending_with, prompts_of, render, run
from copd_engine.rollout.base import Sampling
from copd_engine.rollout.embedded import EmbeddedEngine
from copd_engine.testbed.model import untrained
from copd_engine.types import RolloutRequest

TOY = Settings(
    repeats=1,
    sequences=(1, 3),
    new_tokens=4,
    num_requests=8,
    group_size=4,
    max_running=8,
    limit=24,
    end_probability=0.2,
    caches=(1024, 112),
)


def test_counts_and_tables():
    record = run(TOY) | {"command": "x", "threads": 1}
    assert [row["tokens"] for row in record["together"]] == [4, 12]  # nobody ends early
    large, small = record["mixed"]
    assert large["tokens"] == small["tokens"]
    assert large["counts"]["num_rollouts"] == 8
    assert small["counts"]["cached_tokens"] <= 112 < large["counts"]["cached_tokens"]
    text = render(record)
    assert "| 1,024 | embedded |" in text
    assert f"| {large['tokens'] / 8:.0f} |" in text


def test_one_in_twenty_reaches_the_limit():
    policy, encoder = untrained(0)
    policy = ending_with(policy, encoder, 1 / 17)  # a tenth of the benchmark's lengths
    prompts = prompts_of(encoder, 6)
    requests = [RolloutRequest(prompts[i % 6], seed=i, group=0) for i in range(400)]
    rollouts = EmbeddedEngine({"e": policy}, encoder).generate("e", requests, Sampling(1.0, 51))
    assert 0.01 < sum(rollout.finish_reason == "length" for rollout in rollouts) / 400 < 0.12
    assert 10 < sum(rollout.num_tokens for rollout in rollouts) / 400 < 24
