"""Seconds and bytes of one call, on the CPU and on a GPU."""

from __future__ import annotations

import ctypes
import gc
import resource
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch

from copd_engine.gpu_meter import GpuMeter, GpuUse

Result = TypeVar("Result")

MIB = 2**20
# Larger than the last-level cache of the GPUs that the kernels are written for.
FLUSH_BYTES = 256 * MIB
# A GPU renews its counter of energy some tens of times a second.
ENERGY_S = 2.0


def seconds(call: Callable[[], object], device: str = "cpu") -> float:
    """Wall-clock time of one call on the CPU; on a GPU the time between two events, after the L2 was flushed."""
    if device == "cpu":
        begin = time.perf_counter()
        result = call()
        elapsed = time.perf_counter() - begin
        del result
        return elapsed
    torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device).zero_()
    begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin_event.record()
    result = call()
    end_event.record()
    torch.cuda.synchronize()
    del result
    return float(begin_event.elapsed_time(end_event)) / 1e3


def extra_bytes(call: Callable[[], Result], device: str = "cpu") -> tuple[Result, int, str]:
    """The result, how far memory rose above what was held before the call, and how that was found.

    On Linux the kernel's own high-water mark of resident memory, reset before the call: nothing is sampled. Elsewhere
    the peak of the whole process, which is an upper bound.
    """
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        return result, torch.cuda.max_memory_allocated() - held, "torch.cuda.max_memory_allocated"
    _return_free_memory()
    resets = _reset_peak()
    held = _status_bytes("VmRSS") if resets else _lifetime_peak_bytes()
    result = call()
    peak = _status_bytes("VmHWM") if resets else _lifetime_peak_bytes()
    return result, max(0, peak - held), "VmHWM" if resets else "growth of ru_maxrss"


def joules(call: Callable[[], object], meter: GpuMeter) -> float | None:
    """Energy of one call on the GPUs that ``meter`` measures, from calls one after another for :data:`ENERGY_S`; None
    where they do not count it. What an idle GPU takes is in it."""
    count, begin = 0, time.perf_counter()
    with meter:
        while time.perf_counter() - begin < ENERGY_S:
            call()
            torch.cuda.synchronize()
            count += 1
    energy_j = meter.energy_j()
    return None if energy_j is None else energy_j / count


def gpu_table(use: Mapping[int, GpuUse]) -> str:
    """What each GPU used, as a section of markdown; empty where there is none."""
    if not use:
        return ""

    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    lines = [
        f"| {index} | {cell(gpu.energy_j, ',.0f')} | {cell(gpu.mean_utilization_percent, '.0f')} "
        f"| {cell(gpu.peak_memory_bytes and gpu.peak_memory_bytes / MIB, ',.0f')} |"
        for index, gpu in use.items()
    ]
    header = ["| GPU | energy, J | mean utilisation, % | peak memory in use, MiB |", "| --- | --- | --- | --- |"]
    return "\n## GPUs during the whole command\n\n" + "\n".join([*header, *lines]) + "\n"


def process_peak_bytes(device: str = "cpu") -> int:
    """Peak since the last reset, inputs included."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    try:
        return _status_bytes("VmHWM")
    except OSError:
        return _lifetime_peak_bytes()


def _reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


def _lifetime_peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _return_free_memory() -> None:
    """Give freed blocks back, so that a call cannot hide in memory that an earlier one left behind."""
    libc = ctypes.CDLL(None)
    # glibc alone has it.
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
