"""The report: its numbers are those of the run folder, its text is escaped, and an unfinished run still gets one."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from PIL import Image

from copd_engine.metrics import MetricsLog
from copd_engine.report import markdown_table, result_table, write_report
from copd_engine.report.run import load_run
from copd_engine.types import UserError
from tests import report_run
from tests.report_run import BRANCHES, SCRIPT, make_run

run_dir = report_run.run_dir


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
def page(run_dir: Path) -> Page:
    return Page((run_dir / "report.html").read_text())


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


def test_tables_say_what_training_took() -> None:
    rows = [
        {"model": "base", "kind": "base", "accuracy": {"text": 0.1}, "rollouts": 0, "steps": 0, "train_flops": 0},
        {
            "model": "m",
            "kind": "merged",
            "accuracy": {"text": 0.5},
            "rollouts": 9600,
            "steps": 1200,
            "train_flops": 3e15,
        },
    ]
    result = {"domains": ["text"], "rows": rows}
    lines = markdown_table(result).splitlines()
    assert lines[0] == "| model | text | average | steps | rollouts | FLOPs |"
    assert lines[2:] == ["| base | 10.0 | - | 0 | 0 | 0.00e+00 |", "| m | **50.0** | - | 1,200 | 9,600 | 3.00e+15 |"]
    assert result_table(result).splitlines()[4].endswith("1,200     9,600  3.00e+15")


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
    assert len(matrices) == 5
    overlap, _, symmetric, _, angles = matrices
    assert overlap[0] == ["student", *BRANCHES, "base"]
    assert overlap[1] == [
        "text",
        "-",
        f"{pairs['text', 'image']['overlap']:.3f}",
        f"{pairs['text', 'video']['overlap']:.3f}",
        f"{last['diagnostics']['base'][0]['overlap']:.3f}",
    ]
    assert angles[1][1:] == ["-", *[f"{pairs['text', 'image']['task_cosine']:.3f}"] * 2, "-"]
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
