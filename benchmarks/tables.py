"""The tables of the kernel benchmark as markdown, from the record that ``--json`` writes."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.measure import MIB
from benchmarks.peers import OURS, PEERS, YARDSTICK

TITLES = {
    "reverse_kl": "Reverse KL, forward and backward",
    "grpo": "GRPO, forward and backward",
    "scoring": "Scoring (log-prob and entropy), forward",
}
UNITS = {"reverse_kl": 4, "grpo": 3, "scoring": 1}
# At this N, D, V: task, dtype, must reach, aim; our time relative to the yardstick's.
THRESHOLD_SHAPE = (2048, 1024, 32768)
TIME_THRESHOLDS = (
    ("reverse_kl", "bf16", 0.80, 0.55),
    ("reverse_kl", "fp32", 1.02, 0.98),
    ("grpo", "bf16", 0.85, 0.60),
    ("grpo", "fp32", 1.03, 0.98),
    ("scoring", "bf16", 0.75, 0.55),
)
ERROR_MUST, ERROR_AIM = 2e-3, 1e-3
MEMORY_MUST_MB, MEMORY_AIM_MB = 160, 64
# Bytes per logit that the naive form holds at its peak. Reverse KL: fp32 log-probs of both policies, the student's
# probabilities, the gap and their product; in backward two gradients in place of the teacher and the product. GRPO:
# log-probs, the gradient of the selection, that of the logits. Scoring: log-probs, probabilities, their product.
NAIVE_BYTES_PER_LOGIT = {"reverse_kl": 20, "grpo": 12, "scoring": 12}


def naive_bytes(task: str, shape: Sequence[int]) -> int:
    """What naive PyTorch needs beyond inputs and gradients."""
    return NAIVE_BYTES_PER_LOGIT[task] * shape[0] * shape[2]


def median(row: dict[str, Any]) -> float | None:
    return statistics.median(row["seconds"]) if row.get("seconds") else None


def ratio(table: dict[str, Any], peer: str, base: str) -> float | None:
    """Median time of ``peer`` over that of ``base`` in the same run; None if either has no time."""
    rows = {row["peer"]: row for row in table["rows"]}
    times = [median(rows[name]) if name in rows else None for name in (peer, base)]
    return None if times[0] is None or times[1] is None else times[0] / times[1]


def render(record: dict[str, Any]) -> str:
    parts = [_head(record)]
    if record["tables"]:
        parts.append(_thresholds(record))
        parts += [_time_table(table) for table in record["tables"]]
        parts.append(_memory_table(record))
    if record["large"]:
        parts.append(_large(record))
    if record.get("step"):
        parts.append(f"## The step\n\n```\n{record['step'].strip()}\n```")
    return "\n\n".join(parts) + "\n"


def _head(record: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    return "\n".join(
        [
            "# Kernel benchmark",
            "",
            f"Written by `{record.get('by') or record['command']}` on {record['date']}.",
            "",
            f"- machine: {record['machine']}; {record['threads']} threads; device {record['device']}; "
            f"{'AMX' if record['amx'] else 'no AMX'}",
            f"- {versions}",
            f"- measured by `{record['command']}`",
            f"- times: one process per peer, peers in turn in each of {record['repeats']} rounds after a warm-up. The "
            "yardstick is a loop of torch.mm over 512-token chunks in the same dtype with the products the task cannot "
            "do without. Compare ratios, which are of one run.",
            "- errors: relative Frobenius distance from fp64 on the same rounded inputs; *close*: teacher logits "
            f"{record['close_gap']:g} away instead of {record['gap']:g} (standard deviation).",
            f"- memory: beyond inputs and returned gradients, in a fresh process ({record['memory_method']}); for "
            "peers that compile, of the second call.",
        ]
    )


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *(list(row) for row in rows)]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _mib(num_bytes: int | None) -> str:
    return _number(None if num_bytes is None else num_bytes / MIB, ",.0f")


def _shape(shape: Iterable[int]) -> str:
    return "N={:,} D={:,} V={:,}".format(*shape)


def _time_table(table: dict[str, Any]) -> str:
    errors = list(dict.fromkeys(name for row in table["rows"] for name in row.get("errors", {})))
    close = list(dict.fromkeys(name for row in table["rows"] for name in row.get("close_errors", {})))
    header = ["peer", "version", "median s", "min", "max", "/ yardstick", "/ ours", "memory MiB"]
    energies = any(row.get("energy_j") is not None for row in table["rows"])
    header += ["mJ per token"] if energies else []
    header += [f"{name} error" for name in errors] + [f"{name} error, close" for name in close]
    lines, notes = [], []
    for row in table["rows"]:
        label = PEERS[row["peer"]].label
        if row.get("failure"):
            notes.append(f"- {label}: {row['failure']}")
        times = row.get("seconds")
        cells = [label, row["version"] or "not installed", _number(median(row), ".3f")]
        cells += [_number(pick(times) if times else None, ".3f") for pick in (min, max)]
        cells += [_number(ratio(table, row["peer"], base), ".2f") for base in (YARDSTICK, OURS)]
        cells.append(_mib(row.get("extra_bytes")))
        if energies:
            energy_j = row.get("energy_j")
            cells.append(_number(None if energy_j is None else 1e3 * energy_j / table["shape"][0], ".3g"))
        cells += [_number(row.get("errors", {}).get(name), ".1e") for name in errors]
        cells += [_number(row.get("close_errors", {}).get(name), ".1e") for name in close]
        lines.append(cells)
    floor = ["exact result rounded to " + table["dtype"], *["-"] * (8 if energies else 7)]
    floor += [_number(table["floor"].get(name), ".1e") for name in errors]
    floor += [_number(table["close_floor"].get(name), ".1e") for name in close]
    title = f"## {TITLES[table['task']]}, {table['dtype']}"
    units = f"{_shape(table['shape'])}; {UNITS[table['task']]} units."
    text = f"{title}\n\n{units}\n\n{_table(header, [*lines, floor])}"
    return text + ("\n\nNo figure (-):\n\n" + "\n".join(notes) if notes else "")


def _thresholds(record: dict[str, Any]) -> str:
    """The bounds set for 2 cores with AMX beside our figures, and which of them hold this machine to account."""
    rows = []

    def bound(name: str, found: float | None, form: str, must: float, aim: float, applies: str) -> None:
        verdict = "not measured" if found is None else "aim" if found <= aim else "must" if found <= must else "missed"
        rows.append([name, _number(found, form), f"≤ {must:g}", f"≤ {aim:g}", verdict, applies])

    tables = {(table["task"], table["dtype"]): table for table in record["tables"]}
    for task, dtype, must, aim in TIME_THRESHOLDS:
        table = tables.get((task, dtype))
        found = ratio(table, OURS, YARDSTICK) if table else None
        applies = _applies(record, needs_amx=dtype == "bf16")
        bound(f"{TITLES[task]}, {dtype} / yardstick", found, ".2f", must, aim, applies)
    ours = [row for (_, dtype), table in tables.items() if dtype == "bf16" for row in table["rows"] if _is_ours(row)]
    errors = [row["errors"]["dH"] for row in ours if "dH" in row.get("errors", {})]
    bound("dH error, bf16, largest", max(errors, default=None), ".1e", ERROR_MUST, ERROR_AIM, _applies(record))
    for vocab_size, megabytes in _our_memory(record).items():
        name = f"memory, largest of all tasks, V={vocab_size:,}, MB"
        bound(name, megabytes, ".0f", MEMORY_MUST_MB, MEMORY_AIM_MB, _applies(record))
    return "## Bounds\n\n" + _table(["ours", "measured", "must reach", "aim", "reached", "applies here"], rows)


def _is_ours(row: dict[str, Any]) -> bool:
    return bool(row["peer"] == OURS)


def _our_memory(record: dict[str, Any]) -> dict[int, float]:
    """V -> our largest memory in MB (10^6 bytes)."""
    largest: dict[int, float] = {}
    for table in [*record["tables"], *record["memory"]]:
        for row in table["rows"]:
            if _is_ours(row) and row.get("extra_bytes") is not None:
                vocab_size = table["shape"][2]
                largest[vocab_size] = max(largest.get(vocab_size, 0.0), row["extra_bytes"] / 1e6)
    return largest


def _applies(record: dict[str, Any], *, needs_amx: bool = False) -> str:
    if record["device"] != "cpu":
        return "no: set for a CPU"
    if needs_amx and not record["amx"]:
        return "no: without AMX the fp32 rows apply"
    if any(tuple(table["shape"]) != THRESHOLD_SHAPE for table in record["tables"]):
        return f"no: set for {_shape(THRESHOLD_SHAPE)}"
    return "yes"


def _memory_table(record: dict[str, Any]) -> str:
    columns = [*record["tables"], *record["memory"]]
    header = ["peer"] + [f"{t['task']} {t['dtype']} V={t['shape'][2]:,}" for t in columns]
    by_peer: dict[str, list[str]] = {}
    for column, table in enumerate(columns):
        for row in table["rows"]:
            cells = by_peer.setdefault(row["peer"], ["-"] * len(columns))
            cells[column] = _mib(row.get("extra_bytes"))
    lines = [[PEERS[peer].label, *cells] for peer, cells in by_peer.items()]
    lines.append(["naive form, computed", *(_mib(naive_bytes(t["task"], t["shape"])) for t in columns)])
    failures = {
        f"- {PEERS[row['peer']].label}, {t['task']} {t['dtype']} V={t['shape'][2]:,}: {row['failure']}"
        for t in record["memory"]
        for row in t["rows"]
        if "failure" in row and t["task"] in PEERS[row["peer"]].tasks
    }
    text = f"## Memory beyond inputs and gradients, MiB\n\n{_table(header, lines)}"
    return text + ("\n\n" + "\n".join(sorted(failures)) if failures else "")


def _large(record: dict[str, Any]) -> str:
    rows = []
    for run in record["large"]:
        cells = [
            run.get("failure") or f"{run['seconds']:.1f}",
            _mib(run.get("extra_bytes")),
            _mib(run.get("peak_bytes")),
        ]
        rows.append([TITLES[run["task"]], *cells, _mib(naive_bytes(run["task"], run["shape"]))])
    first = record["large"][0]
    header = ["ours", "s", "beyond inputs and gradients, MiB", "peak of the process, MiB", "naive form, computed, MiB"]
    factors = ", ".join(f"{NAIVE_BYTES_PER_LOGIT[run['task']]} ({run['task']})" for run in record["large"])
    note = (
        f"{_shape(first['shape'])}, {first['dtype']}. The naive form's need, too, is beyond inputs and gradients; "
        f"bytes per logit: {factors}."
    )
    return f"## A large vocabulary\n\n{note}\n\n{_table(header, rows)}"
