"""A run that is killed at any moment and resumed ends with bitwise the numbers of the undisturbed run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import copd_engine.report
from copd_engine import checkpoint, cli, model_rows, run_folder, runs
from copd_engine.checkpoint import MANIFEST, complete_checkpoints, read_manifest
from copd_engine.config import RunConfig, build_config
from copd_engine.data import DataStream
from copd_engine.metrics import MetricsLog, read_metrics
from copd_engine.trainer import Trainer
from copd_engine.types import Example
from tests.small_run import contents, numbers, small_config, train, write_base, write_config, write_data

#: What the baseline writes in its 6 steps: lines of the log with the base's, checkpoints, and their files.
LINES, SAVED, FILES = 7, 3, 12


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("material")
    return write_base(folder / "base"), write_data(folder / "data")


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than the runs; what is tested is that there is a report."""
    monkeypatch.setattr(copd_engine.report, "write_report", write_report)


def write_report(run_dir: Path) -> Path:
    (run_dir / "report.html").write_text("a report")
    return run_dir / "report.html"


def config_of(material: tuple[Path, Path], output_dir: Path, **changes: Any) -> RunConfig:
    """Two branches, a baseline, a checkpoint every two steps of which one is kept."""
    settings: dict[str, Any] = {
        "baselines": ["expert"],
        "schedule": {"cycles": 1, "rl_steps": 2, "opd_steps": 2},
        "eval": {"every": 2, "num_prompts": 2, "final_num_prompts": 2},
        "checkpoint": {"every": 2, "keep": 1},
    }
    config = small_config(*material, output_dir, **{**settings, **changes})
    return build_config({**config, "branches": config["branches"][:2]})


@pytest.fixture(scope="module")
def undisturbed(material: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copd_engine.report, "write_report", write_report)
        return train(config_of(material, tmp_path_factory.mktemp("undisturbed")))


def assert_same_run(one: Path, other: Path) -> None:
    """Same files; same weights of all models and checkpoints; same log, samples and result but for times."""
    ours, theirs = contents(one), contents(other)
    assert set(ours) == set(theirs)
    for name in ours:
        if Path(name).suffix in {".safetensors", ".png"} or Path(name).name == "samples.jsonl":
            assert ours[name] == theirs[name], name
        elif Path(name).name == MANIFEST:
            a, b = (json.loads(text[name]) for text in (ours, theirs))
            for manifest in (a, b):
                manifest["state"].pop("elapsed_s")
                manifest.pop("sha256")
            assert a == b, name
    for folder in (".", "baselines/expert"):
        assert numbers(one / folder) == numbers(other / folder)
        a, b = (json.loads((run / folder / "result.json").read_text()) for run in (one, other))
        assert (a["rows"], a["num_steps"], a["domains"]) == (b["rows"], b["num_steps"], b["domains"])


def in_child(work: Callable[[], object]) -> int:
    """Runs ``work`` in a process of its own; returns the signal that ended it, 0 for none."""
    pid = os.fork()
    if pid == 0:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        try:
            work()
        finally:
            os._exit(0)
    return os.WTERMSIG(os.waitpid(pid, 0)[1])


def kill(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class At:
    """Replaces a function: at its ``number``-th call ``instead`` runs, before or ``after`` it."""

    def __init__(
        self, place: Any, name: str, number: int, after: bool = False, instead: Callable[..., None] = kill
    ) -> None:
        self.place, self.name, self.number, self.after, self.instead = place, name, number, after, instead

    def arm(self) -> None:
        real = getattr(self.place, self.name)
        calls = [0]

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] == self.number and not self.after:
                self.instead(*args, **kwargs)
            result = real(*args, **kwargs)
            if calls[0] == self.number and self.after:
                self.instead(*args, **kwargs)
            return result

        setattr(self.place, self.name, counted)


def half_a_log_line(log: MetricsLog, record: dict[str, Any]) -> None:
    with log.path.open("a") as file:
        file.write(json.dumps(record)[:60])
    kill()


def half_a_sample(run_dir: Path, *_: object) -> None:
    with (run_dir / "samples.jsonl").open("a") as file:
        file.write('{"step": 2, "branch": "text", "prompt": "{a}')
    kill()


def half_a_removal(folder: Path, **_: object) -> None:
    (folder / MANIFEST).unlink()
    kill()


def half_a_picture(_: object, file: Path) -> None:
    Path(file).write_bytes(b"half")
    kill()


# fmt: off
MOMENTS: dict[str, list[At]] = {
    "before the folder has its config": [At(run_folder.os, "replace", 1)],
    "before the first line of all": [At(MetricsLog, "write", 1)],
    "in the baseline, before its first checkpoint": [At(MetricsLog, "write", 3, instead=half_a_log_line)],
    "in the baseline, past a checkpoint": [At(MetricsLog, "write", 6)],
    "at the end of the baseline, before its result": [At(model_rows, "save_model", 4)],
    "between the baseline and the run": [At(MetricsLog, "write", LINES + 1)],
    "in the run, before its first checkpoint": [At(MetricsLog, "write", LINES + 2, after=True)],
    "between a step's line and its checkpoint": [At(MetricsLog, "write", LINES + 3, after=True)],
    "between two checkpoints, with a line past the first": [At(MetricsLog, "write", LINES + 4, after=True)],
    "while a checkpoint is written": [At(checkpoint, "save_file", FILES + 2)],
    "while the old checkpoint is removed": [At(checkpoint.shutil, "rmtree", 8, instead=half_a_removal)],
    "behind a checkpoint": [At(checkpoint, "save_checkpoint", SAVED + 1, after=True)],
    "in the middle of a line": [At(MetricsLog, "write", LINES + 4, instead=half_a_log_line)],
    "in the middle of a sample": [At(run_folder, "save_sample", 40, instead=half_a_sample)],
    "in the middle of a picture": [At(run_folder.Image.Image, "save", 1, instead=half_a_picture)],
    "between the models": [At(model_rows, "save_model", 7, after=True)],
    "before the result": [At(run_folder, "write_json", 2)],
    "before the report": [At(copd_engine.report, "write_report", 1)],
    "three times": [
        At(MetricsLog, "write", LINES + 4), At(checkpoint, "save_file", 3), At(MetricsLog, "write", 1, after=True)
    ],
}
# fmt: on


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_ends_as_if_nothing_had_happened(
    material: tuple[Path, Path], undisturbed: Path, tmp_path: Path, moment: str
) -> None:
    config = config_of(material, tmp_path)
    for at in MOMENTS[moment]:

        def killed(at: At = at) -> None:
            if at.name == "write_report":
                at.place.write_report = write_report
            at.arm()
            train(config)

        assert in_child(killed) == signal.SIGKILL
    assert_same_run(train(config), undisturbed)


def test_a_finished_run_is_not_trained_again(
    material: tuple[Path, Path], undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(undisturbed)
    monkeypatch.setattr(Trainer, "__init__", kill)
    assert train(config_of(material, undisturbed.parent)) == undisturbed
    assert contents(undisturbed) == before


def test_the_numbers_are_not_trivially_equal(undisturbed: Path, material: tuple[Path, Path]) -> None:
    """Branches learn in both phases, so that a lost cursor, moment or version would show."""
    base = load_file(material[0] / "model.safetensors")
    for branch in ("text", "image"):
        moved = load_file(undisturbed / f"models/branch-{branch}" / "model.safetensors")
        assert sum(not bool((moved[name] == base[name]).all()) for name in base) > 20
        phases = {r["phase"] for r in read_metrics(undisturbed) if r["branches"].get(branch, {}).get("num_tokens")}
        assert phases == {"rl", "opd"}


@pytest.mark.parametrize("damaged", [1, 2])
def test_a_damaged_newest_checkpoint(
    material: tuple[Path, Path], tmp_path: Path, undisturbed: Path, damaged: int
) -> None:
    """Of three, one or two: the run goes on from the newest whole one, to the same end."""
    config = config_of(material, tmp_path, checkpoint={"every": 1, "keep": 3})
    stop = At(MetricsLog, "write", LINES + 5)
    assert in_child(lambda: (stop.arm(), train(config))) == signal.SIGKILL
    run_dir = tmp_path / "small"
    paths = complete_checkpoints(run_dir / "checkpoints")
    assert [path.name for path in paths] == ["step-000001", "step-000002", "step-000003"]
    for path in paths[-damaged:]:
        file = path / "model-text.safetensors"
        content = bytearray(file.read_bytes())
        content[-9] ^= 1
        file.write_bytes(content)
    first = []

    class Watched(Trainer):
        def step(self, plan: Any) -> dict[str, Any]:
            first.append(plan.step)
            return super().step(plan)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "Trainer", Watched)
        train(config)
    assert first[0] == 4 - damaged
    assert numbers(run_dir) == numbers(undisturbed)
    for model in ("merged", "branch-text", "branch-image"):
        file = f"models/{model}/model.safetensors"
        assert (run_dir / file).read_bytes() == (undisturbed / file).read_bytes()


def test_a_lost_log_does_not_lose_the_training(material: tuple[Path, Path], tmp_path: Path, undisturbed: Path) -> None:
    config = config_of(material, tmp_path)
    stop = At(MetricsLog, "write", LINES + 4)
    assert in_child(lambda: (stop.arm(), train(config))) == signal.SIGKILL
    (tmp_path / "small/metrics.jsonl").unlink()
    run_dir = train(config)
    assert numbers(run_dir) == numbers(undisturbed)[3:]
    file = "models/merged/model.safetensors"
    assert (run_dir / file).read_bytes() == (undisturbed / file).read_bytes()


class StoppedError(Exception):
    pass


def test_every_stream_goes_on_with_the_next_prompt(
    material: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts drawn by a run stopped in step 4 and resumed from step 2 are those of a run that was not, in order.

    Twelve prompts and 8 native ones per branch and cycle: the streams pass into their second epoch.
    """
    drawn: list[tuple[str, ...]] = []
    take = DataStream.take

    def watched(self: DataStream, n: int) -> list[Example]:
        examples = take(self, n)
        drawn.append(tuple(example.uid for example in examples))
        return examples

    monkeypatch.setattr(DataStream, "take", watched)
    changes = {"baselines": [], "schedule": {"cycles": 2, "rl_steps": 2, "opd_steps": 2}, "checkpoint": {"every": 2}}
    config = config_of(material, tmp_path, **changes)
    Trainer(config, tmp_path / "whole").run()
    whole, drawn[:] = list(drawn), []

    with monkeypatch.context() as patch:
        step = Trainer.step

        def stopped(self: Trainer, plan: Any) -> dict[str, Any]:
            record = step(self, plan)
            if plan.step == 4:
                raise StoppedError
            return record

        patch.setattr(Trainer, "step", stopped)
        with pytest.raises(StoppedError):
            Trainer(config, tmp_path / "resumed").run()
    before, drawn[:] = list(drawn), []
    Trainer(config, tmp_path / "resumed").run()
    assert before == whole[: len(before)]
    per_step = [2, 2, 4, 4] * 2  # a native batch per branch, then a cross batch too
    assert len(before) == sum(per_step[:4])
    assert drawn == whole[sum(per_step[:2]) :]
    for run_dir in (tmp_path / "whole", tmp_path / "resumed"):
        state = read_manifest(complete_checkpoints(run_dir / "checkpoints")[-1])["state"]
        assert state["streams"] == {
            "text/text": {"epoch": 1, "cursor": 4, "num_drawn": 16, "num_skipped": 0},  # 8 steps x 2 prompts
            "image/image": {"epoch": 1, "cursor": 4, "num_drawn": 16, "num_skipped": 0},
            "text/image": {"epoch": 0, "cursor": 8, "num_drawn": 8, "num_skipped": 0},  # 4 steps x 2 prompts
            "image/text": {"epoch": 0, "cursor": 8, "num_drawn": 8, "num_skipped": 0},
        }
        assert state["rollouts_drawn"] == {"text": 24 * 4, "image": 24 * 4}


def test_kill_minus_nine_of_the_command_and_resume_of_its_folder(material: tuple[Path, Path], tmp_path: Path) -> None:
    """As a user does it: a process of its own, killed somewhere past a checkpoint, then ``copd train --resume RUN``."""
    changes = {"baselines": [], "schedule": {"cycles": 4, "rl_steps": 2, "opd_steps": 2}}
    small = small_config(*material, tmp_path / "runs", checkpoint={"every": 3, "keep": 2}, **changes)
    file = write_config(tmp_path / "config.yaml", {**small, "branches": small["branches"][:2]})
    log = tmp_path / "runs/small/metrics.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-c", "from copd_engine.cli import main; main()", "train", str(file)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 120
        while not log.exists() or log.read_bytes().count(b"\n") < 6:
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "runs/small/result.json").exists()
    moved = shutil.move(tmp_path / "runs/small", tmp_path / "moved")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["copd", "train", "--resume", str(moved)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert ended.value.code == 0
    whole = train({**small, "branches": small["branches"][:2], "name": "whole"})
    assert numbers(moved) == numbers(whole)
    assert [row["step"] for row in numbers(moved)] == list(range(17))
    for model in ("merged", "branch-text", "branch-image"):
        weights = f"models/{model}/model.safetensors"
        assert (moved / weights).read_bytes() == (whole / weights).read_bytes()
