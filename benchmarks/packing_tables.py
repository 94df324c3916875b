"""The tables of the packing benchmark as markdown."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Iterable
from typing import Any

from benchmarks.measure import MIB

#: What is measured, and what it must reach.
EFFICIENCY_MUST, SPEED_MUST, PLANNING_MUST_S = 0.98, 1.8, 2.0


def render(record: dict[str, Any]) -> str:
    parts = [
        _head(record),
        _bounds(record),
        _efficiency(record["efficiency"]),
        _steps(record),
        _planning(record["planning"]),
        _partitions(record["partitions"]),
        _long(record["long"]),
    ]
    return "\n\n".join(parts) + "\n"


def _head(record: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    return "\n".join(
        [
            "# Packing benchmark",
            "",
            f"Written by `{record['command']}` on {record['date']}.",
            "",
            f"- machine: {record['machine']}; {record['threads']} thread(s); device cpu",
            f"- {versions}",
            f"- timed steps: median of {record['repeats']} rounds, in each of which all peers take their turn; ratios "
            "are medians of the rounds' ratios. Other work on the machine moves the seconds, and both sides of a ratio "
            "alike.",
        ]
    )


def _bounds(record: dict[str, Any]) -> str:
    efficiency = min(_share(row) for row in record["efficiency"]["rows"] if row["way"].startswith("packed"))
    reached = _reached(efficiency >= EFFICIENCY_MUST)
    rows = [["token efficiency, packed, smallest", f"{efficiency:.2%}", f"≥ {EFFICIENCY_MUST:.0%}", reached]]
    for step in record["steps"]:
        ratio = step["ratios"]["packed"]
        name = (
            f"tokens/s packed / padded at a padded efficiency of {step['efficiency']:.0%}, {step['model']}, not shared"
        )
        rows.append([name, f"{ratio:.2f}", f"≥ {SPEED_MUST}", _reached(ratio >= SPEED_MUST)])
    samples = max(row["samples"] for row in record["planning"])
    slowest = max(max(row["cpu_seconds"]) for row in record["planning"])
    reached = _reached(slowest <= PLANNING_MUST_S)
    rows.append(
        [
            f"planning {samples:,} samples, slowest, CPU time of one thread",
            f"{slowest:.2f} s",
            f"≤ {PLANNING_MUST_S:.0f} s",
            reached,
        ]
    )
    return "## Bounds\n\n" + table(["ours", "measured", "must reach", "reached"], rows)


def _reached(reached: bool) -> str:
    return "yes" if reached else "missed"


def _share(row: dict[str, Any]) -> float:
    return float(row["needed"] / row["computed"])


def _efficiency(record: dict[str, Any]) -> str:
    rows = [
        [
            row["way"],
            f"{row['forwards']:,}",
            f"{row['needed']:,}",
            f"{row['computed']:,}",
            f"{_share(row):.2%}",
            f"{row['pairs_needed'] / row['pairs_computed']:.1%}",
        ]
        for row in record["rows"]
    ]
    return "\n".join(
        [
            "## Token efficiency",
            "",
            _prose(
                f"""{record["samples"]:,} rollouts in groups of {record["group"]}, prompts of text, image and video in
                turn; responses log-normal with 5 % at the limit of 16,384; {record["mean"]:,.0f} tokens on average; at
                most {record["max_tokens"]:,} tokens per forward. *Needed*: each sample's prompt and response without
                its last token, a shared prompt once in all; *computed*: rows of the model's linear layers, a prompt
                again where its group is split. Attention is counted apart, in (query, key) pairs: causal pairs needed,
                over pairs that the calls compute (padding within buckets, masked halves of blocks; a causal call counts
                as half its square). Padded batches compute whole squares, since transformers gives them a mask."""
            ),
            "",
            table(["way", "forwards", "needed", "computed", "token efficiency", "attention efficiency"], rows),
        ]
    )


def _steps(record: dict[str, Any]) -> str:
    memory = {row["model"]: row for row in record["memory"]}
    parts = [
        "## Forward and backward",
        "",
        _prose(
            """Real models with random weights, fp32 (text: Qwen3; mixed: Qwen3-VL with text, image and video prompts).
            *Padded* is plain transformers: one batch, an attention mask, its own SDPA. *Packed* gives every sample a
            copy of its prompt, so that only padding differs; *shared* computes each prompt once per group. All compute
            the same loss (checked to 1e-4). Tokens per second count all tokens of all samples. Memory: the peak of
            resident memory of a process of its own (VmHWM; ru_maxrss would count the process that started it), and how
            far the one step raised it."""
        ),
    ]
    header = ["way", "median s", "min", "max", "tokens/s", "tokens/s / padded"]
    for step in record["steps"]:
        peaks = memory[step["model"]]["peaks"]
        rows = []
        for peer, seconds in step["seconds"].items():
            median = statistics.median(seconds)
            rows.append(
                [
                    peer,
                    f"{median:.2f}",
                    f"{min(seconds):.2f}",
                    f"{max(seconds):.2f}",
                    f"{step['tokens'] / median:,.0f}",
                    f"{step['ratios'][peer]:.2f}",
                    f"{peaks[peer]['process'] / MIB:,.0f}",
                    f"{peaks[peer]['step'] / MIB:,.0f}",
                    f"{peaks['padded']['step'] / max(1, peaks[peer]['step']):.2f}",
                ]
            )
        parts += [
            "",
            f"**{step['model']}**: {step['parameters'] / 1e6:.1f}M parameters, {step['samples']} samples in groups of "
            f"{step['group']}, {step['tokens']:,} tokens, padded efficiency {step['efficiency']:.1%}.",
            "",
            table([*header, "peak MiB", "of the step", "padded / it"], rows),
        ]
    return "\n".join(parts)


def _planning(record: list[dict[str, Any]]) -> str:
    rows = []
    for row in record:
        packing = row["packing"]
        rows.append(
            [
                f"{row['samples']:,}",
                str(row["group"]),
                str(row["ranks"]),
                f"{statistics.median(row['cpu_seconds']):.2f}",
                f"{max(row['cpu_seconds']):.2f}",
                f"{statistics.median(row['seconds']):.2f}",
                f"{row['rows']:,}",
                str(row["empty"]),
                f"{row['fill']:.1%}",
                f"{packing['per_100k_s']:.1f}" if packing else "-",
                f"{packing['tokens_per_s'] / 1e6:.0f}M" if packing else "-",
            ]
        )
    header = ["samples", "group", "ranks", "plan, CPU s", "max", "wall s", "rows", "empty", "fill"]
    header += ["tensors, CPU s per 100k samples", "tokens/s"]
    return "\n".join(
        [
            "## Planning",
            "",
            _prose(
                """Which sample goes into which row on which rank, from lengths alone, in one thread: median and
                slowest of three. *Tensors*: `pack` itself, which copies every token's id and positions (32 bytes a
                token) row by row, each before its forward. *Fill*: tokens over rows times the budget; nothing is padded
                up to it, and whole groups are coarser than single samples."""
            ),
            "",
            table(header, rows),
        ]
    )


def _partitions(record: list[dict[str, Any]]) -> str:
    rows = []
    for row in record:
        lpt, kk = row["longest_first"], row["karmarkar_karp"]
        rows.append(
            [
                f"{row['samples']:,}",
                str(row["ranks"]),
                f"{lpt['excess']:.1e}",
                f"{kk['excess']:.1e}",
                f"{lpt['rounds']:.2%}",
                f"{kk['rounds']:.2%}",
                f"{lpt['seconds']:.3f}",
                f"{kk['seconds']:.3f}",
            ]
        )
    header = ["samples", "ranks", "LPT: busiest rank", "KK", "LPT: rounds", "KK", "LPT: plan CPU s", "KK"]
    return "\n".join(
        [
            "## LPT against Karmarkar-Karp",
            "",
            _prose(
                """Units (groups, or parts of them) over ranks by FLOPs of text and vision, medians of three draws.
                *Busiest rank*: its FLOPs over the mean, minus 1. *Rounds*: every micro-batch is a round of collectives;
                the sum over rounds of the slowest rank's FLOPs over the mean, minus 1, which is what is waited for."""
            ),
            "",
            table(header, rows),
        ]
    )


def _long(record: list[dict[str, Any]]) -> str:
    rows = [
        [
            row["case"],
            f"{row['tokens']:,}",
            f"{row['seconds']:.1f}",
            f"{row['bytes'] / MIB:,.0f}",
            f"{row['mask_bytes'] / MIB:,.0f}",
            f"{row['dense_mask_bytes'] / MIB:,.0f}",
        ]
        for row in record
    ]
    return "\n".join(
        [
            "## Long rows",
            "",
            _prose(
                f"""Attention alone, forward and backward, 4 heads of 32 over 2 key heads, fp32, in a process of its
                own; memory above what was held before ({record[0]["method"]}), gradients of q, k and v included."""
            ),
            "",
            table(["row", "tokens", "s", "memory MiB", "largest mask MiB", "a dense fp32 mask MiB"], rows),
        ]
    )


def _prose(text: str) -> str:
    return " ".join(textwrap.dedent(text).split())


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *(list(row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
