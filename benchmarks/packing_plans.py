"""The packing benchmark's planning part: seconds to plan, seconds to pack, and LPT against Karmarkar-Karp.

One thread works, so its CPU time is what it takes on a quiet machine.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from benchmarks.packing_problem import IMAGE, MERGE, ROLLOUTS, VIDEO, workload
from copd_engine.micro_batches import DEFAULT_COST, MicroBatch, Workload, plan_micro_batches
from copd_engine.packing import pack
from copd_engine.partition import karmarkar_karp, longest_first
from copd_engine.types import EncodedPrompt, Example


def planning(
    num_samples: int, groups: tuple[int, ...], max_tokens: int, ranks: tuple[int, ...]
) -> list[dict[str, Any]]:
    """Seconds to plan all samples, and to pack the rows of one rank into tensors."""
    rows = []
    for group in groups:
        load = workload(ROLLOUTS, num_samples // group, group)
        for num_ranks in ranks:
            times, cpu_times = [], []
            for _ in range(3):
                begin, cpu_begin = time.perf_counter(), time.thread_time()
                plan = plan_micro_batches(load, max_tokens, num_ranks=num_ranks)
                times.append(time.perf_counter() - begin)
                cpu_times.append(time.thread_time() - cpu_begin)
            batches = [batch for rank in plan for batch in rank]
            rows.append(
                {
                    "group": group,
                    "ranks": num_ranks,
                    "samples": len(load.prompt_of_B),
                    "seconds": times,
                    "cpu_seconds": cpu_times,
                    "rows": len(batches),
                    "empty": sum(not batch.indexes for batch in batches),
                    "fill": sum(batch.num_tokens for batch in batches) / (len(batches) * max_tokens),
                    "packing": _packing_time(load, plan[0]) if num_ranks == 1 else None,
                }
            )
    return rows


def _packing_time(load: Workload, batches: list[MicroBatch], most: int = 200) -> dict[str, float]:
    """Seconds of ``pack`` per 100k samples, over the first rows; text prompts."""
    example = Example("bench", "bench", "", "exact")
    num_samples = num_tokens = 0
    seconds = 0.0
    for batch in batches[:: max(1, len(batches) // most)]:
        prompts = {
            p: EncodedPrompt(example, torch.zeros(n, dtype=torch.int64), torch.arange(n).expand(3, -1), n)
            for p in {int(load.prompt_of_B[i]) for i in batch.indexes}
            for n in [int(load.prompt_rows_P[p])]
        }
        sequence = [prompts[int(load.prompt_of_B[i])] for i in batch.indexes]
        responses = [torch.zeros(int(load.response_rows_B[i]) + 1, dtype=torch.int64) for i in batch.indexes]
        begin = time.thread_time()
        packed = pack(sequence, responses, (IMAGE, VIDEO), MERGE)
        seconds += time.thread_time() - begin
        num_samples += len(sequence)
        num_tokens += packed.num_tokens
    return {"per_100k_s": seconds / num_samples * 1e5, "tokens_per_s": num_tokens / seconds}


def partitions(
    sample_counts: tuple[int, ...], group: int, max_tokens: int, ranks: tuple[int, ...]
) -> list[dict[str, Any]]:
    """LPT against Karmarkar-Karp on the FLOPs of units: how even, how fast, and what remains of it in rows."""
    rows = []
    for num_samples in sample_counts:
        for num_ranks in ranks:
            row: dict[str, Any] = {"samples": num_samples, "ranks": num_ranks}
            for method in (longest_first, karmarkar_karp):
                excess, rounds, times = [], [], []
                for seed in range(3):
                    load = workload(ROLLOUTS, num_samples // group, group, seed)
                    begin = time.thread_time()
                    plan = plan_micro_batches(load, max_tokens, DEFAULT_COST, num_ranks, method)
                    times.append(time.thread_time() - begin)
                    mean = sum(batch.flops for rank in plan for batch in rank) / num_ranks
                    excess.append(max(sum(batch.flops for batch in rank) for rank in plan) / mean - 1)
                    rounds.append(sum(max(rank[k].flops for rank in plan) for k in range(len(plan[0]))) / mean - 1)
                row[method.__name__] = {
                    "excess": statistics.median(excess),
                    "rounds": statistics.median(rounds),
                    "seconds": statistics.median(times),
                }
            rows.append(row)
    return rows
