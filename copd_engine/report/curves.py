"""Lines and areas of one figure: each ``draw`` puts what the run has on given axes and returns the legend's handles."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from copd_engine.report.run import (
    METHOD_NAMES,
    SMOOTHING_STEPS,
    Record,
    Run,
    curve,
    diagnosed_pairs,
    distinct,
    known_points,
    nested,
    pair_value,
    smooth,
    time_by_part,
)

BranchValue = Callable[[Record, str], float | None]
Draw = Callable[[Axes, Run], list[Any] | None]

MAX_PAIR_LINES = 6
# Safe for colour-blind readers: Okabe-Ito for branches, Tol's muted for pairs, so that no pair looks like a branch.
BRANCH_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#6b6b6b")
PAIR_COLORS = ("#332288", "#aa4499", "#999933", "#661100", "#44aa99", "#777777")
PART_COLORS = ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#aa3377", "#bbbbbb", "#775533", "#dddddd")
DASHES: tuple[Literal["--", ":", "-."], ...] = ("--", ":", "-.")


def branch_color(run: Run, branch: str) -> str:
    return BRANCH_COLORS[run.branches.index(branch) % len(BRANCH_COLORS)] if branch in run.branches else "#444444"


def _baseline_handles(run: Run, drawn: Iterable[str]) -> list[Line2D]:
    return [
        Line2D([], [], color="#555555", linestyle=_dash(run, name), linewidth=1.3, label=METHOD_NAMES.get(name, name))
        for name in run.baselines
        if name in set(drawn)
    ]


def _dash(run: Run, baseline: str) -> Literal["--", ":", "-."]:
    return DASHES[list(run.baselines).index(baseline) % len(DASHES)]


def _plot(ax: Axes, x: np.ndarray, y: np.ndarray, *, log: bool = False, **style: Any) -> bool:
    y = np.where(y > 0, y, np.nan) if log else y
    if np.isnan(y).all():
        return False
    ax.plot(x, y, **style)
    return True


def draw_per_branch(value: BranchValue, *, log: bool = False, smoothed: bool = True, baselines: bool = False) -> Draw:
    """One line per branch: thin and pale as measured, thick smoothed; of a baseline only the smoothed one, dashed."""

    def draw(ax: Axes, run: Run) -> list[Any] | None:
        handles: list[Any] = []
        drawn = set()
        for name in run.baselines if baselines else ():
            records = run.baselines[name]
            for branch in distinct(b for record in records for b in record.get("branches") or {}):
                x, y = curve(records, value, branch)
                color = branch_color(run, branch)
                if _plot(ax, x, smooth(y), log=log, color=color, linestyle=_dash(run, name), linewidth=1.2, alpha=0.8):
                    drawn.add(name)
        for branch in run.branches:
            x, y = curve(run.records, value, branch)
            color, num_known = branch_color(run, branch), int(np.isfinite(y).sum())
            marker = "o" if num_known <= 3 else None
            if smoothed and num_known > 2 * SMOOTHING_STEPS:
                _plot(ax, x, y, log=log, color=color, linewidth=0.7, alpha=0.35)
                y = smooth(y)
            if _plot(ax, x, y, log=log, color=color, marker=marker, markersize=4):
                handles.append(Line2D([], [], color=color, marker=marker, markersize=4, label=branch))
        if log and handles:
            ax.set_yscale("log")
        return [*handles, *_baseline_handles(run, drawn)] or None

    return draw


def draw_pairs(key: str, *, log: bool = False) -> Draw:
    """One line per pair of branches, baselines dashed; with many pairs their mean and range instead.

    A log axis leaves out step 0: all branches still are the base there, and the rounding error around KL = 0 would
    squeeze the curves into a strip.
    """

    def points(records: list[Record], pair: tuple[str, str] | None) -> tuple[np.ndarray, np.ndarray]:
        return known_points(*curve([r for r in records if r["step"] > 0 or not log], pair_value, key, pair))

    def draw(ax: Axes, run: Run) -> list[Any] | None:
        pairs = diagnosed_pairs(run.records, run.branches)
        lines: list[tuple[str, str, tuple[str, str] | None]]
        if len(pairs) > MAX_PAIR_LINES:
            lines = [(f"mean of {len(pairs)} pairs", "#222222", None)]
            measured = [r for r in run.records if all(pair_value(r, key, pair) is not None for pair in pairs)]
            ys = np.array([points(measured, pair)[1] for pair in pairs])
            steps = points(measured, pairs[0])[0]
            ax.fill_between(steps, ys.min(axis=0), ys.max(axis=0), color="#999999", alpha=0.3, lw=0)
        else:
            lines = [(f"{a} - {b}", color, (a, b)) for (a, b), color in zip(pairs, PAIR_COLORS, strict=False)]
        handles: list[Any] = []
        drawn = set()
        for label, color, pair in lines:
            for name, records in run.baselines.items():
                x, y = points(records, pair)
                if _plot(ax, x, y, log=log, color=color, linestyle=_dash(run, name), linewidth=1.2, alpha=0.8):
                    drawn.add(name)
            x, y = points(run.records, pair)
            if _plot(ax, x, y, log=log, color=color, marker="o" if len(x) <= 3 else None, markersize=4):
                handles.append(Line2D([], [], color=color, label=label))
        if len(pairs) > MAX_PAIR_LINES and handles:
            handles.append(Patch(color="#999999", alpha=0.3, label="lowest to highest"))
        if log and handles:
            ax.set_yscale("log")
        return [*handles, *_baseline_handles(run, drawn)] or None

    return draw


def draw_accuracy(domain: str) -> Draw:
    """Held-out accuracy of every branch in one domain, baselines dashed; base and merged model from the result."""

    def points(records: list[Record], branch: str) -> tuple[np.ndarray, np.ndarray]:
        def accuracy(record: Record) -> float | None:
            start = nested(record, "evaluate", "base", domain) if record["step"] == 0 else None
            own = nested(record, "evaluate", branch, domain)
            return start if own is None else own

        return known_points(*curve(records, accuracy))

    def draw(ax: Axes, run: Run) -> list[Any] | None:
        handles: list[Any] = []
        drawn = set()
        for name, records in run.baselines.items():
            for branch in distinct(b for r in records for b in r.get("evaluate") or {} if b not in ("base", "merged")):
                color = branch_color(run, branch)
                if _plot(ax, *points(records, branch), color=color, linestyle=_dash(run, name), lw=1.2, alpha=0.8):
                    drawn.add(name)
        for branch in run.branches:
            x, y = points(run.records, branch)
            color = branch_color(run, branch)
            if len(x) and _plot(ax, x, y, color=color, marker="o", markersize=4):
                handles.append(Line2D([], [], color=color, marker="o", markersize=4, label=branch))
        if not handles:
            return None
        for row in (run.result or {}).get("rows", []):
            accuracy = nested(row, "accuracy", domain)
            if accuracy is None:
                continue
            if row.get("kind") == "base":
                ax.axhline(accuracy, color="#888888", linestyle=(0, (1, 2)), linewidth=1.2)
                handles.append(Line2D([], [], color="#888888", linestyle=(0, (1, 2)), label="base"))
            elif row.get("kind") == "merged":
                style: dict[str, Any] = {"marker": "D", "color": "#111111", "markersize": 6, "linestyle": "none"}
                ax.plot([run.last_step], [accuracy], clip_on=False, zorder=5, **style)
                handles.append(Line2D([], [], label="merged", **style))
        return [*handles, *_baseline_handles(run, drawn)]

    return draw


def draw_time(ax: Axes, run: Run) -> list[Any] | None:
    records = [record for record in run.records if record["step"] >= 1]
    parts = time_by_part(records)
    if not parts:
        return None
    steps = np.array([record["step"] for record in records], dtype=float)
    edges = np.concatenate([steps[:1] - 1, steps])
    below = np.zeros(len(steps))
    handles = []
    for (name, seconds), color in zip(parts.items(), itertools.cycle(PART_COLORS), strict=False):
        ax.stairs(below + seconds, edges, baseline=below, fill=True, color=color, linewidth=0)
        below = below + seconds
        handles.append(Patch(color=color, label=name))
    ax.set_ylim(0)
    return handles


def draw_memory(ax: Axes, run: Run) -> list[Any] | None:
    """Resident memory, and memory in use of each GPU."""
    handles: list[Any] = []
    styles: dict[str, dict[str, Any]] = {"resident memory (CPU)": {"color": "#222222"}}
    curves = [curve(run.records, nested, "system", "rss_bytes")]
    for gpu in range(_num_gpus(run)):
        styles[f"GPU {gpu}"] = _gpu_style(gpu)
        curves.append(curve(run.records, _gpu_value, gpu, "memory_used_bytes"))
    for (label, style), (x, y) in zip(styles.items(), itertools.starmap(known_points, curves), strict=True):
        if len(x) and _plot(ax, x, y / 2**30, marker="o" if len(x) <= 3 else None, markersize=4, **style):
            handles.append(Line2D([], [], label=label, **style))
    if handles:
        ax.set_ylim(0, 1.08 * ax.dataLim.y1)
    return handles or None


def draw_gpus(key: str) -> Draw:
    """One line per GPU for a number of its own, pale as measured and thick smoothed."""

    def draw(ax: Axes, run: Run) -> list[Any] | None:
        handles: list[Any] = []
        for gpu in range(_num_gpus(run)):
            x, y = known_points(*curve(run.records, _gpu_value, gpu, key))
            style = _gpu_style(gpu)
            if len(x) > 2 * SMOOTHING_STEPS:
                _plot(ax, x, y, **style | {"linewidth": 0.7, "alpha": 0.35})
                y = smooth(y)
            if _plot(ax, x, y, marker="o" if len(x) <= 3 else None, markersize=4, **style):
                handles.append(Line2D([], [], label=f"GPU {gpu}", **style))
        if handles:
            ax.set_ylim(0, 1.08 * max(ax.dataLim.y1, 1.0))  # an idle GPU is 0 throughout
        return handles or None

    return draw


def _num_gpus(run: Run) -> int:
    return max((len(nested(record, "system", "gpu") or []) for record in run.records), default=0)


def _gpu_style(gpu: int) -> dict[str, Any]:
    """A machine may have more GPUs than there are colours: the next ones are dashed."""
    turn, color = divmod(gpu, len(PAIR_COLORS))
    return {"color": PAIR_COLORS[color], "linestyle": ("-", *DASHES)[turn % (len(DASHES) + 1)]}


def _gpu_value(record: Record, index: int, key: str) -> float | None:
    gpus = nested(record, "system", "gpu") or []
    value = nested(gpus[index], key) if index < len(gpus) else None
    return value if isinstance(value, int | float) else None
