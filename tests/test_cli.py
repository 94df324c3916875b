"""The command line: what each command does and prints."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable

import pytest
import yaml
from safetensors.torch import load_file

from copd_engine.trainer import Trainer
from tests import cli_site
from tests.cli_site import Ended, Site, flip_last_byte
from tests.small_run import contents

finished, site, copd, _no_figures = cli_site.finished, cli_site.site, cli_site.copd, cli_site._no_figures


def test_a_finished_run_is_shown_again_and_not_trained(
    site: Site, copd: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_training(*_: object) -> None:
        raise AssertionError("trains")

    monkeypatch.setattr(Trainer, "__init__", no_training)
    before = contents(site.root / "runs")
    shown = [
        copd("train", site.write()),
        copd("train", "--resume", "runs/small"),
        copd("train", site.write(name="small")),
    ]
    assert contents(site.root / "runs") == before
    for ended in shown:
        assert ended.code == 0
        assert ended.out == shown[0].out
        for model in ("base", "branch:text", "branch:image", "merged"):
            assert model in ended.out
        assert "report: runs/small/report.html" in ended.out


def test_a_finished_run_without_its_report_gets_one(site: Site, copd: Callable[..., Ended]) -> None:
    """As a kill between the two leaves it."""
    (site.root / "runs/small/report.html").unlink()
    assert copd("train", "--resume", "runs/small").code == 0
    assert (site.root / "runs/small/report.html").stat().st_size > 1000


@pytest.mark.usefixtures("_no_figures")
def test_overwrite_trains_again(site: Site, copd: Callable[..., Ended]) -> None:
    (site.root / "runs/small/old-note.txt").write_text("of the old run")
    before = contents(site.root / "runs/small/models")
    assert copd("train", site.write(seed=5), "--overwrite").code == 0
    assert not (site.root / "runs/small/old-note.txt").exists()
    assert yaml.safe_load((site.root / "runs/small/config.yaml").read_text())["seed"] == 5
    after = contents(site.root / "runs/small/models")
    assert after.keys() == before.keys()
    assert after["merged/model.safetensors"] != before["merged/model.safetensors"]


@pytest.mark.usefixtures("_no_figures")
def test_the_newest_checkpoint_is_damaged(
    site: Site, copd: Callable[..., Ended], caplog: pytest.LogCaptureFixture
) -> None:
    """It is passed over for the older one, said so, and the run ends with the same weights."""
    run = site.root / "runs/small"
    before = contents(run / "models")
    (run / "result.json").unlink()
    shutil.rmtree(run / "models")
    flip_last_byte(run / "checkpoints/step-000002/model-text.safetensors")
    assert copd("train", site.write()).code == 0
    assert contents(run / "models") == before
    (warning,) = [record.getMessage() for record in caplog.records if "checkpoint" in record.getMessage()]
    assert "step-000002: model-text.safetensors is damaged" in warning
    assert "going on from step-000001" in warning


def test_a_divergence_ends_the_command_with_its_last_checkpoint(
    site: Site, copd: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    from copd_engine.branch import Branch

    score = Branch.score
    monkeypatch.setattr(Branch, "score", lambda self, rollouts: [s * float("nan") for s in score(self, rollouts)])
    schedule = {"cycles": 1, "rl_steps": 2, "opd_steps": 12}
    config = site.write(name="new", schedule=schedule, checkpoint={"every": 2})
    ended = copd("train", config)
    assert ended.code == 2
    last = ended.err.rstrip("\n").split("\n")[-1]
    assert last == (
        "copd: branch 'text': 10 updates in a row had a NaN or infinite loss or gradient; stopped. "
        "Last checkpoint: runs/new/checkpoints/step-000010"
    )


# The other commands


def test_eval_gives_the_accuracies_of_the_result(site: Site, copd: Callable[..., Ended]) -> None:
    rows = json.loads((site.root / "runs/small/result.json").read_text())["rows"]
    best = max((row for row in rows if row["kind"] == "branch"), key=lambda row: row["accuracy"]["average"])
    accuracy = best["accuracy"]
    assert accuracy["average"] > 0
    folder = f"runs/small/models/{best['model'].replace(':', '-')}"
    ended = copd("eval", folder, "--config", "runs/small/config.yaml")
    assert ended.code == 0
    (line,) = [line for line in ended.out.splitlines() if line.startswith(folder)]
    shown = [float(value) for value in re.findall(r"([0-9.]+) ±", line)]
    assert shown == pytest.approx([100 * accuracy[key] for key in ("text", "image", "average")], abs=0.05)
    assert "8 held-out prompts per domain" in ended.out
    wider = copd("eval", "base", "--config", "runs/small/config.yaml", "--num-prompts", "3", "seed=4")
    assert wider.code == 0
    assert "3 held-out prompts per domain" in wider.out
    assert copd("eval", "base", "--config", "runs/small/config.yaml", "--num-prompts", "0").code == 2


def test_merge_weighs_the_changes(site: Site, copd: Callable[..., Ended]) -> None:
    text, image = (f"runs/small/models/branch-{name}" for name in ("text", "image"))
    shutil.copytree(site.root / image, site.root / "a=b")
    assert copd("merge", "base", text, image, "--out", "mean").code == 0
    ended = copd("merge", "base", f"{text}=3", "a=b", "--out", "deep/weighted")
    assert ended.code == 0
    assert "merged 2 branches into deep/weighted" in ended.out
    base, one, two, mean, weighted = (
        load_file(site.root / folder / "model.safetensors") for folder in ("base", text, image, "mean", "deep/weighted")
    )
    for name, start in base.items():
        first, second = one[name].double() - start.double(), two[name].double() - start.double()
        assert (mean[name] - (start + (first + second) / 2)).abs().max() < 1e-6
        assert (weighted[name] - (start + (3 * first + second) / 4)).abs().max() < 1e-6
    assert (
        contents(site.root / "mean")["model.safetensors"]
        == (site.root / "runs/small/models/merged/model.safetensors").read_bytes()
    )
    assert copd("eval", "deep/weighted", "--config", site.write()).code == 0


def test_report_is_written_again(site: Site, copd: Callable[..., Ended]) -> None:
    (site.root / "runs/small/report.html").unlink()
    ended = copd("report", "runs/small")
    assert ended.code == 0
    assert ended.out == "report: runs/small/report.html\n"
    text = (site.root / "runs/small/report.html").read_text()
    assert "branch:text" in text


@pytest.mark.usefixtures("_no_figures")
def test_the_result_names_the_command(site: Site, copd: Callable[..., Ended]) -> None:
    assert copd("train", site.write(), "name=new run").code == 0
    result = json.loads((site.root / "runs/new run/result.json").read_text())
    assert result["command"] == f"copd train {site.root / 'config.yaml'} 'name=new run'"


@pytest.mark.parametrize("command", [[], ["train"], ["eval"], ["merge"], ["report"], ["testbed"]])
def test_help(copd: Callable[..., Ended], command: list[str]) -> None:
    ended = copd(*command, "--help")
    assert ended.code == 0
    assert "Usage: " in ended.out


def test_ones_own_verifier_may_lie_in_the_working_directory(
    site: Site, copd: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under ``python -m``; a console script has only its own folder on the path."""
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(site.root))])
    (site.root / "scores_of_mine.py").write_text("def score(response, example):\n    return 1.0\n")
    row = {"prompt": "a", "answer": "1", "verifier": "scores_of_mine:score"}
    (site.root / "rows.jsonl").write_text(json.dumps(row) + "\n")
    ended = copd("data", "check", "rows.jsonl")
    assert (ended.code, ended.err) == (0, "")
    assert "scores_of_mine:score 1" in ended.out
