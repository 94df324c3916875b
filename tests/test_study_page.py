"""The page of a study: every claim, table and figure, computed from run folders; what is missing is said."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure
from PIL import Image

from copd_engine.study import figures
from copd_engine.study.config import StudyConfig, TableConfig
from copd_engine.study.page import duration, write_page
from copd_engine.study.plan import fingerprint
from copd_engine.study.results import Results
from copd_engine.study.run import SESSIONS, TIMES
from copd_engine.study.tables import accuracy_table
from tests.study_folder import study_of, write_pilot, write_run

CLAIMS: list[dict[str, Any]] = [
    {"claim": "CoPD <is> above the average | of experts", "better": "copd", "than": "expert"},
    {"claim": "Overlap falls", "kind": "phase", "variant": "copd", "measure": "overlap", "phase": "rl"}
    | {"direction": "falls"},
    {"claim": "Gain rises with overlap", "kind": "pilot"},
]
SECTIONS: dict[str, Any] = {
    "claims": CLAIMS,
    "tables": [{"title": "Two branches", "rows": {"base": "copd/base", "average": "expert", "CoPD": "copd"}}],
    "steps": [{"title": "Overlap (a)", "measure": "overlap", "lines": {"CoPD": "copd", "alone": "expert"}}],
    "sweeps": [{"title": "Ratio (c)", "x_label": "ratio", "lines": {"all": {0.5: "expert", 1.5: "copd"}}}],
    "pilot": {"experts": "expert", "teacher": "image", "students": ["text"], "fractions": [1.0], "opd_steps": 1},
}
PILOTS = [f"pilot-gain{per}-from-distillation-against-starting-overlap" for per in ("", "-per-headroom")]
KEYS = ["overlap-a", "ratio-c", *PILOTS]


def finished(root: Path) -> StudyConfig:
    """Accuracies on text: base 25 %, experts 50 %, CoPD 60, 65 and 70 % by seed; image 50 % throughout."""
    study = study_of(root, **SECTIONS)
    for seed in study.seeds:
        right = 11 + seed
        models = {
            "base": {"text": [1.0] * 5 + [0.0] * 15, "image": [0.5] * 20},
            "merged": {"text": [1.0] * right + [0.0] * (20 - right), "image": [0.5] * 20},
        }
        first = {3: (1, "rl", 0.85), 5: (1, "opd", 1.0)}
        curve = {**first, 8: (2, "rl", 0.8 + seed / 100), 10: (2, "opd", 0.9 + seed / 100)}
        write_run(study, "copd", seed, models, curve)
        average = {"average": {"text": [1.0] * 10 + [0.0] * 10, "image": [0.5] * 20}}
        write_run(study, "expert", seed, average, {3: (1, "rl", 0.8), 5: (1, "rl", 0.7)})
        write_pilot(study, seed, [0.5, 0.7, 0.9], [0.01, 0.02, 0.03 + seed / 100])
    lines = [
        {"unit": "seed-1/copd", "error": None, "wall_s": 60, "cpu_s": 90, "session": "a", "session_s": 60},
        {"unit": "seed-2/copd", "error": None, "wall_s": 60, "cpu_s": 90, "session": "a", "session_s": 120},
        {"unit": "seed-3/copd", "error": None, "wall_s": 60, "cpu_s": 60, "session": "b", "session_s": 60},
    ]
    sessions = [
        {"session": "a", "event": "start"},
        {"session": "a", "event": "stop", "session_s": 150, "cpu_s": 200},  # 20 s of it for what was not finished
        {"session": "b", "event": "start"},
        {"session": "c", "event": "start"},
        {"session": "c", "event": "stop", "session_s": 30, "cpu_s": 40},  # stopped before a unit ended
    ]
    for name, rows in ((TIMES, lines), (SESSIONS, sessions)):
        (root / study.name / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return study


@pytest.fixture
def page(tmp_path: Path) -> tuple[StudyConfig, Path]:
    study = finished(tmp_path)
    return study, write_page(study, "copd study x.yaml", {}, tmp_path / "docs" / "results.md").parent


def row_of(markdown: str, label: str) -> list[str]:
    line = next(line for line in markdown.splitlines() if line.startswith(f"| {label} |"))
    return [cell.strip() for cell in line.replace("\\|", "/").strip("|").split("|")]


def test_numbers_are_those_of_the_run_folders(page: tuple[StudyConfig, Path]) -> None:
    _, root = page
    text = (root / "study.md").read_text()
    # 60, 65, 70: mean 65, t(0.975, 2) = 4.3027 times 5 / sqrt(3) = 12.42
    assert row_of(text, "CoPD") == ["CoPD", "65.0 ± 12.4", "50.0 ± 0.0", "57.5 ± 6.2", "8", "64", "-"]
    assert row_of(text, "base")[1:4] == ["25.0 ± 0.0", "50.0 ± 0.0", "37.5 ± 0.0"]
    claim = row_of(text, "CoPD <is> above the average \\| of experts")
    # Half of 10, 15, 20 points, as image is level.
    assert claim[2] == "+7.5 [+1.3, +13.7]"
    assert claim[-1] == "holds"
    falls = row_of(text, "Overlap falls")
    assert falls[2].startswith("+0.180 [")
    assert falls[4] == "+0.190, +0.180, +0.170"
    assert falls[5:] == ["falls in 3 of 3 phases", "holds *"]
    assert falls[1] == "how far overlap (k = 10) of copd falls over a phase I but the first"
    assert row_of(text, "1 of the way to the text expert")[1:4] == ["0.700", "0.700", "1.300"]
    # Gain .03 + seed / 100 of .8 - .3: 8, 10, 12 %, half an interval t(0.975, 2) * 2 / sqrt(3).
    # One gain: 30 % before, 34, 35, 36 % after, of 400 prompts each: sqrt((.21 + .2275) / 400), 3.3 points.
    assert row_of(text, "2 of the way to the text expert")[6:] == ["5.0 ± 2.5", "3.3", "10.0 ± 5.0"]
    assert "that of the teacher is 80.0 ± 0.0" in text
    assert "overlap, k = 10 |" in text
    assert "Top-k overlap, k = 10: mean over pairs" in text
    assert "t test of Fisher's z: p = " in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(90, "1.5 min"), (5399, "90.0 min"), (5400, "1 h 30 min"), (7077, "1 h 58 min"), (7199, "2 h 0 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_where_it_comes_from(page: tuple[StudyConfig, Path]) -> None:
    study, root = page
    text = (root / "study.md").read_text()
    assert row_of(text, "Command")[1] == "`copd study x.yaml`"
    assert row_of(text, "Config, SHA-256")[1] == f"`{fingerprint(study)}`"
    assert row_of(text, "Units finished")[1] == "9 of 9"
    assert row_of(text, "Machine")[1] == "one core"
    assert row_of(text, "Versions")[1] == "torch 2.13.0"
    # 150 s, 60 s until the last unit of the one that was killed, 30 s.
    killed = "killed 1 times (counted until the last unit before)"
    assert row_of(text, "Wall time")[1] == f"4.0 min, started 3 times, {killed}"
    assert row_of(text, "CPU time")[1].startswith("5.0 min")  # 200, 60, 40 s
    assert row_of(text, "CoPD's topology")[1] == "both ways (two branches): copd"
    # Of overlaps .5, .7, .9 and gains .01, .02, .03 + seed / 100: r is .98, .96, .94 by seed.
    assert "3 claims were tested: 3 hold, 0 do not hold, 0 are not decided. A claim holds if" in text
    assert [row_of(text, claim["claim"].replace("|", "\\|"))[-1] for claim in CLAIMS] == ["holds", "holds *", "holds *"]
    config = yaml.safe_load(text.split("```yaml")[1].split("```")[0])
    assert [claim["claim"] for claim in config["claims"]] == [claim["claim"] for claim in CLAIMS]
    assert "Missing" not in text


def test_the_html_page_is_one_file_with_the_same_numbers(page: tuple[StudyConfig, Path]) -> None:
    _, root = page
    html = (root / "study.html").read_text()
    assert "CoPD &lt;is&gt; above the average | of experts" in html
    for text in ("65.0 ± 12.4", "+7.5 [+1.3, +13.7]", '<td class="holds">holds *</td>', "falls in 3 of 3 phases"):
        assert text in html
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    assert len(images) == len(KEYS)
    for data in images:
        assert Image.open(io.BytesIO(base64.b64decode(data))).width > 600
    assert not re.search(r'(src|href)="(?!data:)', html)


def test_the_copy_has_its_figures_beside_it(page: tuple[StudyConfig, Path], tmp_path: Path) -> None:
    _, root = page
    copy = (tmp_path / "docs" / "results.md").read_text()
    assert copy == (root / "study.md").read_text().replace("](figures/", "](results/")
    linked = re.findall(r"!\[[^]]*\]\(([^)]+)\)", copy)
    assert linked == [f"results/{key}.png" for key in KEYS]
    for link in linked:
        assert (tmp_path / "docs" / link).read_bytes() == (root / "figures" / Path(link).name).read_bytes()


def test_the_page_says_what_is_missing(tmp_path: Path) -> None:
    study = finished(tmp_path)
    root = tmp_path / study.name
    for seed in study.seeds:
        (root / f"seed-{seed}" / "pilot" / "result.json").unlink()
    (root / "seed-2" / "copd" / "result.json").unlink()
    html = write_page(study, "", {"seed-2/copd": "out of <memory>"}).read_text()
    text = (root / "study.md").read_text()
    for page in (html, text):
        assert "seed-2/copd: out of &lt;memory&gt;" in page
        assert "seed-1/pilot: not finished" in page
    assert row_of(text, "Units finished")[1] == "5 of 9"
    assert row_of(text, "Gain rises with overlap")[-1] == "missing"
    assert row_of(text, "CoPD (2 of 3 seeds)")[1] == "65.0 ± 63.5"  # 60 and 70: t(0.975, 1) = 12.706 times 5
    assert row_of(text, "average")[1] == "50.0 ± 0.0"
    tested = "0 of 3 claims were tested: 0 hold, 0 do not hold, 0 are not decided"
    assert f"{tested}; 2 others have numbers of too few seeds, 1 are missing. " in text
    claim = row_of(text, "CoPD <is> above the average \\| of experts")
    assert claim[2].endswith(" (2 of 3 seeds)")
    assert (claim[4], claim[-1]) == ("seed 1: +5.0, seed 3: +10.0", "not decided")
    for figure, few in (("Overlap (a)", "CoPD (2 of 3 seeds)"), ("Ratio (c)", "all at 1.5 (2 of 3 seeds)")):
        caption = next(line for line in text.splitlines() if line.startswith(f"{figure}. "))
        assert caption.endswith(f" Not of all seeds: {few}.")
    assert not any((root / "figures" / f"{key}.png").exists() for key in PILOTS)


def test_one_seed_has_no_interval(tmp_path: Path) -> None:
    study = study_of(tmp_path, **{**SECTIONS, "seeds": [1]})
    finished(tmp_path)
    write_page(study, "", {})
    text = (tmp_path / study.name / "study.md").read_text()
    claim = row_of(text, "Overlap falls")
    assert (claim[2], claim[-1]) == ("+0.190 [one seed]", "not decided")
    assert row_of(text, "CoPD")[1] == "60.0"


def test_the_page_names_the_topology_of_every_copd_variant(tmp_path: Path) -> None:
    """Three branches by all edges are another method than by hub and spokes."""
    run = {"branches": [{"name": n, "data": {"domain": n}} for n in ("text", "image", "video")]}

    def by(topology: Any) -> dict[str, Any]:
        return {"changes": {"schedule": {"topology": topology}}}

    variants = {"a": by("full"), "b": by("hub"), "c": by("full"), "d": {**by("full"), "branches": ["text", "image"]}}
    variants |= {"e": by([["text", "image"]]), "m": {"changes": {"method": "mixed"}}}
    study = study_of(tmp_path, run=run, variants=variants)
    (tmp_path / study.name).mkdir()
    write_page(study, "", {})
    row = row_of((tmp_path / study.name / "study.md").read_text(), "CoPD's topology")
    assert row[1] == "full: a, c; hub (text): b; both ways (two branches): d; image → text: e"


def test_figures_of_one_slug_are_two_files(tmp_path: Path) -> None:
    lines = {"all": {0.5: "expert", 1.5: "copd"}}
    titles = ["Ratio (a)", "Ratio: a", "Σ", "Δ"]
    sweeps = [{"title": title, "x_label": "ratio", "lines": lines} for title in titles]
    finished(tmp_path)
    study = study_of(tmp_path, **{**SECTIONS, "sweeps": sweeps})
    write_page(study, "", {})
    text = (tmp_path / study.name / "study.md").read_text()
    keys = ["overlap-a", "ratio-a", "ratio-a-2", "figure", "figure-2", *PILOTS]
    assert re.findall(r"\(figures/([^)]+)\.png\)", text) == keys
    assert {path.stem for path in (tmp_path / study.name / "figures").iterdir()} == set(keys)


def test_no_bar_is_drawn_where_there_is_no_interval(tmp_path: Path) -> None:
    """One of the two points has a single seed."""
    study = finished(tmp_path)
    for seed in (2, 3):
        (tmp_path / study.name / f"seed-{seed}" / "expert" / "result.json").unlink()
    ax = Figure().add_subplot()
    assert figures._draw_sweep(ax, study.sweeps[0], Results(study))
    (container,) = ax.containers
    (bars,) = container[2]
    lengths = [np.ptp(segment[:, 1]) for segment in bars.get_segments() if len(segment)]
    # Averages over both domains: 55, 57.5, 60 %; t(0.975, 2) times 2.5 / sqrt(3), twice.
    assert lengths == [pytest.approx(2 * 4.3027 * 2.5 / math.sqrt(3), rel=1e-4)]


def test_the_pilots_lines_are_those_of_the_seeds(tmp_path: Path) -> None:
    study = finished(tmp_path)
    ax = Figure().add_subplot()
    assert figures._draw_pilot(ax, Results(study), per_headroom=False)
    assert len(ax.lines) == len(study.seeds)
    for seed, line in zip(study.seeds, ax.lines, strict=True):
        slope = np.polyfit([0.5, 0.7, 0.9], [1.0, 2.0, 3.0 + seed], 1)[0]
        x, y = line.get_data()
        assert (y[1] - y[0]) / (x[1] - x[0]) == pytest.approx(slope)


def test_a_branch_alone_is_shown_at_its_own_cost_and_the_note_says_so(tmp_path: Path) -> None:
    study = finished(tmp_path)
    rows = {"text branch": "copd/branch:text", "CoPD": "copd/base"}
    tables = [accuracy_table(TableConfig(title="t", rows=r), Results(study)) for r in ({"CoPD": "copd"}, {})]
    assert all("alone" not in table.note for table in tables)
    for seed in study.seeds:
        file = tmp_path / study.name / f"seed-{seed}" / "copd" / "result.json"
        file.write_text(file.read_text().replace('"merged"', '"branch:text"'))
    note = accuracy_table(TableConfig(title="t", rows=rows), Results(study)).note
    assert note.endswith("Of a branch alone (text branch) they are its own, without those of its teachers.")
