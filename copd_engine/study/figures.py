"""The figures of a study's page: means over seeds, and 95 % intervals over seeds as bars or bands."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from copd_engine.report.curves import BRANCH_COLORS
from copd_engine.report.figures import PHASE_COLOR, STYLE, png_bytes
from copd_engine.report.run import phase_spans
from copd_engine.study.claims import correlation_note, overlap_and_gain
from copd_engine.study.config import PILOT, Measure, StepsConfig, StudyConfig, SweepConfig
from copd_engine.study.results import Results, of_seeds
from copd_engine.study.statistics import t_interval

LABELS: dict[Measure, str] = {
    "overlap": "top-k overlap, k = {k}",
    "sum_min": "Σ min(p, q)",
    "symmetric_kl": "symmetric KL (nats per token)",
}
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


@dataclass(frozen=True)
class Picture:
    """A figure as PNG. ``key``: its file name without ending."""

    key: str
    title: str
    caption: str
    png: bytes


def draw_study(study: StudyConfig, results: Results) -> list[Picture]:
    """Every figure that there are numbers for."""
    pictures = []
    with mpl.rc_context(STYLE):
        for steps in study.steps:
            ax = _axes()
            if _draw_steps(ax, steps, results):
                caption = (
                    f"{_sentence(_label(steps, results))}: mean over pairs of branches and seeds; band: "
                    f"95 % interval over seeds; shaded: phase II.{_curves_of_fewer_seeds(steps, results)}"
                )
                pictures.append(_picture(ax, steps.title, caption))
        for sweep in study.sweeps:
            ax = _axes()
            if _draw_sweep(ax, sweep, results):
                caption = f"Held-out accuracy ({sweep.domain}), mean over seeds; bars: 95 % interval over seeds."
                pictures.append(_picture(ax, sweep.title, caption + _points_of_fewer_seeds(sweep, results)))
        for per_headroom in (False, True) if study.pilot is not None else ():
            assert study.pilot is not None
            ax = _axes()
            if _draw_pilot(ax, results, per_headroom):
                gain = "gain per headroom" if per_headroom else "gain"
                title = f"Pilot: {gain} from distillation against starting overlap"
                caption = (
                    f"Teacher: the {study.pilot.teacher} expert. One point per student and seed; lines: least squares "
                    f"in each seed. What decides is r by seed, t test of Fisher's z: "
                    f"{correlation_note(results, per_headroom)}."
                )
                pictures.append(_picture(ax, title, caption))
    return _with_keys(pictures)


def _with_keys(pictures: Sequence[Picture]) -> list[Picture]:
    """File names out of the titles: lower case ASCII, with a number where that leaves two the same, or nothing."""
    named: dict[str, Picture] = {}
    for picture in pictures:
        key = slug = re.sub(r"[^a-z0-9]+", "-", picture.title.lower()).strip("-") or "figure"
        number = 1
        while key in named:
            number += 1
            key = f"{slug}-{number}"
        named[key] = replace(picture, key=key)
    return list(named.values())


def _axes() -> Axes:
    return Figure(figsize=(6.4, 3.8), layout="constrained").add_subplot()


def _picture(ax: Axes, title: str, caption: str) -> Picture:
    ax.set_title(title)
    if ax.get_legend_handles_labels()[0]:
        ax.legend()
    figure = ax.figure
    assert isinstance(figure, Figure)
    return Picture("", title, caption, png_bytes(figure, dpi=140))


def _label(config: StepsConfig, results: Results) -> str:
    ks = dict.fromkeys(str(results.top_k(variant)) for variant in config.lines.values())
    return LABELS[config.measure].format(k=", ".join(ks))


def _sentence(label: str) -> str:
    return label[0].upper() + label[1:]


def _draw_steps(ax: Axes, config: StepsConfig, results: Results) -> bool:
    drawn = False
    for index, (label, variant) in enumerate(config.lines.items()):
        curves = [c for seed in results.seeds if (c := results.curve(variant, config.measure, seed))]
        steps = sorted(set.intersection(*(set(c) for c in curves))) if curves else []
        if not steps:
            continue
        drawn = True
        intervals = [t_interval([curve[step] for curve in curves]) for step in steps]
        color = BRANCH_COLORS[index % len(BRANCH_COLORS)]
        ax.plot(steps, [i.value for i in intervals], color=color, label=label, marker=".", markersize=4)
        low, high = ([getattr(i, end) for i in intervals] for end in ("low", "high"))
        ax.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
    for variant in config.lines.values():
        _shade_phase_2(ax, variant, results)
    ax.set(xlabel="optimizer step", ylabel=_label(config, results))
    if config.measure == "symmetric_kl" and drawn:
        ax.set_yscale("log")
    return drawn


def _shade_phase_2(ax: Axes, variant: str, results: Results) -> None:
    """Where the first finished seed of a variant has its phases II; a fixed schedule has them there in all."""
    seed = next((seed for seed in results.seeds if (variant, seed) in results.finished), None)
    for span in phase_spans(results.records(variant, seed)) if seed is not None else ():
        if span.phase == "opd":
            ax.axvspan(span.first_step - 1, span.last_step, color=PHASE_COLOR, linewidth=0, zorder=0)


def _draw_sweep(ax: Axes, config: SweepConfig, results: Results) -> bool:
    settings = sorted({setting for line in config.lines.values() for setting in line})
    drawn = False
    for index, (label, line) in enumerate(config.lines.items()):
        found = {x: list(results.accuracies(model, config.domain).values()) for x, model in sorted(line.items())}
        found = {x: values for x, values in found.items() if values}
        if not found:
            continue
        drawn = True
        intervals = [t_interval(values) for values in found.values()]
        means = [100 * i.value for i in intervals]
        errors = [50 * (i.high - i.low) for i in intervals]  # NaN, of one seed, is no bar
        # Settings at equal distances, whatever their numbers; lines side by side, so that their bars can be told apart.
        x = [settings.index(setting) + 0.06 * (index - (len(config.lines) - 1) / 2) for setting in found]
        color = BRANCH_COLORS[index % len(BRANCH_COLORS)]
        ax.errorbar(x, means, errors, color=color, label=label, marker=MARKERS[index % len(MARKERS)], capsize=3)
    ax.set_xticks(range(len(settings)), [f"{setting:g}" for setting in settings])
    ax.set(xlabel=config.x_label, ylabel="accuracy (%)")
    return drawn


def _curves_of_fewer_seeds(config: StepsConfig, results: Results) -> str:
    counts = {
        label: sum(bool(results.curve(variant, config.measure, seed)) for seed in results.seeds)
        for label, variant in config.lines.items()
    }
    return _of_fewer_seeds(counts, results)


def _points_of_fewer_seeds(config: SweepConfig, results: Results) -> str:
    counts = {
        f"{label} at {setting:g}": len(results.accuracies(model, config.domain))
        for label, line in config.lines.items()
        for setting, model in sorted(line.items())
    }
    return _of_fewer_seeds(counts, results)


def _of_fewer_seeds(counts: Mapping[str, int], results: Results) -> str:
    few = [label + text for label, n in counts.items() if (text := of_seeds(n, len(results.seeds)))]
    return f" Not of all seeds: {', '.join(few)}." if few else ""


def _draw_pilot(ax: Axes, results: Results, per_headroom: bool) -> bool:
    drawn = False
    for index, seed in enumerate(seed for seed in results.seeds if (PILOT, seed) in results.finished):
        x, gains = overlap_and_gain(results, [seed], per_headroom)
        y = [100 * gain for gain in gains]
        color, marker = BRANCH_COLORS[index % len(BRANCH_COLORS)], MARKERS[index % len(MARKERS)]
        ax.scatter(x, y, color=color, marker=marker, s=24, label=f"seed {seed}")
        _draw_fit(ax, x, y, color)
        drawn = drawn or bool(x)
    ylabel = "gain in accuracy (% of the headroom)" if per_headroom else "gain in accuracy (points)"
    k = results.top_k(PILOT)
    ax.set(xlabel=f"top-k overlap before distillation, k = {k}", ylabel=ylabel)
    return drawn


def _draw_fit(ax: Axes, x: Sequence[float], y: Sequence[float], color: str) -> None:
    if len(x) > 2 and np.ptp(x) > 0:
        slope, intercept = np.polyfit(x, y, 1)
        ends = np.array([min(x), max(x)])
        ax.plot(ends, slope * ends + intercept, color=color, linewidth=1, alpha=0.6)
