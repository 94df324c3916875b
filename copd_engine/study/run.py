"""Trains the units of a study that are not finished: those that others need first, several processes side by side."""

from __future__ import annotations

import contextlib
import fcntl
import json
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from tqdm import tqdm

from copd_engine.metrics import read_jsonl
from copd_engine.study.config import StudyConfig
from copd_engine.study.plan import STUDY, Unit, claim_folder, units_of
from copd_engine.study.worker import Job, Worker
from copd_engine.types import UserError

TIMES = "times.jsonl"


def run_study(study: StudyConfig, command: str = "", fast: bool = False) -> dict[str, str]:
    """Train what is not finished; returns unit -> what went wrong, empty when all are finished.

    A unit that fails does not stop the others, only those that need it. Units that were interrupted go on from their
    checkpoints. UserError for a config that is wrong, for a folder of another study, and while another process trains
    in it.
    """
    units = units_of(study, fast)
    root = claim_folder(study, fast)
    with _lock(root), contextlib.ExitStack() as stack:
        todo = [unit for unit in units if not unit.is_finished]
        bar = tqdm(total=len(units), initial=len(units) - len(todo), desc=study.name, unit="unit", dynamic_ncols=True)
        stack.callback(bar.close)
        workers = [Worker.start() for _ in range(min(study.processes, len(todo)))]
        stack.callback(_stop, workers)
        return _Scheduler(study, units, todo, root, command, bar).run(workers)


def _stop(workers: list[Worker]) -> None:
    for worker in workers:
        worker.stop()


class _Scheduler:
    def __init__(
        self, study: StudyConfig, units: Sequence[Unit], todo: list[Unit], root: Path, command: str, bar: tqdm[Any]
    ) -> None:
        self._study = study
        self._todo = todo
        self._finished = {unit.name for unit in units} - {unit.name for unit in todo}
        self._root = root
        self._command = command
        self._bar = bar
        self._errors: dict[str, str] = {}
        self._times: dict[str, list[float]] = {}
        self._session = datetime.now(UTC).isoformat(timespec="seconds")
        self._started = time.perf_counter()
        self._num_processes = study.processes

    def run(self, workers: list[Worker]) -> dict[str, str]:
        while True:
            for worker in workers:
                if worker.job is None and (unit := self._next()) is not None:
                    worker.give(self._job(unit))
            busy = [worker for worker in workers if worker.job is not None]
            if not busy:
                return self._errors
            ready = wait([worker.connection for worker in busy])
            for worker in busy:
                if worker.connection in ready:
                    self._take(worker)
                    if not worker.process.is_alive():
                        workers[workers.index(worker)] = Worker.start()

    def _next(self) -> Unit | None:
        """The first unit whose need is met, out of the list; those whose need failed leave it as failed."""
        for unit in list(self._todo):
            need = f"seed-{unit.seed}/{unit.needs}"
            if unit.needs is None or need in self._finished:
                self._todo.remove(unit)
                return unit
            if need in self._errors:
                self._todo.remove(unit)
                self._fail(unit, f"it needs {need}, which failed")
        return None

    def _job(self, unit: Unit) -> Job:
        experts = None if unit.needs is None else unit.folder.parent / unit.needs
        return Job(unit, experts, self._study.pilot, self._command, self._log_of(unit))

    def _log_of(self, unit: Unit) -> Path:
        return self._root / "logs" / f"{unit.name.replace('/', '-')}.txt"

    def _take(self, worker: Worker) -> None:
        job = worker.job
        assert job is not None
        unit, outcome = job.unit, worker.outcome()
        if outcome is None:
            self._fail(unit, f"its process ended with exit code {worker.process.exitcode}")
            return
        line = {
            "unit": unit.name,
            "error": outcome.error,
            "wall_s": outcome.wall_s,
            "cpu_s": outcome.cpu_s,
            "session": self._session,
            "session_s": time.perf_counter() - self._started,
        }
        with (self._root / TIMES).open("a") as file:
            file.write(json.dumps(line) + "\n")
        if outcome.error is not None:
            self._fail(unit, outcome.error)
            return
        self._finished.add(unit.name)
        self._times.setdefault(unit.variant, []).append(outcome.wall_s)
        self._bar.update()
        left = self._seconds_left()
        self._bar.write(f"{unit.name}: finished in {outcome.wall_s:.0f} s; about {left / 60:.0f} min left")

    def _fail(self, unit: Unit, error: str) -> None:
        self._errors[unit.name] = error
        self._bar.write(f"{unit.name}: FAILED: {error} ({unit.folder}, {self._log_of(unit)})")

    def _seconds_left(self) -> float:
        """Units that wait or are being trained, each as long as its variant took so far, or as the mean of all."""
        times = [seconds for values in self._times.values() for seconds in values]
        mean = sum(times) / len(times)
        known = {variant: sum(values) / len(values) for variant, values in self._times.items()}
        left = sum(known.get(unit.variant, mean) for unit in self._todo)
        return left / self._num_processes + mean / 2  # those being trained are half done on average


def times_of(root: Path) -> list[dict[str, Any]]:
    """What each unit took, in the order in which they ended."""
    return read_jsonl(root / TIMES) if (root / TIMES).is_file() else []


@contextlib.contextmanager
def _lock(root: Path) -> Iterator[None]:
    """One process at a time runs a study; the lock ends with the process."""
    with (root / STUDY).open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is running the study in {root}; wait for it") from None
        yield
