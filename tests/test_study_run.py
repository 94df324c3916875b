"""A study as a command: killed in the middle and run again, units that fail, who may run in a folder."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import yaml

from copd_engine import run_folder
from copd_engine.metrics import read_metrics
from copd_engine.resolve import resolve
from copd_engine.study.config import load_study
from copd_engine.study.plan import claim_folder, units_of
from copd_engine.study.run import TIMES, run_study, spent, times_of
from copd_engine.study.worker import Job, Worker, gpu_share, visible_gpus
from copd_engine.types import UserError
from tests import cli_site
from tests.cli_site import Ended
from tests.small_run import contents, small_config, write_base, write_data

copd = cli_site.copd


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("material")
    return write_base(folder / "base"), write_data(folder / "data")


def write_study(material: tuple[Path, Path], folder: Path, **sections: Any) -> Path:
    run = small_config(*material, folder, schedule={"cycles": 1, "rl_steps": 1, "opd_steps": 1})
    run |= {"branches": run["branches"][:2], "checkpoint": {"every": 1, "keep": 1}}
    study = {
        "name": "small",
        "output_dir": str(folder),
        "seeds": [1],
        "processes": 2,
        "run": run,
        "methods": ["copd", "static_opd", "expert"],
        **sections,
    }
    file = folder / "study.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(study))
    return file


def start(file: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", "from copd_engine.cli import main; main()", "study", str(file)]
    return subprocess.Popen(command, stderr=subprocess.PIPE)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 200
    while not condition():
        assert process.poll() is None, "it ended before"
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.02)


def is_stopped_in_the_middle(seed: Path) -> bool:
    is_counted = (seed.parent / TIMES).is_file()
    return (
        is_counted and (seed / "copd/result.json").is_file() and any((seed / "long/checkpoints").glob("step-*"))
    )  # whole ones


@pytest.mark.timeout(600)  # three starts of the command on a machine that may be busy
@pytest.mark.parametrize("with_signal", [signal.SIGKILL, signal.SIGINT])
def test_a_study_that_was_stopped_goes_on_where_it_was(
    material: tuple[Path, Path], tmp_path: Path, with_signal: signal.Signals
) -> None:
    """Stopped when one unit is finished and another one has a checkpoint. No process stays behind, what is finished is
    not touched again, what was begun is not begun anew."""
    long = {"changes": {"method": "copd", "schedule": {"cycles": 30}}}
    file = write_study(material, tmp_path, methods=["copd"], variants={"long": long})
    seed = tmp_path / "small" / "seed-1"
    process = start(file)
    try:
        wait_for(lambda: is_stopped_in_the_middle(seed), process)
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= 2
        process.send_signal(with_signal)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == (130 if with_signal == signal.SIGINT else -signal.SIGKILL)
    assert b"Traceback" not in errors
    psutil.wait_procs(children, timeout=20)
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    assert not (seed / "long/result.json").exists()
    begun = read_metrics(seed / "long")
    finished = contents(seed / "copd")
    times = {path: path.stat().st_mtime_ns for path in (seed / "copd").rglob("*")}

    again = start(file)
    assert again.wait(timeout=240) == 0, again.stderr and again.stderr.read().decode()
    assert contents(seed / "copd") == finished
    assert {path: path.stat().st_mtime_ns for path in (seed / "copd").rglob("*")} == times
    records = read_metrics(seed / "long")
    assert [record["step"] for record in records] == list(range(61))
    assert records[:2] == begun[:2]  # elapsed seconds and all
    assert [line["unit"] for line in times_of(tmp_path / "small")] == ["seed-1/copd", "seed-1/long"]
    assert len({line["session"] for line in times_of(tmp_path / "small")}) == 2
    took = spent(tmp_path / "small")
    assert (took.num_sessions, took.num_killed) == (2, int(with_signal == signal.SIGKILL))
    of_units = sum(line["cpu_s"] for line in times_of(tmp_path / "small"))
    assert took.cpu_s > of_units  # with what was trained of the unit that was stopped
    assert "2 of 2" in (tmp_path / "small/study.md").read_text()


def test_a_unit_that_fails_stops_only_what_needs_it(
    material: tuple[Path, Path], tmp_path: Path, copd: Callable[..., Ended]
) -> None:
    file = write_study(material, tmp_path)
    ended = copd("study", str(file), "variants.expert.changes={method: expert, model: {path: /nowhere}}")
    shown = ended.out + ended.err
    assert ended.code == 1
    assert "seed-1/expert: FAILED: " in shown
    assert str(tmp_path / "small/seed-1/expert") in shown
    last = ended.err.splitlines()[-3:]
    assert last[0].startswith("copd: seed-1/expert failed: ")
    assert "/nowhere" in last[0]
    assert last[1:] == [
        f"copd: seed-1/static_opd_{student} failed: it needs seed-1/expert, which failed"
        for student in ("text", "image")
    ]
    page = (tmp_path / "small/study.md").read_text()
    assert "/nowhere" in page
    for student in ("text", "image"):
        assert f"- seed-1/static_opd_{student}: it needs seed-1/expert, which failed" in page
    assert (tmp_path / "small/seed-1/copd/result.json").is_file()
    errors = {line["unit"]: line["error"] for line in times_of(tmp_path / "small")}
    assert errors["seed-1/copd"] is None
    assert "/nowhere" in errors["seed-1/expert"]


def test_a_process_that_dies_fails_its_unit_alone(
    material: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that takes all the memory is killed by the system; the next unit gets a new process."""
    study = load_study(write_study(material, tmp_path, methods=["copd"], processes=1))
    give = Worker.give

    def give_and_kill(self: Worker, job: Job) -> None:
        give(self, job)
        if job.unit.variant == "first":
            self.process.kill()

    monkeypatch.setattr(Worker, "give", give_and_kill)
    variants = dict.fromkeys(("first", "second"), study.variants["copd"])
    study = study.model_copy(update={"variants": variants, "claims": (), "tables": (), "steps": ()})
    error = "its process ended with exit code -9"
    assert run_study(study) == {"seed-1/first": error}
    first, second = times_of(tmp_path / "small")
    assert (first["unit"], first["error"], second["unit"], second["error"]) == (
        "seed-1/first",
        error,
        "seed-1/second",
        None,
    )
    assert first["wall_s"] > 0
    assert spent(tmp_path / "small").cpu_s > second["cpu_s"]
    assert (tmp_path / "small/seed-1/second/result.json").is_file()


class StartsAChild(NamedTuple):
    """Stands for a unit whose engine runs in a process of its own, as sglang does. It says how that ended."""

    folder: Path

    @property
    def variant(self) -> str:
        child = multiprocessing.get_context("spawn").Process(target=os.getpid)
        child.start()
        child.join()
        raise UserError(f"its child ended with {child.exitcode}")


def test_a_unit_may_start_a_process(tmp_path: Path) -> None:
    """Which daemons of multiprocessing may not."""
    worker = Worker.start()
    try:
        worker.give(Job(StartsAChild(tmp_path), None, None, "", tmp_path / "logs" / "log.txt"))  # type: ignore[arg-type]
        outcome = worker.outcome()
        assert outcome is not None
        assert outcome.error == "its child ended with 0"
    finally:
        worker.end()
    assert not worker.process.is_alive()


class LeavesAChild(NamedTuple):
    """Fails and leaves a process open, as an engine that was not closed."""

    folder: Path

    @property
    def variant(self) -> str:
        multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,)).start()
        raise UserError("left open")


def test_a_process_that_a_unit_failed_in_ends_whatever_was_left_in_it(tmp_path: Path) -> None:
    worker = Worker.start()
    assert worker.process.pid is not None
    worker.give(Job(LeavesAChild(tmp_path), None, None, "", tmp_path / "log.txt"))  # type: ignore[arg-type]
    outcome = worker.outcome()
    left = psutil.Process(worker.process.pid).children()
    begin = time.monotonic()
    worker.end()
    assert time.monotonic() - begin < 60
    assert outcome is not None
    assert outcome.error == "left open"
    assert not worker.process.is_alive()
    for child in left:
        child.kill()


def test_a_failed_unit_takes_its_process_with_it(
    material: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its CUDA context may be broken, its engine open: the next unit gets a new process with the same GPUs."""
    study = load_study(write_study(material, tmp_path, methods=["copd"], processes=1))
    bad = study.variants["copd"].model_copy(update={"changes": {"model": {"path": "/nowhere"}}})
    variants = {"bad": bad, "good": study.variants["copd"], "better": study.variants["copd"]}
    study = study.model_copy(update={"variants": variants, "claims": (), "tables": (), "steps": ()})
    trained: dict[str, tuple[int | None, str | None]] = {}
    give = Worker.give

    def watched(self: Worker, job: Job) -> None:
        trained[job.unit.variant] = (self.process.pid, self.gpus)
        give(self, job)

    monkeypatch.setattr(Worker, "give", watched)
    monkeypatch.setattr("copd_engine.study.run.gpu_share", lambda devices, num, index: f"gpu {index} of {num}")
    assert list(run_study(study)) == ["seed-1/bad"]
    pids = {name: pid for name, (pid, _) in trained.items()}
    assert pids["good"] == pids["better"] != pids["bad"]
    assert {gpus for _, gpus in trained.values()} == {"gpu 0 of 1"}


def test_units_that_need_what_failed_are_all_named_whatever_their_order(
    material: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one process: what fails last stands behind what needs it, and that behind what needs that."""
    study = load_study(write_study(material, tmp_path, methods=["copd"], processes=1))
    of = study.variants["copd"].model_copy
    chain = {
        "mopd": of(update={"changes": {"method": "mopd"}, "experts": "expert"}),
        "expert": of(update={"changes": {"method": "expert"}, "flops_of": "copd"}),
        "copd": of(update={"changes": {"model": {"path": "/nowhere"}}}),
    }
    study = study.model_copy(update={"variants": chain, "claims": (), "tables": (), "steps": ()})
    errors = run_study(study)
    assert list(errors) == ["seed-1/copd", "seed-1/expert", "seed-1/mopd"]
    assert errors["seed-1/mopd"] == "it needs seed-1/expert, which failed"


def test_a_unit_without_a_whole_checkpoint_says_what_to_remove(material: tuple[Path, Path], tmp_path: Path) -> None:
    """--overwrite and name=..., which a run of its own is told, would lose the study."""
    study = load_study(write_study(material, tmp_path, methods=["copd"], processes=1))
    folder = tmp_path / "small" / "seed-1" / "copd"
    (unit,) = units_of(study)
    claim_folder(study)
    run_folder.claim(folder, resolve(unit.config))
    checkpoint = folder / "checkpoints" / "step-000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{")
    (error,) = run_study(study).values()
    assert error.startswith(f"checkpoint {checkpoint}: manifest.json is not JSON")
    assert error.endswith(f"; no other checkpoint is whole: remove {folder}, and the same command trains it anew")
    shutil.rmtree(folder)
    assert run_study(study) == {}


@pytest.mark.parametrize(
    ("devices", "num_processes", "expected"),
    [
        ([], 3, [None, None, None]),
        (["0"], 2, [None, None]),
        (["0", "1"], 1, [None]),
        (["0", "1"], 2, ["0", "1"]),
        (["2", "GPU-5f"], 5, ["2", "GPU-5f", "2", "GPU-5f", "2"]),
        (["0", "1", "2", "3", "4"], 2, ["0,2,4", "1,3"]),
    ],
)
def test_processes_share_out_the_gpus(devices: list[str], num_processes: int, expected: list[str | None]) -> None:
    assert [gpu_share(devices, num_processes, index) for index in range(num_processes)] == expected


def test_the_gpus_that_are_visible_are_those_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, expected in (("0,GPU-5f, MIG-1", ["0", "GPU-5f", "MIG-1"]), ("3", ["3"]), ("", [])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        assert visible_gpus() == expected


class SaysItsGpus(NamedTuple):
    folder: Path

    @property
    def variant(self) -> str:
        raise UserError(os.environ.get("CUDA_VISIBLE_DEVICES", "none"))


@pytest.mark.parametrize("before", [None, "0,1"])
def test_a_process_sees_its_share_and_the_parent_what_it_saw(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, before: str | None
) -> None:
    if before is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before)
    worker = Worker.start("1")
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == before
    worker.give(Job(SaysItsGpus(tmp_path), None, None, "", tmp_path / "log.txt"))  # type: ignore[arg-type]
    outcome = worker.outcome()
    worker.end()
    assert outcome is not None
    assert outcome.error == "1"


def test_two_processes_cannot_run_one_study(material: tuple[Path, Path], tmp_path: Path) -> None:
    study = load_study(write_study(material, tmp_path, methods=["copd"]))
    assert run_study(study) == {}
    before = contents(tmp_path / "small")
    with (tmp_path / "small" / "study.json").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is running the study"):
            run_study(study)
    assert run_study(study) == {}
    assert contents(tmp_path / "small") == before
    assert json.loads(before["seed-1/copd/result.json"])["method"] == "copd"
