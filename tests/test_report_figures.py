"""The report's figures: their curves, colours and shades are those of the records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from copd_engine.metrics import MetricsLog
from copd_engine.report import write_report
from copd_engine.report.figures import PHASE_COLOR, draw_panel, panels
from copd_engine.report.run import (
    PhaseSpan,
    diagnosed_pairs,
    load_run,
    own_rollout,
    pair_value,
    phase_changes,
    phase_spans,
    smooth,
    time_by_part,
)
from tests import report_run
from tests.report_run import make_gpu, make_run

run_dir = report_run.run_dir

# ---------------------------------------------------------------------------------------- pure functions


def test_phase_spans_follow_the_records() -> None:
    phases = ["base", "rl", "rl", "opd", "rl", "opd", "opd"]
    cycles = [0, 1, 1, 1, 2, 2, 2]
    records = [{"step": s, "phase": p, "cycle": c} for s, (p, c) in enumerate(zip(phases, cycles, strict=True))]
    assert phase_spans(records) == [
        PhaseSpan(1, "rl", 1, 2),
        PhaseSpan(1, "opd", 3, 3),
        PhaseSpan(2, "rl", 4, 4),
        PhaseSpan(2, "opd", 5, 6),
    ]


def test_phase_spans_part_cycles_without_phase_ii() -> None:
    records = [{"step": s, "phase": "rl", "cycle": 1 + (s > 2)} for s in range(1, 5)]
    assert phase_spans(records) == [PhaseSpan(1, "rl", 1, 2), PhaseSpan(2, "rl", 3, 4)]
    assert phase_spans([]) == []


def test_phase_changes_start_from_the_step_before() -> None:
    def record(step: int, phase: str, overlap: float | None) -> dict[str, Any]:
        pairs = [
            {"student": "a", "teacher": "b", "overlap": overlap},
            {"student": "b", "teacher": "a", "overlap": overlap},
        ]
        return {"step": step, "cycle": 1, "phase": phase, "diagnostics": {"pairs": pairs} if overlap else None}

    records = [record(0, "base", 1.0), record(1, "rl", 0.9), record(2, "rl", 0.8), record(3, "opd", None)]
    rl, opd = phase_changes([*records, record(4, "opd", 0.95)], ["overlap"])
    assert (rl.before, rl.after) == ({"overlap": 1.0}, {"overlap": 0.8})
    assert (opd.before, opd.after) == ({"overlap": 0.8}, {"overlap": 0.95})
    assert len(phase_changes(records, ["overlap"])) == 1  # phase II has no diagnostics of its own there


def test_smooth_is_a_centred_mean_that_keeps_gaps() -> None:
    values = np.array([1.0, 2.0, np.nan, 4.0, 5.0, 9.0])
    expected = [1.5, 7 / 3, np.nan, 5.0, 6.0, 6.0]
    np.testing.assert_allclose(smooth(values, 5), expected)
    np.testing.assert_allclose(smooth(np.array([3.0]), 5), [3.0])  # fewer values than the window


def test_pair_value_is_the_mean_of_both_directions() -> None:
    pairs = [
        {"student": "a", "teacher": "b", "overlap": 0.9},
        {"student": "b", "teacher": "a", "overlap": 0.7},
        {"student": "a", "teacher": "c", "overlap": 0.5},
        {"student": "c", "teacher": "a", "overlap": None},
    ]
    record = {"step": 1, "diagnostics": {"pairs": pairs}}
    assert pair_value(record, "overlap", ("b", "a")) == pytest.approx(0.8)
    assert pair_value(record, "overlap", ("a", "c")) == 0.5
    assert pair_value(record, "overlap") == pytest.approx(0.7)
    assert pair_value({"step": 2, "diagnostics": None}, "overlap") is None
    assert diagnosed_pairs([record], ("a", "b", "c")) == [("a", "b"), ("a", "c")]


def test_own_rollout_takes_the_branch_or_the_mean_over_domains() -> None:
    rollout = {"text": {"reward_mean": 0.5}, "image": {"reward_mean": 0.9}}
    record = {"step": 1, "branches": {"text": {"rollout": rollout}, "mixed": {"rollout": rollout}}}
    assert own_rollout(record, "text", "reward_mean") == 0.5
    assert own_rollout(record, "mixed", "reward_mean") == pytest.approx(0.7)
    assert own_rollout(record, "absent", "reward_mean") is None


def test_time_parts_add_up_to_the_step() -> None:
    records = [{"step": s, "step_s": 1.0, "time_s": {"update": 0.25, "rollout": 0.5, "sync": 0.0}} for s in (1, 2)]
    parts = time_by_part(records)
    assert list(parts) == ["rollout", "update", "other"]  # largest first, nothing for a part that took no time
    np.testing.assert_allclose(sum(parts.values()), [1.0, 1.0])


# ---------------------------------------------------------------------------------------- figures


def test_pngs_are_written(run_dir: Path) -> None:
    with Image.open(run_dir / "report.png") as combined:
        assert 1400 <= combined.width <= 1800
    names = {path.stem for path in (run_dir / "figures").glob("*.png")}
    assert {"reward", "overlap", "sum_min", "symmetric_kl", "loss", "grad_norm", "entropy", "time", "memory"} <= names
    assert {"gpu_utilization", "gpu_power"} <= names
    assert {"accuracy_average", "accuracy_text", "response_tokens", "truncated", "teacher_kl"} <= names


def test_phases_are_shaded_where_the_records_say(run_dir: Path) -> None:
    run = load_run(run_dir)
    for panel in panels(run):
        ax = Figure().add_subplot()
        assert draw_panel(ax, panel, run)
        shaded = [p for p in ax.patches if isinstance(p, Rectangle) and to_hex(p.get_facecolor()) == PHASE_COLOR]
        # from the state before the phase's first step (7, 17) to the state after its last
        assert [(p.get_x(), p.get_x() + p.get_width()) for p in shaded] == [(6, 10), (16, 20)]


def test_one_colour_per_branch_in_all_figures(run_dir: Path) -> None:
    run = load_run(run_dir)
    colors: dict[str, set[str]] = {name: set() for name in run.branches}
    for panel in panels(run):
        for handle in panel.draw(Figure().add_subplot(), run) or []:
            if handle.get_label() in colors:
                colors[handle.get_label()].add(to_hex(handle.get_color()))
    assert all(len(found) == 1 for found in colors.values())
    assert len(set.union(*colors.values())) == len(run.branches)


def test_baselines_are_dashed_in_the_curves_between_branches(run_dir: Path) -> None:
    run = load_run(run_dir)
    for panel in panels(run):
        if panel.key in ("reward", "overlap", "sum_min", "symmetric_kl", "accuracy_average", "accuracy_text"):
            ax = Figure().add_subplot()
            labels = [handle.get_label() for handle in panel.draw(ax, run) or []]
            assert "independent experts" in labels
            base_level = "#888888"
            dashed = [line for line in ax.lines if line.get_linestyle() == "--" and line.get_color() != base_level]
            assert len(dashed) == 3  # three branches, three pairs


def test_gpu_lines_are_the_recorded_numbers(run_dir: Path) -> None:
    run = load_run(run_dir)
    lines = {}
    for panel in panels(run):
        if panel.key.startswith("gpu_"):
            ax = Figure().add_subplot()
            labels = [handle.get_label() for handle in panel.draw(ax, run) or []]
            lines[panel.key] = labels, [list(line.get_ydata()) for line in ax.lines]
    steps = np.arange(1, 21)
    labels, (measured, _, idle, _) = lines["gpu_utilization"]  # each GPU as measured, then smoothed
    assert labels == ["GPU 0", "GPU 1"]
    assert measured == list(80.0 - steps)
    assert idle == [0.0] * 20
    labels, (measured, _) = lines["gpu_power"]  # the second GPU does not tell its power
    assert labels == ["GPU 0"]
    assert measured == list(600.0 + steps)


@pytest.mark.parametrize("gpu", [None, [], [None], [make_gpu(None, None)]])
def test_no_gpu_figure_without_numbers(tmp_path: Path, gpu: list[Any] | None) -> None:
    with MetricsLog(tmp_path) as log:
        for step in (1, 2):
            log.write({"step": step, "phase": "rl", "cycle": 1, "system": {"rss_bytes": 2**30, "gpu": gpu}})
    html = write_report(tmp_path).read_text()
    assert "Memory in use" in html
    assert "GPU utilisation" not in html
    assert "GPU power" not in html
    assert {path.stem for path in (tmp_path / "figures").glob("*.png")} == {"memory"}


@pytest.mark.parametrize("num_branches", [1, 2, 8])
def test_any_number_of_branches(tmp_path: Path, num_branches: int) -> None:
    branches = tuple(f"task_{i}" for i in range(num_branches))
    html = write_report(make_run(tmp_path / "run", branches, cycles=1, rl_steps=2, opd_steps=1)).read_text()
    assert all(name in html for name in branches)
    assert (tmp_path / "run" / "figures" / "overlap.png").exists() == (num_branches > 1)
