"""What it takes to bring another expert's weights into a running sglang: our swap beside sglang's own update from disk.

Both leave the same weights, which is compared. The files are written by ``Policy.save`` and stand in the page cache.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.rollout_engines import EXPERT, Sizes, has_sglang, start_sglang
from copd_engine.models.base import Policy
from copd_engine.result import save_model
from copd_engine.rollout.sglang_engine import SglangEngine
from copd_engine.rollout.sglang_process import Host
from copd_engine.rollout.sglang_weights import word_sum
from copd_engine.testbed.model import untrained

#: Part of a swap -> calls of the host that it is made of; what is left is filling the buckets and summing them.
PARTS = {
    "wait until idle": ("flush_cache",),
    "begin, end": ("begin_weight_update", "end_weight_update"),
    "hand over, sum, load": ("load",),
    "sum what is held, drop caches": ("read back",),
}
FILL = "fill buckets, sum"


class TimedHost:
    """A host that notes the seconds of each kind of call."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self.seconds: dict[str, float] = defaultdict(float)

    def call(self, method: str, *args: Any, **kwargs: Any) -> None:
        begin = time.perf_counter()
        self._host.call(method, *args, **kwargs)
        self.seconds[method] += time.perf_counter() - begin

    def load(
        self, payload: Sequence[bytes], reply: str, weight_version: str | None = None, flush: bool = False
    ) -> list[dict[str, Any]]:
        begin = time.perf_counter()
        answers = self._host.load(payload, reply, weight_version, flush)
        self.seconds["read back" if flush else "load"] += time.perf_counter() - begin
        return answers

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host, name)


def swaps(models: Sequence[tuple[int, int]], repeats: int, device: str) -> list[dict[str, Any]]:
    """A row per (hidden size, layers); none where sglang is not installed."""
    return [_swaps(*model, repeats, device) for model in models] if has_sglang() else []


def _swaps(hidden_size: int, num_layers: int, repeats: int, device: str) -> dict[str, Any]:
    policy, encoder = untrained(0, hidden_size, num_layers)
    policy.module.to(device)
    policies = [policy, policy.clone()]
    with torch.no_grad():
        for parameter in policies[1].named_parameters().values():
            parameter.add_(1e-3)
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="copd-bench-") as parent:
        folders = [Path(parent, name) for name in "ab"]
        for folder, model in zip(folders, policies, strict=True):
            save_model(model, encoder, folder)
        engine = start_sglang(folders[0], encoder, policy.device, Sizes(8, 4096, 16))
        try:
            engine._host = host = TimedHost(engine._host)
            # The first of each expert is a warm-up: shared memory is mapped, files come into the page cache.
            for number in range(2 * (repeats + 1)):
                turn = number % 2
                row = _round(engine, host, policies[turn], folders[turn], number)
                if number >= 2:
                    rounds.append(row)
        finally:
            engine.close()
    tensors = policy.named_parameters()
    begin = time.perf_counter()
    for tensor in tensors.values():
        word_sum(tensor)
    return {
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "bytes": rounds[0]["bytes"],
        "sum_s": time.perf_counter() - begin,
        "rounds": rounds,
    }


def _round(engine: SglangEngine, host: TimedHost, policy: Policy, folder: Path, version: int) -> dict[str, Any]:
    """One swap, and one update of the same weights from disk."""
    engine.sync(EXPERT, policy.named_parameters(), version)
    engine.stats()
    host.seconds.clear()
    engine._place([EXPERT])
    stats = engine.stats()
    parts = {part: sum(host.seconds[name] for name in names) for part, names in PARTS.items()}
    held = _held(engine, host)
    begin = time.perf_counter()
    policy.save(folder)
    saved = time.perf_counter()
    host.call("update_weights_from_disk", str(folder))
    ended = time.perf_counter()
    if _held(engine, host) != held:
        raise RuntimeError("the swap and the update from disk left different weights in sglang")
    return {
        "bytes": int(stats["swap_bytes"]),
        "swap_s": stats["swap_s"],
        "parts": {FILL: stats["swap_s"] - sum(parts.values()), **parts},
        "save_s": saved - begin,
        "disk_s": ended - saved,
    }


def _held(engine: SglangEngine, host: Host) -> list[dict[str, Any]]:
    """The sum of every parameter as sglang holds it."""
    host.call("begin_weight_update")
    answers = engine._sender._ask(host, {"operation": "sums"})
    host.call("end_weight_update")
    return answers


def of_rounds(row: dict[str, Any], *names: str) -> list[float]:
    """Seconds of each round, summed over ``names``."""
    return [sum(number[name] for name in names) for number in row["rounds"]]


def times_faster(row: dict[str, Any], *names: str) -> float:
    """How many times as long ``names`` took as the swap: median of the ratios of each round."""
    pairs = zip(of_rounds(row, *names), of_rounds(row, "swap_s"), strict=True)
    return statistics.median(theirs / ours for theirs, ours in pairs)
