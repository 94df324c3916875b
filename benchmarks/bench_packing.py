"""Packed rows against padded batches: token efficiency, tokens per second, memory, and the time that planning takes.

``make bench-packing`` runs it in some minutes on one core and writes benchmarks/RESULTS-packing.md. Peers take turns
within each round, so a drift of the machine hits all alike: compare ratios, which are of one run.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.command import main_of
from benchmarks.measure import extra_bytes, process_peak_bytes
from benchmarks.packing_plans import partitions, planning
from benchmarks.packing_problem import (
    ROLLOUTS,
    SHORT,
    Lengths,
    Model,
    Sample,
    build_model,
    packed_step,
    padded_efficiency,
    padded_step,
    samples,
    with_own_prompts,
    workload,
)
from benchmarks.packing_tables import render
from copd_engine import run_folder
from copd_engine.micro_batches import MicroBatch, Workload, plan_micro_batches
from copd_engine.models.attention import sdpa_packed
from copd_engine.models.packed_layout import PackedLayout

PEERS = ("padded", "packed", "packed, prompts shared")
#: Padded efficiency of the batch that is timed.
EFFICIENCY = (0.43, 0.47)


@dataclass(frozen=True)
class Settings:
    """Sizes of all parts; the defaults are those of the written results."""

    num_samples: int = 100_000
    group: int = 8
    max_tokens: int = 32_768
    ranks: tuple[int, ...] = (1, 8, 64)
    partition_samples: tuple[int, ...] = (512, 2048, 16_384)
    efficiency_prompts: int = 384
    hidden: int = 256
    layers: int = 4
    step_prompts: int = 6
    step_group: int = 4
    lengths: Lengths = SHORT
    repeats: int = 5
    long_tokens: int = 32_768
    models: tuple[str, ...] = ("text", "mixed")


def main(arguments: Sequence[str] | None = None) -> None:
    main_of(
        "bench_packing",
        __doc__,
        Settings.repeats,
        lambda given: run(Settings(repeats=given.repeats)),
        render,
        arguments,
    )


def run(settings: Settings) -> dict[str, Any]:
    """All figures."""
    return {
        "date": run_folder.today(),
        "machine": run_folder.machine(),
        "versions": run_folder.versions(),
        "repeats": settings.repeats,
        "efficiency": token_efficiency(settings),
        "steps": [step_times(settings, name) for name in settings.models],
        "memory": [step_memory(settings, name) for name in settings.models],
        "planning": planning(settings.num_samples, (settings.group, 1), settings.max_tokens, settings.ranks),
        "partitions": partitions(
            (*settings.partition_samples, settings.num_samples),
            settings.group,
            settings.max_tokens,
            tuple(ranks for ranks in settings.ranks if ranks > 1),
        ),
        "long": long_rows(settings),
    }


# Token efficiency


def token_efficiency(settings: Settings) -> dict[str, Any]:
    """Tokens and attention pairs that are computed, over those that the samples need.

    Need, without sharing: every sample's prompt and response but its last token. With sharing: each prompt once.
    """
    load = workload(ROLLOUTS, settings.efficiency_prompts, settings.group)
    own = Workload(
        np.arange(len(load.prompt_of_B)), load.prompt_rows_P[load.prompt_of_B], load.response_rows_B,
        load.patches_P[load.prompt_of_B], load.patch_pairs_P[load.prompt_of_B],
    )  # fmt: skip
    lengths = own.prompt_rows_P + own.response_rows_B
    order = np.random.default_rng(1).permutation(len(lengths))
    rows = [
        {"way": "padded, in the order drawn", **_padded(lengths[order], settings.max_tokens)},
        {"way": "padded, sorted by length", **_padded(np.sort(lengths), settings.max_tokens)},
        {"way": "packed, a prompt per sample", **_packed(own, settings.max_tokens)},
        {"way": "packed, prompts shared", **_packed(load, settings.max_tokens)},
        {"way": "packed, shared, rows to multiples of 128", **_packed(load, settings.max_tokens, 128)},
    ]
    return {
        "samples": len(lengths),
        "group": settings.group,
        "max_tokens": settings.max_tokens,
        "mean": float(lengths.mean()),
        "rows": rows,
    }


def _padded(lengths: np.ndarray, max_tokens: int) -> dict[str, Any]:
    """Batches of neighbours while the padded batch stays within the budget."""
    batches: list[list[int]] = [[]]
    for length in lengths.tolist():
        if batches[-1] and (len(batches[-1]) + 1) * max(*batches[-1], length) > max_tokens:
            batches.append([])
        batches[-1].append(length)
    return {
        "forwards": len(batches),
        "needed": int(lengths.sum()),
        "computed": sum(len(batch) * max(batch) for batch in batches),
        "pairs_needed": int((lengths * (lengths + 1) // 2).sum()),
        "pairs_computed": sum(len(batch) * max(batch) ** 2 for batch in batches),
    }


def _packed(load: Workload, max_tokens: int, multiple: int = 1) -> dict[str, Any]:
    (batches,) = plan_micro_batches(load, max_tokens)
    pairs_needed = pairs_computed = 0
    for batch in batches:
        layout = _layout(load, batch)
        pairs_needed += layout.num_pairs
        pairs_computed += layout.sdpa.num_pairs
    return {
        "forwards": len(batches),
        # Each prompt once in all: where a group is split, computing its prompt again is no use.
        "needed": int(load.prompt_rows_P.sum() + load.response_rows_B.sum()),
        "computed": sum(-(-batch.num_tokens // multiple) * multiple for batch in batches),
        "pairs_needed": pairs_needed,
        "pairs_computed": pairs_computed,
    }


def _layout(load: Workload, batch: MicroBatch) -> PackedLayout:
    indexes = np.array(batch.indexes)
    prompts, prompt_of = np.unique(load.prompt_of_B[indexes], return_inverse=True)
    return PackedLayout(
        batch.num_tokens,
        tuple(load.prompt_rows_P[prompts].tolist()),
        tuple(load.response_rows_B[indexes].tolist()),
        tuple(prompt_of.tolist()),
        torch.device("cpu"),
    )


# Forward and backward


def batch_of(settings: Settings, model: Model) -> tuple[list[Sample], float]:
    """The first draw whose padded efficiency is about 45 %, and that efficiency."""
    for seed in range(1000):
        rows = samples(model, settings.lengths, settings.step_prompts, settings.step_group, seed)
        efficiency = padded_efficiency(rows)
        if EFFICIENCY[0] <= efficiency <= EFFICIENCY[1]:
            return rows, efficiency
    raise RuntimeError(f"no draw of {settings.lengths} has a padded efficiency in {EFFICIENCY}")


def steps_of(model: Model, rows: list[Sample]) -> dict[str, Callable[[], float]]:
    return {
        "padded": padded_step(model, rows),
        "packed": packed_step(model, with_own_prompts(rows)),
        "packed, prompts shared": packed_step(model, rows),
    }


def step_times(settings: Settings, name: str) -> dict[str, Any]:
    model = build_model(name, settings.hidden, settings.layers)
    rows, efficiency = batch_of(settings, model)
    steps = steps_of(model, rows)
    losses = {peer: step() for peer, step in steps.items()}  # also the warm-up
    for peer, loss in losses.items():
        if abs(loss - losses["padded"]) > 1e-4 * abs(losses["padded"]):
            raise RuntimeError(f"{peer} computes a loss of {loss}, padded {losses['padded']}")
    seconds: dict[str, list[float]] = {peer: [] for peer in PEERS}
    for _ in range(settings.repeats):
        for peer in PEERS:
            begin = time.perf_counter()
            steps[peer]()
            seconds[peer].append(time.perf_counter() - begin)
    tokens = sum(row.prompt.num_tokens + len(row.response_N) for row in rows)
    return {
        "model": name,
        "parameters": sum(p.numel() for p in model.plain.parameters()),
        "samples": len(rows),
        "group": settings.step_group,
        "tokens": tokens,
        "efficiency": efficiency,
        "seconds": seconds,
        # Of each round, so that a slow round counts for both.
        "ratios": {
            peer: statistics.median(a / b for a, b in zip(seconds["padded"], seconds[peer], strict=True))
            for peer in PEERS
        },
    }


def step_memory(settings: Settings, name: str) -> dict[str, Any]:
    """Peak of a process that does nothing but build the model and run one step, and how much of it is the step's."""
    peaks = {peer: _in_child(_peak_of_step, settings, name, peer) for peer in PEERS}
    return {"model": name, "peaks": peaks}


def _peak_of_step(settings: Settings, name: str, peer: str) -> dict[str, Any]:
    model = build_model(name, settings.hidden, settings.layers)
    step = steps_of(model, batch_of(settings, model)[0])[peer]
    _, step_bytes, method = extra_bytes(step)
    return {"process": process_peak_bytes(), "step": step_bytes, "method": method}


def _in_child(call: Callable[..., Any], *arguments: Any) -> Any:
    with multiprocessing.get_context("spawn").Pool(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return pool.apply(call, arguments)


# Long rows


def long_rows(settings: Settings) -> list[dict[str, Any]]:
    """Attention alone over one long row, forward and backward, 4 heads of 32 and 2 key heads, fp32."""
    total = settings.long_tokens
    prompt = total // 32
    cases = {
        "one prompt": ((total,), (), ()),
        "a prompt and a response": ((prompt,), (total - prompt,), (0,)),
        "a prompt and 4 responses": ((prompt,), ((total - prompt) // 4,) * 4, (0,) * 4),
    }
    return [{"case": name, "lengths": case, **_in_child(_long_row, *case)} for name, case in cases.items()]


def _long_row(prompts: tuple[int, ...], responses: tuple[int, ...], prompt_of: tuple[int, ...]) -> dict[str, Any]:
    layout = PackedLayout(sum(prompts) + sum(responses), prompts, responses, prompt_of, torch.device("cpu"))
    tokens = layout.num_tokens
    query, key, value = (torch.randn(1, heads, tokens, 32, requires_grad=True) for heads in (4, 2, 2))

    def step() -> float:
        begin = time.perf_counter()
        sdpa_packed(query, key, value, layout.sdpa).sum().backward()
        return time.perf_counter() - begin

    seconds, num_bytes, method = extra_bytes(step)
    return {
        "tokens": tokens,
        "seconds": seconds,
        "bytes": num_bytes,
        "method": method,
        "mask_bytes": layout.sdpa.mask.numel() * 4,
        "dense_mask_bytes": tokens**2 * 4,
    }


if __name__ == "__main__":
    main()
