"""The report: its numbers are those of the run folder, its text is escaped, and an unfinished run still gets one."""

from __future__ import annotations

import itertools
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from copd_engine.metrics import MetricsLog
from copd_engine.report import markdown_table, result_table, write_report
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
from copd_engine.types import UserError

BRANCHES = ("text", "image", "video")
SCRIPT = "<script>alert('x')</script> 3+4=7 & so on #7"


def make_record(step: int, cycle: int, phase: str, branches: tuple[str, ...], kl: float, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng([seed, step])
    domain_level = {name: 0.35 + 0.04 * i for i, name in enumerate(branches)}
    per_branch = {}
    for i, name in enumerate(branches):
        learned = 1 - math.exp(-step / (25 + 6 * i))
        domains = branches if phase == "opd" else (name,)
        rollout = {
            d: {
                "reward_mean": float(np.clip(domain_level[d] + 0.55 * learned + rng.normal(0, 0.04), 0, 1)),
                "response_tokens_mean": 9.0 + 4 * i + 3 * learned + float(rng.normal(0, 0.3)),
                "truncated_fraction": 0.05 * math.exp(-step / 10),
                "zero_variance_groups": int(rng.integers(0, 5) + 8 * learned),
                "num_groups": 16,
            }
            for d in domains
        }
        terms = {"grpo": {"loss": -0.01, "num_tokens": 1234, "num_responses": 256}}
        if phase == "opd":
            for teacher in branches:
                if teacher != name:
                    terms[f"opd:{teacher}"] = {"loss": 0.01, "num_responses": 128, "delta_mean": -kl, "reverse_kl": kl}
        per_branch[name] = {
            "version": step,
            "loss": float(rng.normal(0, 0.02)),
            "grad_norm": float(np.exp(rng.normal(-0.5, 0.3))),
            "lr": 3e-4,
            "skipped": False,
            "num_tokens": 1234,
            "entropy": 0.6 * math.exp(-step / 60) + 0.03 * i,
            "clip_fraction": 0.002,
            "ratio_mean": 1.0,
            "mismatch_mean": 2e-7,
            "mismatch_max": 3e-6,
            "terms": terms,
            "rollout": rollout,
        }
    parts = {"rollout": 0.31, "verify": 0.01, "teacher": 0.08 if phase == "opd" else 0.0, "update": 0.22, "sync": 0.005}
    parts |= {"diagnostics": 0.05, "evaluate": 0.4 if step % 10 == 0 else 0.0, "checkpoint": 0.0}
    pairs = [
        {
            "student": s,
            "teacher": t,
            "overlap": 1 - 0.6 * kl * (1 + 0.2 * j),
            "sum_min": 1 - 0.4 * kl * (1 + 0.2 * j),
            "kl_student_teacher": 0.4 * kl * (1 + 0.2 * j),
            "kl_teacher_student": 0.6 * kl * (1 + 0.2 * j),
            "symmetric_kl": kl * (1 + 0.2 * j),
        }
        for j, (s, t) in enumerate(itertools.permutations(branches, 2))
    ]
    accuracy = {
        b: {
            d: domain_level[d] + (0.5 if b == d else 0.3) * (1 - math.exp(-step / 25)) + float(rng.normal(0, 0.02))
            for d in branches
        }
        for b in branches
    }
    for row in accuracy.values():
        row["average"] = sum(row.values()) / len(row)
    return {
        "step": step,
        "cycle": cycle,
        "phase": phase,
        "elapsed_s": 0.7 * step,
        "step_s": sum(parts.values()) + 0.02,
        "time_s": parts,
        "branches": per_branch,
        "diagnostics": {"pairs": pairs},
        "evaluate": accuracy if step % 10 == 0 else None,
        "system": {
            "rss_bytes": int(1.1e9 + 1e6 * step),
            "gpu": [make_gpu(80.0 - step, 600.0 + step), make_gpu(0.0, None)],
        },
    }


def make_gpu(utilization_percent: float | None, power_w: float | None) -> dict[str, float | None]:
    memory = {"memory_used_bytes": 40e9, "memory_total_bytes": 150e9}
    return {**memory, "utilization_percent": utilization_percent, "power_w": power_w}


def make_run(
    folder: Path, branches: tuple[str, ...] = BRANCHES, cycles: int = 2, rl_steps: int = 6, opd_steps: int = 4
) -> Path:
    """A finished run: base line, ``cycles`` cycles, a baseline of independent experts, samples with a picture."""
    (folder / "media").mkdir(parents=True)
    num_steps = cycles * (rl_steps + opd_steps)
    config = {
        "name": "synthetic",
        "method": "copd",
        "seed": 3,
        "branches": [{"name": name, "data": {"source": "testbed", "domain": name}} for name in branches],
        "schedule": {"cycles": cycles, "rl_steps": rl_steps, "opd_steps": opd_steps},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    kl = 0.01
    with MetricsLog(folder) as log:
        base = make_record(0, 0, "base", branches, 1e-9, 0)
        log.write({key: base[key] for key in ("step", "phase", "diagnostics", "evaluate")})
        for step in range(1, num_steps + 1):
            cycle, within = divmod(step - 1, rl_steps + opd_steps)
            phase = "rl" if within < rl_steps else "opd"
            kl *= 1.12 if phase == "rl" else 0.85
            log.write(make_record(step, cycle + 1, phase, branches, kl, 1))
    kl = 0.01
    with MetricsLog(folder / "baselines" / "expert") as log:
        for step in range(1, num_steps + 4):
            kl *= 1.03
            log.write(make_record(step, 1, "rl", branches, kl, 2))

    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(folder / "media" / "digits.png")
    Image.fromarray(rng.integers(0, 255, (16, 80, 3), dtype=np.uint8)).save(folder / "media" / "strip.png")
    with (folder / "samples.jsonl").open("w") as file:
        for step, branch, reward in itertools.product((1, num_steps), branches, (1.0, 0.0)):
            media = {"image": ["media/digits.png"], "video": ["media/strip.png"]}.get(branch, [])
            sample = {
                "step": step,
                "branch": branch,
                "domain": branch,
                "prompt": f"prompt of {branch}\n3+4=",
                "answer": "7",
            }
            file.write(json.dumps({**sample, "response": SCRIPT, "reward": reward, "media": media}) + "\n")

    def row(model: str, kind: str, level: float, rollouts: int | None) -> dict[str, Any]:
        accuracy = {name: level + 0.01 * i for i, name in enumerate(branches)}
        accuracy["average"] = sum(accuracy.values()) / len(branches)
        stderr = dict.fromkeys([*branches, "average"], 0.0123)
        return {
            "model": model,
            "kind": kind,
            "accuracy": accuracy,
            "stderr": stderr,
            "num_prompts": 400,
            "rollouts": rollouts,
        }

    result = {
        "domains": list(branches),
        "rows": [
            row("merged", "merged", 0.913, 230_400),
            row("base", "base", 0.411, 0),
            *(row(f"expert:{name}", "expert", 0.71 + 0.01 * i, 51_200) for i, name in enumerate(branches)),
            row("average of experts", "baseline", 0.842, 153_600),
            *(row(f"branch:{name}", "branch", 0.85, 76_800) for name in branches),
        ],
        "command": "copd train configs/demo.yaml seed=3",
        "machine": "AMD EPYC, 2 cores",
        "date": "2026-11-23",
        "versions": {"torch": "2.13.0", "transformers": "5.19.0"},
        "train_s": 321.0,
        "peak_rss_bytes": 1_288_490_189,
        "seed": 3,
        "method": "copd",
    }
    (folder / "result.json").write_text(json.dumps(result))
    return folder


class Page(HTMLParser):
    """Visible text, tags, tables as lists of rows, and every address that a tag points to."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self._table: list[list[str]] | None = None
        self._hidden = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._hidden = tag == "style"
        if tag == "table":
            self._table = self.tables.setdefault(dict(attrs).get("id") or f"table{len(self.tables)}", [])
        elif tag == "tr" and self._table is not None:
            self._table.append([])
        elif tag in ("td", "th") and self._table:
            self._table[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._hidden = False
        if tag == "table":
            self._table = None

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.text.append(data)
            if self._table and self._table[-1]:
                self._table[-1][-1] += data.strip("\n ") if not data.strip() else data

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("run") / "synthetic")
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def page(run_dir: Path) -> Page:
    return Page((run_dir / "report.html").read_text())


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


# ---------------------------------------------------------------------------------------- tables


def test_result_table_marks_the_best_and_groups_the_rows(run_dir: Path) -> None:
    text = result_table(json.loads((run_dir / "result.json").read_text()))
    lines = text.splitlines()
    models = [line.split("  ")[0].strip() for line in lines if not line.startswith("-")]
    assert models[:3] == ["model", "base", "expert:text"]
    assert models[-2] == "merged"  # the last line explains the marks
    merged = next(line for line in lines if line.startswith("merged"))
    assert re.findall(r"[\d.]+ ± 1\.2\*", merged) == ["91.3 ± 1.2*", "92.3 ± 1.2*", "93.3 ± 1.2*", "92.3 ± 1.2*"]
    assert merged.endswith("230,400")
    assert text.count("*") == 4 + 1
    assert "400 held-out prompts per domain" in lines[-1]
    assert len({len(line) for line in lines[:-1]}) == 1  # aligned


def test_markdown_table(run_dir: Path) -> None:
    lines = markdown_table(json.loads((run_dir / "result.json").read_text())).splitlines()
    assert lines[0] == "| model | text | image | video | average | rollouts |"
    assert lines[2] == "| base | 41.1 ± 1.2 | 42.1 ± 1.2 | 43.1 ± 1.2 | 42.1 ± 1.2 | 0 |"
    assert lines[-1].startswith("| merged | **91.3** ± 1.2 |")
    assert len({line.count("|") for line in lines}) == 1


def test_tables_with_missing_numbers_and_ties() -> None:
    rows = [
        {"model": "a|b", "kind": "base", "accuracy": {"text": 0.5001, "average": None}},
        {"model": "c", "kind": "merged", "accuracy": {"text": 0.5}, "rollouts": None},
    ]
    result = {"domains": ["text"], "rows": rows}
    assert markdown_table(result).splitlines()[2:] == ["| a\\|b | **50.0** | - | - |", "| c | **50.0** | - | - |"]
    assert result_table(result).count("50.0*") == 2  # equal as printed: both are best


# ---------------------------------------------------------------------------------------- the page


def test_numbers_of_the_result_are_in_the_page(page: Page) -> None:
    rows = {row[0]: row[1:] for row in page.tables["result"]}
    assert rows["model"] == ["text", "image", "video", "average", "rollouts"]
    assert rows["base"] == ["41.1 ± 1.2", "42.1 ± 1.2", "43.1 ± 1.2", "42.1 ± 1.2", "0"]
    assert rows["merged"][-1] == "230,400"
    headings = [row[0] for row in page.tables["result"] if len(row) == 1]
    assert headings == ["Base", "Independent experts", "Baselines", "CoPD branches", "Merged"]
    assert "merged 92.3 % · average of independent experts 85.2 % · base 42.1 %" in page.words
    for fact in (
        "2026-11-23",
        "AMD EPYC, 2 cores",
        "copd train configs/demo.yaml seed=3",
        "5.3 min",
        "1.20 GiB",
        "torch 2.13.0",
    ):
        assert fact in page.words
    assert "Missing from this report" not in page.words


def test_diagnostics_are_in_the_page(run_dir: Path, page: Page) -> None:
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    pairs = {(pair["student"], pair["teacher"]): pair for pair in last["diagnostics"]["pairs"]}
    matrices = [table for name, table in page.tables.items() if name.startswith("table")]
    assert len(matrices) == 4
    overlap, _, symmetric, _ = matrices
    assert overlap[0] == ["student", *BRANCHES]
    assert overlap[1] == [
        "text",
        "-",
        f"{pairs['text', 'image']['overlap']:.3f}",
        f"{pairs['text', 'video']['overlap']:.3f}",
    ]
    assert symmetric[3][1] == f"{pairs['video', 'text']['symmetric_kl']:.2e}"
    phases = page.tables["phases"]
    assert [row[:3] for row in phases[1:]] == [
        ["1", "I (RL)", "1-6"],
        ["1", "II (OPD)", "7-10"],
        ["2", "I (RL)", "11-16"],
        ["2", "II (OPD)", "17-20"],
    ]
    before, after = (float(x) for x in phases[2][5].split(" → "))
    assert after < before  # phase II brings the branches together


def test_page_is_self_contained(page: Page, run_dir: Path) -> None:
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object")
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:").startswith("data:")
    html = (run_dir / "report.html").read_text()
    assert "url(" not in html
    assert "@import" not in html
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport"' in html


def test_samples_are_escaped_graded_and_illustrated(page: Page, run_dir: Path) -> None:
    html = (run_dir / "report.html").read_text()
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert SCRIPT in "".join(page.text)  # it reads as it was written
    pictures = [a for tag, a in page.tags if tag == "img" and (a.get("alt") or "").startswith("media/")]
    assert {a["alt"] for a in pictures} == {"media/digits.png", "media/strip.png"}
    assert len(pictures) == 8
    assert page.words.count("✓ right") == 6
    assert page.words.count("✗ wrong") == 6


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


# ---------------------------------------------------------------------------------------- unfinished and broken


def test_an_unfinished_run_says_what_is_missing(tmp_path: Path) -> None:
    source = make_run(tmp_path / "whole")
    folder = tmp_path / "started"
    folder.mkdir()
    (folder / "config.yaml").write_text((source / "config.yaml").read_text())
    second = json.loads((source / "metrics.jsonl").read_text().splitlines()[1])
    second |= {"diagnostics": None, "evaluate": None}
    second["branches"]["text"] |= {"loss": None, "grad_norm": None, "skipped": True}
    (folder / "metrics.jsonl").write_text(json.dumps(second) + '\n{"step": 2, "bra')
    page = Page(write_report(folder).read_text())
    assert "CoPD: step 1 of 20" in page.words
    assert "the run is not finished (step 1 of 20), it has no result.json" in page.words
    assert "no diagnostics were written" in page.words
    assert "no evaluation was written" in page.words
    assert "Samples: none were written" in page.words
    assert "(1 branch updates skipped)" in page.words
    assert (folder / "report.png").is_file()


def test_only_the_base_so_far(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.write({"step": 0, "phase": "base", "evaluate": {"base": {"text": 0.5, "average": 0.5}}})
    assert "step 0" in Page(write_report(tmp_path).read_text()).words


def test_a_skipped_step_and_empty_parts_do_no_harm(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.write({"step": 1, "phase": "rl", "cycle": 1, "branches": {"a": None, "b": {"terms": {"opd:a": None}}}})
        log.write(
            {"step": 2, "phase": "opd", "cycle": 1, "branches": None, "diagnostics": {"pairs": []}, "time_s": None}
        )
        log.write({"step": 3, "phase": "opd", "cycle": 1, "system": {"gpu": [{"memory_used_bytes": 2**31}]}})
    assert write_report(tmp_path).is_file()


def test_missing_and_stray_pictures(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", ("image",), cycles=1, rl_steps=1, opd_steps=1)
    Image.new("RGB", (4, 4)).save(tmp_path / "outside.png")
    (folder / "media" / "broken.png").write_bytes(b"not a picture")
    media = ["media/gone.png", "../outside.png", "media/broken.png"]
    sample = {
        "step": 1,
        "branch": "image",
        "prompt": "p",
        "response": "r",
        "answer": "a",
        "reward": None,
        "media": media,
    }
    (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    page = Page(write_report(folder).read_text())
    for name in media:
        assert f"{name} is missing" in page.words
    assert "✓" not in page.words  # no reward, no verdict
    assert "✗" not in page.words


def test_mixed_baseline_and_mixed_run(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", ("text", "image"), cycles=1, rl_steps=2, opd_steps=2)
    mixed = folder / "baselines" / "mixed"
    with MetricsLog(mixed) as log:
        for step in (1, 2):
            rollout = {"text": {"reward_mean": 0.4}, "image": {"reward_mean": 0.6}}
            accuracy = {"mixed": {"text": 0.4, "image": 0.6, "average": 0.5}}
            branches = {"mixed": {"loss": 0.1, "rollout": rollout}}
            log.write({"step": step, "phase": "rl", "cycle": 1, "branches": branches, "evaluate": accuracy})
    assert write_report(folder).is_file()
    config = yaml.safe_load((folder / "config.yaml").read_text()) | {"method": "mixed"}
    (mixed / "config.yaml").write_text(yaml.safe_dump(config))
    assert load_run(mixed).branches == ("mixed",)
    assert load_run(folder).branches == ("text", "image")
    assert "Mixed RLVR: step 2" in Page(write_report(mixed).read_text()).words


def test_a_baseline_without_metrics_is_named(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", cycles=1, rl_steps=1, opd_steps=1)
    (folder / "baselines" / "mixed").mkdir()
    assert "Baseline mixed: it has no metrics.jsonl." in load_run(folder).missing


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "run folder .* does not exist"),
        ({}, r"is not a run folder: it has no metrics\.jsonl"),
        ({"metrics.jsonl": ""}, r"metrics\.jsonl holds no step yet"),
        ({"metrics.jsonl": '{"step": 1}\n{\n{"step": 2}\n'}, r"metrics\.jsonl:2: not a JSON line"),
        ({"metrics.jsonl": '{"step": 1}\n', "result.json": '{"rows": '}, r"result\.json is not a result file"),
        ({"metrics.jsonl": '{"step": 1}\n', "result.json": "[]"}, r"result\.json is not a result file"),
    ],
)
def test_a_folder_that_cannot_be_reported_is_one_clear_line(
    tmp_path: Path, files: dict[str, str] | None, message: str
) -> None:
    folder = tmp_path / "run"
    if files is not None:
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        write_report(folder)
    assert "\n" not in str(caught.value)
    assert not (folder / "report.html").exists()
