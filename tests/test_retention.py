"""What a merged model keeps of its branches: differences and their standard errors."""

from __future__ import annotations

import json
import math
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest

from copd_engine.report import write_report
from copd_engine.report.retention import retention, retention_table, with_scores
from tests import report_run

run_dir = report_run.run_dir


def row(model: str, kind: str, **accuracies: float) -> dict[str, Any]:
    return {"model": model, "kind": kind, "accuracy": accuracies, "stderr": dict.fromkeys(accuracies, 0.03)}


RESULT = {
    "rows": [
        row("base", "base", text=0.3, image=0.2),
        row("expert:text", "expert", text=0.9, image=0.1),
        row("average of experts", "baseline", text=0.6, image=0.5),
        row("average of experts, equal steps", "baseline", text=0.1, image=0.1),
        row("branch:text", "branch", text=0.8, image=0.7),
        row("branch:image", "branch", text=0.1, image=0.0),
        row("merged", "merged", text=0.6, image=0.5) | {"stderr": {"text": 0.04, "image": 0.04}},
    ]
}


def test_each_branch_on_its_own_domain():
    found = retention(RESULT)
    assert [(r.branch, r.merged, r.had, r.has) for r in found] == [
        ("expert:text", "average of experts", 0.9, 0.6),
        ("branch:text", "merged", 0.8, 0.6),
        ("branch:image", "merged", 0.0, 0.5),
    ]
    assert found[1].difference == pytest.approx(-0.2)
    assert found[1].stderr == pytest.approx(0.05)  # 3-4-5
    assert found[1].cells == ["branch:text", "80.0", "merged", "60.0", "-20.0 ±5.0", "75 %"]
    assert found[2].cells[-1] == "-"  # a share of nothing
    lines = retention_table(RESULT).splitlines()
    assert lines[0].split("  ")[0] == "on its own domain"
    assert "unpaired" in lines[-1]
    assert len({line.index("%") for line in lines[1:3]}) == 1


def test_rewards_per_prompt_are_compared_in_pairs():
    before, after = [1.0, 0.0, 1.0, 1.0, 0.5], [1.0, 0.0, 0.0, 1.0, 0.5]
    rows = [
        row("branch:text", "branch", text=0.7) | {"rewards": {"text": before}},
        row("merged", "merged", text=0.5) | {"rewards": {"text": after}},
    ]
    (found,) = retention({"rows": rows})
    differences = [b - a for a, b in zip(before, after, strict=True)]
    assert found.paired
    assert found.stderr == pytest.approx(statistics.stdev(differences) / math.sqrt(5))
    assert "paired by prompt" in retention_table({"rows": rows})
    rows[0]["rewards"] = {"text": before[:-1]}  # of other prompts
    assert not retention({"rows": rows})[0].paired


def test_scores_of_the_run_folder_pair_its_rows(tmp_path: Path):
    """The branches' and the merge's own, and in the baseline's folder the experts'. Those of another result, whose mean
    is not the row's accuracy, are not taken."""
    scores = {
        "scores/merged": {"text": [1.0, 0.0, 1.0, 1.0], "image": [1.0, 0.0, 0.0, 0.0]},
        "scores/branch-text": {"text": [1.0, 0.0, 0.0, 1.0], "image": [0.0] * 4},
        "scores/branch-image": {"text": [0.0] * 4, "image": [1.0, 1.0, 1.0, 0.0]},
        "baselines/expert/scores/expert-text": {"text": [0.0, 0.0, 1.0, 1.0]},
        "baselines/expert/scores/average-of-experts": {"text": [1.0, 1.0, 1.0, 1.0]},
    }
    for name, of_domain in scores.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.json").write_text(json.dumps(of_domain))
    rows = [
        row("expert:text", "expert", text=0.5),
        row("average of experts", "baseline", text=1.0, average=1.0),
        row("branch:text", "branch", text=0.5, image=0.0),
        row("branch:image", "branch", text=0.25, image=0.75),  # its scores say 0 on text
        row("merged", "merged", text=0.75, image=0.25),
    ]
    result = with_scores({"rows": rows, "domains": ["text", "image"]}, tmp_path)
    assert result["domains"] == ["text", "image"]
    assert "rewards" not in rows[0]
    experts, text, image = retention(result)
    assert (experts.paired, text.paired, image.paired) == (True, True, False)
    assert experts.stderr == pytest.approx(statistics.stdev([1, 1, 0, 0]) / 2)
    assert text.stderr == pytest.approx(statistics.stdev([0, 0, 1, 0]) / 2)
    assert image.stderr == pytest.approx(math.hypot(0.03, 0.03))
    assert retention_table(result).endswith("paired by prompt, unpaired of branch:image")


def test_nothing_merged_no_table():
    assert retention_table({"rows": RESULT["rows"][:2]}) == ""
    assert retention_table({"rows": []}) == ""


def test_the_report_shows_it(run_dir: Path):
    html = (run_dir / "report.html").read_text()
    table = html[html.index('<table id="retention">') :].partition("</table>")[0]
    assert table.count("<tr>") == 1 + 2 * len(report_run.BRANCHES)
    first = report_run.BRANCHES[0]
    assert (
        f'<tr><th scope="row">branch:{first}</th><td>85.0</td><td>merged</td><td>91.3</td><td>+6.3 ±1.7</td>' in table
    )
    assert "unpaired" in html


def test_the_report_pairs_where_the_run_folder_holds_scores(run_dir: Path, tmp_path: Path):
    """85.0 % of 1,000 prompts and 91.3 %; one loses what the other has on 20, and gains 83."""
    folder = tmp_path / "run"
    shutil.copytree(run_dir, folder)
    (folder / "scores").mkdir()
    first, others = report_run.BRANCHES[0], report_run.BRANCHES[1:]
    before = [1.0] * 850 + [0.0] * 150
    after = [0.0] * 20 + [1.0] * 913 + [0.0] * 67
    result = json.loads((folder / "result.json").read_text())
    for name, own in ((f"branch:{first}", before), ("merged", after)):
        accuracy = next(r for r in result["rows"] if r["model"] == name)["accuracy"]
        scores = {first: own} | {domain: [accuracy[domain]] * 4 for domain in others}
        (folder / "scores" / f"{name.replace(':', '-')}.json").write_text(json.dumps(scores))
    write_report(folder)
    html = (folder / "report.html").read_text()
    table = html[html.index('<table id="retention">') :].partition("</table>")[0]
    stderr = 100 * statistics.stdev([b - a for a, b in zip(before, after, strict=True)]) / math.sqrt(1000)
    assert f"{stderr:.1f}" == "1.0"  # 1.7 unpaired
    assert f">branch:{first}</th><td>85.0</td><td>merged</td><td>91.3</td><td>+6.3 ±1.0</td>" in table
