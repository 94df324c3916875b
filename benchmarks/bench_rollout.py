"""Tokens per second of the rollout engines on the testbed's model, swaps of weights, shares of a training step.

``python -m benchmarks.bench_rollout`` samples with every installed engine (embedded, sglang) side by side, in turns:

- 1, 16 and 64 sequences that start together, all from different prompts of text, image and video;
- 256 requests in groups of 8 whose lengths differ as they do in training (about one in fifteen reaches the limit of 512
  tokens), 64 at a time, with a key/value cache that holds them all and with smaller ones.

Weights are random, so that a response ends by chance alone. Then it times a swap of all weights into sglang beside
sglang's own update from disk, and the parts of the steps of a small CoPD run with each engine. No time is a test's pass
or fail.
"""

from __future__ import annotations

import os
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.command import main_of
from benchmarks.rollout_engines import ENGINES, EXPERT, Sizes, ending_with, has_sglang, prompts_of, running
from benchmarks.rollout_steps import steps
from benchmarks.rollout_swaps import swaps
from benchmarks.rollout_tables import render
from copd_engine import run_folder
from copd_engine.gpu_meter import GpuMeter
from copd_engine.models.base import Policy, PromptEncoder
from copd_engine.rollout.base import RolloutEngine, Sampling
from copd_engine.testbed.model import untrained
from copd_engine.types import RolloutRequest


@dataclass(frozen=True)
class Settings:
    """``end_probability``: of ending at each token, which makes lengths nearly geometric. ``caches``: tokens, and the
    engines that are measured with as many. ``swap_models``: (hidden size, layers). ``step_changes``: of the config."""

    repeats: int = 7
    device: str = "cpu"
    sequences: tuple[int, ...] = (1, 16, 64)
    new_tokens: int = 64
    num_requests: int = 256
    group_size: int = 8
    max_running: int = 64
    limit: int = 512
    end_probability: float = 1 / 170
    caches: tuple[tuple[int, tuple[str, ...]], ...] = (
        (262_144, ("embedded", "sglang")),
        (4096, ("embedded",)),
        (2048, ("embedded",)),
    )
    swap_models: tuple[tuple[int, int], ...] = ((64, 4), (512, 12))
    swap_repeats: int = 7
    step_engines: tuple[str, ...] = tuple(ENGINES)
    steps_per_phase: int = 4
    step_changes: tuple[str, ...] = ()


def main(arguments: Sequence[str] | None = None) -> None:
    def measured(options: Namespace) -> dict[str, Any]:
        return run(Settings(repeats=options.repeats, device=options.device))

    main_of("bench_rollout", __doc__, Settings.repeats, measured, render, arguments, devices=("cpu", "cuda"))


def run(settings: Settings) -> dict[str, Any]:
    """All figures, for :func:`render`."""
    policy, encoder = untrained(0)
    policy.module.to(settings.device)
    return {
        "date": run_folder.today(),
        "machine": run_folder.machine(),
        "versions": run_folder.versions(),
        "load": os.getloadavg()[1],
        "settings": settings.__dict__,
        "parameters": sum(tensor.numel() for tensor in policy.named_parameters().values()),
        "has_sglang": has_sglang(),
        "together": together(settings, policy, encoder),
        "mixed": mixed(settings, policy, encoder),
        "swaps": swaps(settings.swap_models, settings.swap_repeats, settings.device),
        "steps": steps(settings.step_engines, settings.steps_per_phase, settings.step_changes, settings.device),
    }


def together(settings: Settings, policy: Policy, encoder: PromptEncoder) -> list[dict[str, Any]]:
    """A row per number of sequences and engine; nobody ends before the last token."""
    endless = ending_with(policy, encoder, 0.0)
    prompts = prompts_of(encoder, max(settings.sequences))
    rows = []
    with running(endless, encoder, Sizes(max(settings.sequences), 262_144, settings.new_tokens)) as engines:
        for count in settings.sequences:
            requests = [RolloutRequest(prompts[i], seed=i, group=i) for i in range(count)]
            rows += _timed(engines, requests, Sampling(1.0, settings.new_tokens), settings.repeats, sequences=count)
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
    for cache, names in settings.caches:
        with running(policy, encoder, Sizes(settings.max_running, cache, settings.limit), names) as engines:
            sampling = Sampling(1.0, settings.limit)
            rows += _timed(engines, requests, sampling, max(1, settings.repeats // 2), cache=cache)
    return rows


def _timed(
    engines: dict[str, RolloutEngine],
    requests: Sequence[RolloutRequest],
    sampling: Sampling,
    repeats: int,
    **labels: int,
) -> list[dict[str, Any]]:
    """Every engine in turn, after a warm-up; wall-clock seconds of each round, and the counts of the last one."""
    rows: dict[str, dict[str, Any]] = {name: {**labels, "engine": name, "seconds": []} for name in engines}
    joules: dict[str, list[float | None]] = {name: [] for name in engines}
    meter = GpuMeter()
    for number in range(repeats + 1):
        for name, engine in engines.items():
            engine.stats()
            begin = time.perf_counter()
            with meter:
                rollouts = engine.generate(EXPERT, requests, sampling)
            if number > 0:
                rows[name]["seconds"].append(time.perf_counter() - begin)
                joules[name].append(meter.energy_j())
            tokens = sum(rollout.num_tokens for rollout in rollouts)
            at_limit = sum(rollout.finish_reason == "length" for rollout in rollouts) / len(rollouts)
            rows[name] |= {"tokens": tokens, "at_limit": at_limit, "counts": engine.stats()}
    for name, row in rows.items():
        known = [energy for energy in joules[name] if energy is not None]
        if known:
            row["energy_per_token_j"] = sum(known) / (len(known) * row["tokens"])
    return list(rows.values())


if __name__ == "__main__":
    main()
