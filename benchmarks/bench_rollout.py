"""Tokens per second of the rollout engines on the testbed's model.

``python -m benchmarks.bench_rollout`` samples with every engine of :data:`ENGINES` side by side, in turns:

- 1, 16 and 64 sequences that start together, all from different prompts of text, image and video;
- 256 requests in groups of 8 whose lengths differ as they do in training (about one in fifteen reaches the limit of 512
  tokens), 64 at a time, with a key/value cache that holds them all and with smaller ones.

Weights are random, so that a response ends by chance alone. No time is a test's pass or fail.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.command import main_of
from benchmarks.measure import MIB
from benchmarks.packing_tables import table
from copd_engine import run_folder
from copd_engine.models.base import Policy, PromptEncoder
from copd_engine.rollout.base import RolloutEngine, Sampling
from copd_engine.rollout.embedded import EmbeddedEngine
from copd_engine.testbed.model import untrained
from copd_engine.testbed.tasks import DOMAINS, testbed_examples
from copd_engine.types import EncodedPrompt, RolloutRequest

EXPERT = "expert"
Build = Callable[[Policy, PromptEncoder, int, int], RolloutEngine]


def _embedded(policy: Policy, encoder: PromptEncoder, max_running: int, max_cached_tokens: int) -> RolloutEngine:
    return EmbeddedEngine({EXPERT: policy}, encoder, max_running, max_cached_tokens)


#: Name -> how to build it for a policy, a number of sequences at a time and a size of the cache.
ENGINES: dict[str, Build] = {"embedded": _embedded}


@dataclass(frozen=True)
class Settings:
    """``end_probability``: of ending at each token, which makes lengths nearly geometric."""

    repeats: int = 7
    sequences: tuple[int, ...] = (1, 16, 64)
    new_tokens: int = 64
    num_requests: int = 256
    group_size: int = 8
    max_running: int = 64
    limit: int = 512
    end_probability: float = 1 / 170
    caches: tuple[int, ...] = (262_144, 4096, 2048)


def main(arguments: Sequence[str] | None = None) -> None:
    main_of(
        "bench_rollout", __doc__, Settings.repeats, lambda repeats: run(Settings(repeats=repeats)), render, arguments
    )


def run(settings: Settings) -> dict[str, Any]:
    """All figures, for :func:`render`."""
    policy, encoder = untrained(0)
    return {
        "date": run_folder.today(),
        "machine": run_folder.machine(),
        "versions": run_folder.versions(),
        "load": os.getloadavg()[1],
        "settings": settings.__dict__,
        "together": together(settings, policy, encoder),
        "mixed": mixed(settings, policy, encoder),
    }


def together(settings: Settings, policy: Policy, encoder: PromptEncoder) -> list[dict[str, Any]]:
    """A row per number of sequences and engine; nobody ends before the last token."""
    endless = ending_with(policy, encoder, 0.0)
    prompts = prompts_of(encoder, max(settings.sequences))
    rows = []
    engines = {name: build(endless, encoder, max(settings.sequences), 262_144) for name, build in ENGINES.items()}
    for count in settings.sequences:
        requests = [RolloutRequest(prompts[i], seed=i, group=i) for i in range(count)]
        rows += _timed(engines, requests, Sampling(1.0, settings.new_tokens), settings.repeats, sequences=count)
    for engine in engines.values():
        engine.close()
    return rows


def mixed(settings: Settings, policy: Policy, encoder: PromptEncoder) -> list[dict[str, Any]]:
    """A row per size of the cache and engine."""
    policy = ending_with(policy, encoder, settings.end_probability)
    num_groups = settings.num_requests // settings.group_size
    prompts = prompts_of(encoder, num_groups)
    requests = [
        RolloutRequest(prompt, seed=group * settings.group_size + member, group=group)
        for group, prompt in enumerate(prompts)
        for member in range(settings.group_size)
    ]
    rows = []
    for cache in settings.caches:
        engines = {name: build(policy, encoder, settings.max_running, cache) for name, build in ENGINES.items()}
        sampling = Sampling(1.0, settings.limit)
        rows += _timed(engines, requests, sampling, max(1, settings.repeats // 2), cache=cache)
        for engine in engines.values():
            engine.close()
    return rows


def _timed(
    engines: dict[str, RolloutEngine],
    requests: Sequence[RolloutRequest],
    sampling: Sampling,
    repeats: int,
    **labels: int,
) -> list[dict[str, Any]]:
    """Every engine in turn, after a warm-up; wall-clock seconds of each round, and the counts of the last one."""
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    tokens: dict[str, int] = {}
    counts: dict[str, dict[str, float]] = {}
    at_limit: dict[str, float] = {}
    for number in range(repeats + 1):
        for name, engine in engines.items():
            engine.stats()
            begin = time.perf_counter()
            rollouts = engine.generate(EXPERT, requests, sampling)
            if number > 0:
                seconds[name].append(time.perf_counter() - begin)
            tokens[name] = sum(rollout.num_tokens for rollout in rollouts)
            at_limit[name] = sum(rollout.finish_reason == "length" for rollout in rollouts) / len(rollouts)
            counts[name] = engine.stats()
    return [
        {
            **labels,
            "engine": name,
            "seconds": seconds[name],
            "tokens": tokens[name],
            "at_limit": at_limit[name],
            "counts": counts[name],
        }
        for name in engines
    ]


def prompts_of(encoder: PromptEncoder, count: int) -> list[EncodedPrompt]:
    """Text, image and video in turn."""
    rows = [testbed_examples(domain, "train", -(-count // len(DOMAINS)), 0) for domain in DOMAINS]
    return [encoder.encode(rows[i % len(DOMAINS)][i // len(DOMAINS)]) for i in range(count)]


def ending_with(policy: Policy, encoder: PromptEncoder, probability: float) -> Policy:
    """A copy that ends with about this probability at every token, by a bias on the head."""
    policy = policy.clone()
    head = policy.module.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(len(head.weight)), requires_grad=False)
    if not probability:
        head.bias[encoder.end_token_id] = -1e4
        return policy
    engine = _embedded(policy, encoder, 256, 262_144)
    prompts = prompts_of(encoder, 6)
    requests = [RolloutRequest(prompts[i % 6], seed=i, group=i) for i in range(128)]
    for _ in range(3):
        rollouts = engine.generate(EXPERT, requests, Sampling(1.0, int(3 / probability)))
        ended = sum(rollout.finish_reason == "stop" for rollout in rollouts)
        found = max(1, ended) / sum(rollout.num_tokens for rollout in rollouts)
        head.bias[encoder.end_token_id] += math.log(probability / found)
    return policy


def render(record: dict[str, Any]) -> str:
    """The tables as markdown."""
    settings = record["settings"]
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    head = [
        "# Rollout benchmark",
        "",
        f"Written by `{record['command']}` on {record['date']}.",
        "",
        f"- machine: {record['machine']}; {record['threads']} thread(s); device cpu",
        f"- {versions}; load of the machine at the start, mean of five minutes: {record['load']:.1f}",
        "- Qwen3-VL's architecture at 0.3M parameters (hidden 64, 4 layers), fp32, random weights; prompts of text, "
        "image and video in turn",
        "- engines take turns in each round; tokens per second: median over rounds, lowest and highest in brackets",
    ]
    together = [
        [str(row["sequences"]), row["engine"], _speed(row), f"{1e3 * _median(row) / settings['new_tokens']:.2f}"]
        for row in record["together"]
    ]
    mixed = [
        [
            f"{row['cache']:,}",
            row["engine"],
            _speed(row),
            f"{row['tokens'] / settings['num_requests']:.0f}",
            f"{100 * row['at_limit']:.0f} %",
            *(_count(row, name) for name in ("num_decode_steps", "occupancy", "num_preempted", "num_prefill_tokens")),
            _count(row, "cached_tokens"),
            f"{row['counts']['cache_bytes'] / MIB:.1f}" if "cache_bytes" in row["counts"] else "-",
        ]
        for row in record["mixed"]
    ]
    return "\n".join(
        [
            *head,
            "",
            f"## {settings['new_tokens']} tokens each",
            "",
            table(["sequences", "engine", "tokens/s", "ms per token of all"], together),
            "",
            f"## {settings['num_requests']} requests of different lengths, {settings['max_running']} at a time",
            "",
            f"In groups of {settings['group_size']}, up to {settings['limit']} tokens. Occupancy: the share of the "
            "places in use, mean over decode steps; the last requests leave places empty. Prefilled tokens hold "
            "those of preempted sequences.",
            "",
            table(
                [
                    "cache, tokens",
                    "engine",
                    "tokens/s",
                    "mean length",
                    "at the limit",
                    "decode steps",
                    "occupancy",
                    "preempted",
                    "prefilled tokens",
                    "most cached tokens",
                    "cache MiB",
                ],
                mixed,
            ),
            "",
        ]
    )


def _median(row: dict[str, Any]) -> float:
    return statistics.median(row["seconds"])


def _speed(row: dict[str, Any]) -> str:
    speeds = [row["tokens"] / seconds for seconds in row["seconds"]]
    return f"{row['tokens'] / _median(row):,.0f} ({min(speeds):,.0f} to {max(speeds):,.0f})"


def _count(row: dict[str, Any], name: str) -> str:
    value = row["counts"].get(name)
    return "-" if value is None else f"{value:.2f}" if isinstance(value, float) else f"{value:,}"


if __name__ == "__main__":
    main()
