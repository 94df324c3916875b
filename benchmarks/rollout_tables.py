"""The tables of the rollout benchmark as markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.measure import MIB
from benchmarks.packing_tables import table
from benchmarks.rollout_steps import OTHER, PARTS, median_of
from benchmarks.rollout_swaps import FILL, of_rounds, times_faster
from benchmarks.rollout_swaps import PARTS as SWAP_PARTS

#: How many times as fast as an update from disk a swap is to be.
SWAP_AIM = 10
NOT_INSTALLED = "sglang is not installed: no figures of it."
PHASES = {"rl": "I", "opd": "II"}


def render(record: dict[str, Any]) -> str:
    parts = [_head(record), _together(record), _mixed(record), _swaps(record), _steps(record)]
    return "\n\n".join(parts) + "\n"


def _head(record: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    lines = [
        "# Rollout benchmark",
        "",
        f"Written by `{record['command']}` on {record['date']}.",
        "",
        f"- machine: {record['machine']}; {record['threads']} thread(s); device {record['settings']['device']}",
        f"- {versions}; load of the machine at the start, mean of five minutes: {record['load']:.1f}",
        f"- Qwen3-VL's architecture at {record['parameters'] / 1e6:.2f}M parameters (hidden 64, 4 layers), fp32, "
        "random weights; prompts of text, image and video in turn",
        "- engines take turns in each round; median over rounds, lowest and highest in brackets",
    ]
    if not record["has_sglang"]:
        lines.append(f"- {NOT_INSTALLED}")
    elif record["settings"]["device"] == "cpu":
        lines.append(
            "- **sglang's figures here say nothing about a GPU**: on a CPU its kernels are stand-ins in plain PyTorch "
            "(`tools/sglang_cpu`), its attention goes from sequence to sequence, and its scheduler shares the cores. "
            "They show that the real engine runs and where its time goes, not how fast it is"
        )
    return "\n".join(lines)


def _together(record: dict[str, Any]) -> str:
    new_tokens = record["settings"]["new_tokens"]
    rows = [
        [str(row["sequences"]), row["engine"], _speed(row), f"{1e3 * _median(row) / new_tokens:.2f}", *_energy(row)]
        for row in record["together"]
    ]
    header = ["sequences", "engine", "tokens/s", "ms per token of all", *_energy_header(record["together"])]
    return f"## {new_tokens} tokens each\n\n{table(header, _with_missing(record, rows, len(header)))}"


def _mixed(record: dict[str, Any]) -> str:
    settings = record["settings"]
    counts = ("num_decode_steps", "occupancy", "num_preempted", "num_prefill_tokens", "cached_tokens")
    rows = [
        [
            f"{row['cache']:,}",
            row["engine"],
            _speed(row),
            f"{row['tokens'] / settings['num_requests']:.0f}",
            f"{100 * row['at_limit']:.0f} %",
            *(_count(row, name) for name in counts),
            f"{row['counts']['cache_bytes'] / MIB:.1f}" if "cache_bytes" in row["counts"] else "-",
            *_energy(row),
        ]
        for row in record["mixed"]
    ]
    header = ["cache, tokens", "engine", "tokens/s", "mean length", "at the limit", "decode steps", "occupancy"]
    header += ["preempted", "prefilled tokens", "most cached tokens", "cache MiB", *_energy_header(record["mixed"])]
    note = (
        f"In groups of {settings['group_size']}, up to {settings['limit']} tokens. Occupancy: the share of the places "
        "in use, mean over decode steps; the last requests leave places empty. Prefilled tokens hold those of "
        "preempted sequences. The engines draw other tokens from the same seeds. sglang does not report its counts."
    )
    title = f"## {settings['num_requests']} requests of different lengths, {settings['max_running']} at a time"
    return f"{title}\n\n{note}\n\n{table(header, _with_missing(record, rows, len(header)))}"


def _swaps(record: dict[str, Any]) -> str:
    title = "## Another expert's weights into sglang"
    if not record["swaps"]:
        return f"{title}\n\n{NOT_INSTALLED}"
    note = (
        "Ours: all weights from the trainer's memory, with every check of the rollout engine. From disk: sglang's "
        "`update_weights_from_disk` of the same weights, which checks nothing; the trainer has to write the files "
        "first (`Policy.save`), and they are read from the page cache, as just written. Both leave the same weights: "
        f"the sums of all parameters are compared in each round. {record['settings']['swap_repeats']} rounds of each "
        "of two experts, in turns; how many times as long: median of the rounds' ratios. "
        f"The aim is {SWAP_AIM} times."
    )
    header = ["MB", "swap, ms", "from disk, ms", "save and from disk, ms", "from disk / swap", "save and disk / swap"]
    rows, parts = [], []
    for row in record["swaps"]:
        megabytes = f"{row['bytes'] / 1e6:.1f}"
        ratios = [times_faster(row, "disk_s"), times_faster(row, "save_s", "disk_s")]
        times = [_spread(of_rounds(row, *names)) for names in (("swap_s",), ("disk_s",), ("save_s", "disk_s"))]
        rows.append([megabytes, *times, *(f"{ratio:.2f}" for ratio in ratios)])
        medians = [statistics.median(r["parts"][part] for r in row["rounds"]) for part in (FILL, *SWAP_PARTS)]
        parts.append([megabytes, *(f"{1e3 * seconds:.1f}" for seconds in medians), f"{1e3 * row['sum_s']:.1f}"])
    reached = "reached" if all(times_faster(row, "disk_s") >= SWAP_AIM for row in record["swaps"]) else "missed"
    columns = ["MB", FILL, *SWAP_PARTS, "one sum of all weights"]
    where = (
        f"On this machine the aim is {reached}. Where a swap's time goes, ms, medians; the sums that are compared "
        "are three of the last column, one in each of the first, the fourth and the fifth:"
    )
    return "\n\n".join([title, note, table(header, rows), where, table(columns, parts)])


def _steps(record: dict[str, Any]) -> str:
    names = [*PARTS, OTHER]
    rows = []
    for row in record["steps"]:
        total = median_of(row, "total")
        shares = [statistics.fmean(step[name] / step["total"] for step in row["steps"]) for name in names]
        rows.append(
            [PHASES[row["phase"]], row["engine"], f"{1e3 * total:.0f}", *(f"{100 * share:.1f}" for share in shares)]
        )
    note = (
        f"`configs/demo.yaml` (three branches), {record['settings']['steps_per_phase']} steps of "
        "each phase after a warm-up step, by the real trainer, which takes turns between the engines step by step; "
        "shares in %, from `time_s` of the metrics. Swaps: `sync`, and for sglang, which takes weights in when an "
        "expert's turn to sample comes, its `swap_s`, taken out of `rollout`. Scoring is the teachers'. The rest is "
        "what no part counts: sglang is put to sleep there and wakes in `rollout`."
    )
    header = ["phase", "engine", "step, ms", *PARTS.values(), OTHER]
    text = f"## Shares of a training step\n\n{note}\n\n{table(header, _with_missing(record, rows, len(header)))}"
    energies = {
        f"phase {PHASES[row['phase']]}, {row['engine']}: {statistics.median(known):.4g}"
        for row in record["steps"]
        if (known := [value for value in row["energy_per_token_j"] if value is not None])
    }
    return text + (f"\n\nEnergy, J per token: {'; '.join(sorted(energies))}." if energies else "")


def _with_missing(record: dict[str, Any], rows: list[list[str]], width: int) -> list[list[str]]:
    """A row that says so where sglang is not installed."""
    if record["has_sglang"]:
        return rows
    return [*rows, ["-", "sglang", "not installed", *["-"] * (width - 3)]]


def _energy_header(rows: Sequence[dict[str, Any]]) -> list[str]:
    return ["mJ per token"] if any("energy_per_token_j" in row for row in rows) else []


def _energy(row: dict[str, Any]) -> list[str]:
    return [f"{1e3 * row['energy_per_token_j']:.3g}"] if "energy_per_token_j" in row else []


def _median(row: dict[str, Any]) -> float:
    return statistics.median(row["seconds"])


def _speed(row: dict[str, Any]) -> str:
    speeds = [row["tokens"] / seconds for seconds in row["seconds"]]
    return f"{row['tokens'] / _median(row):,.0f} ({min(speeds):,.0f} to {max(speeds):,.0f})"


def _spread(seconds: list[float]) -> str:
    median, low, high = (1e3 * value for value in (statistics.median(seconds), min(seconds), max(seconds)))
    return f"{median:.1f} ({low:.1f} to {high:.1f})"


def _count(row: dict[str, Any], name: str) -> str:
    value = row["counts"].get(name)
    return "-" if value is None else f"{value:.2f}" if isinstance(value, float) else f"{value:,}"
