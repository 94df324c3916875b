"""The figures of a report: which there are, the frame around their curves, and the PNG files."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from copd_engine.report.curves import (
    BranchValue,
    Draw,
    draw_accuracy,
    draw_gpus,
    draw_memory,
    draw_pairs,
    draw_per_branch,
    draw_time,
)
from copd_engine.report.run import SMOOTHING_STEPS, Record, Run, mean, nested, own_rollout, phase_spans

PHASE_COLOR = "#fdf0cf"
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": "#333333",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "lines.linewidth": 1.8,
    "legend.fontsize": 8,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Panel:
    """One figure. ``draw`` returns the handles of its legend, or None where the run has no data for it."""

    key: str
    section: str
    title: str
    caption: str
    draw: Draw


def _zero_variance_fraction(record: Record, branch: str) -> float | None:
    zero, groups = (own_rollout(record, branch, key) for key in ("zero_variance_groups", "num_groups"))
    return None if zero is None or not groups else zero / groups


def _teacher_kl(record: Record, branch: str) -> float | None:
    terms = nested(record, "branches", branch, "terms") or {}
    return mean(term.get("reverse_kl") for name, term in terms.items() if name.startswith("opd:") and term)


def _of_branch(key: str) -> BranchValue:
    return lambda record, branch: nested(record, "branches", branch, key)


def _own(key: str) -> BranchValue:
    return lambda record, branch: own_rollout(record, branch, key)


SMOOTHED = f"Thin: each step. Thick: centred mean over {SMOOTHING_STEPS} steps."
PROGRESS = "Reward and held-out accuracy"
BETWEEN = "Between the branches"
REWARD = Panel(
    "reward", PROGRESS, "Mean reward on the branch's own prompts",
    f"{SMOOTHED} A dashed or dotted line is a baseline, smoothed the same way.",
    draw_per_branch(_own("reward_mean"), baselines=True),
)  # fmt: skip
SUM_MIN = Panel(
    "sum_min", BETWEEN, "Σ min(p, q)",
    "Probability mass that two branches share; 1 means equal distributions.",
    draw_pairs("sum_min"),
)  # fmt: skip
KL = Panel(
    "symmetric_kl", BETWEEN, "Symmetric KL (nats per token, log axis)",
    "KL(p‖q) + KL(q‖p) over the full vocabulary, averaged over the student's states. Without step 0, where it is 0.",
    draw_pairs("symmetric_kl", log=True),
)  # fmt: skip


def overlap_panel(run: Run) -> Panel:
    """(OVERLAP) with the run's own k."""
    diagnostics = run.config.get("diagnostics")
    k = diagnostics.get("top_k", "k") if isinstance(diagnostics, dict) else "k"
    caption = f"Share of the {k} likeliest tokens that two branches share, on the student's states, both directions."
    return Panel("overlap", BETWEEN, f"Top-{k} overlap", caption, draw_pairs("overlap"))


def panels(run: Run) -> list[Panel]:
    """All figures, in the order of the report."""
    accuracy = []
    for domain in ("average", *run.domains):
        title = "Held-out accuracy, average" if domain == "average" else f"Held-out accuracy on {domain}"
        accuracy.append(Panel(f"accuracy_{_slug(domain)}", PROGRESS, title, "", draw_accuracy(domain)))

    def training(key: str, title: str, value: BranchValue, note: str = "", *, log: bool = False) -> Panel:
        return Panel(key, "Training", title, f"{note} {SMOOTHED}".strip(), draw_per_branch(value, log=log))

    teachers = Panel(
        "teacher_kl", BETWEEN, "Distillation: reverse KL to the teachers (log axis)",
        "On the prompts of the teachers in phase II, mean over a student's teachers.",
        draw_per_branch(_teacher_kl, log=True, smoothed=False),
    )  # fmt: skip
    health = [
        training("loss", "Loss", _of_branch("loss")),
        training("grad_norm", "Gradient norm before clipping (log axis)", _of_branch("grad_norm"), log=True),
        training("entropy", "Entropy (nats per token)", _of_branch("entropy")),
        training("response_tokens", "Response length (tokens)", _own("response_tokens_mean"), "On own prompts."),
        training("truncated", "Responses cut at the length limit (share)", _own("truncated_fraction")),
        training("zero_variance", "Groups with equal rewards (share)", _zero_variance_fraction, "No signal for GRPO."),
        training("clip_fraction", "Clipped tokens (share)", _of_branch("clip_fraction")),
        training("mismatch", "Sampler against trainer: |Δ log-prob| (log axis)", _of_branch("mismatch_mean"), log=True),
    ]  # fmt: skip
    at_end = f"Read at the end of each step. {SMOOTHED}"
    cost = [
        Panel("time", "Time and memory", "Seconds per step, by part", "", draw_time),
        Panel("memory", "Time and memory", "Memory in use (GiB)", "", draw_memory),
        Panel("gpu_utilization", "Time and memory", "GPU utilisation (%)", at_end, draw_gpus("utilization_percent")),
        Panel("gpu_power", "Time and memory", "GPU power (W)", at_end, draw_gpus("power_w")),
    ]
    return [REWARD, *accuracy, overlap_panel(run), SUM_MIN, KL, teachers, *health, *cost]


def draw_panel(ax: Axes, panel: Panel, run: Run) -> bool:
    """A panel with phases shaded, legend between title and axes; whether the run had data for it."""
    handles = panel.draw(ax, run)
    spans = [span for span in phase_spans(run.records) if span.phase == "opd"]
    if handles is None:
        ax.text(0.5, 0.5, "not in the metrics", transform=ax.transAxes, ha="center", va="center", color="#888888")
        ax.set(xticks=[], yticks=[])
        ax.set_title(panel.title)
        return False
    for span in spans:  # a value at step s is the state after s: phase II runs from the state before its first step
        ax.axvspan(span.first_step - 1, span.last_step, color=PHASE_COLOR, linewidth=0, zorder=0)
    if spans:
        handles = [*handles, Patch(facecolor=PHASE_COLOR, edgecolor="#d8c48a", linewidth=0.5, label="phase II")]
    ax.set_xlabel("optimizer step")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    ax.set_xlim(0, max(1.0, ax.dataLim.x1) * 1.01)
    if ax.get_yscale() == "linear":  # matplotlib's own would put a factor like 1e-7 where the legend stands
        ax.ticklabel_format(axis="y", style="plain", useOffset=False)
    rows = _legend_rows(handles)
    columns = max(len(row) for row in rows)
    legend = ax.legend(
        # matplotlib fills column by column; the order is to read row by row
        handles=[row[i] for i in range(columns) for row in rows if i < len(row)],
        loc="lower left",
        bbox_to_anchor=(-0.01, 1.0),
        ncols=columns,
        borderaxespad=0.2,
        handlelength=1.8,
        columnspacing=1.0,
        handletextpad=0.6,
    )
    legend.set_in_layout(False)  # a long legend must not narrow the axes; the title's pad holds its height
    ax.set_title(panel.title, pad=8 + 13 * len(rows))
    return True


def _legend_rows(handles: list[Any], width: int = 94) -> list[list[Any]]:
    """Equal rows of legend entries, each at most ``width`` characters (an entry's line counts as six)."""
    for columns in range(len(handles), 1, -1):
        rows = [handles[i : i + columns] for i in range(0, len(handles), columns)]
        widths = [max(len(str(row[i].get_label())) for row in rows if i < len(row)) + 6 for i in range(columns)]
        if sum(widths) <= width:
            return rows
    return [[handle] for handle in handles]


def draw_figures(run: Run) -> list[tuple[Panel, bytes]]:
    """Every panel that the run has data for, as PNG."""
    figures = []
    with mpl.rc_context(STYLE):
        for panel in panels(run):
            figure = Figure(figsize=(6.4, 3.6), layout="constrained")
            if draw_panel(figure.add_subplot(), panel, run):
                figures.append((panel, png_bytes(figure, dpi=140)))
    return figures


def draw_combined(run: Run, title: str) -> bytes:
    """The four figures that tell the story, as one PNG of 1600 x 1060 pixels."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(12.8, 8.48), layout=ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.12))
        figure.suptitle(title, x=0.012, ha="left", fontsize=12.5, fontweight="bold", color="#222222")
        for ax, panel in zip(figure.subplots(2, 2).flat, (REWARD, overlap_panel(run), SUM_MIN, KL), strict=True):
            draw_panel(ax, panel, run)
        return png_bytes(figure, dpi=125)


def png_bytes(figure: Figure, dpi: int) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor="white")
    return buffer.getvalue()


def _slug(name: str) -> str:
    return re.sub(r"[^a-zA-Z0-9_-]+", "_", name)
