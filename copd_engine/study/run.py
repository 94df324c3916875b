"""Trains the units of a study that are not finished: those that others need first, several processes side by side."""

from __future__ import annotations

import contextlib
import fcntl
import json
import resource
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from copd_engine.metrics import read_jsonl
from copd_engine.study.config import PILOT, StudyConfig
from copd_engine.study.plan import STUDY, Unit, claim_folder, units_of
from copd_engine.study.worker import Job, Outcome, Worker, gpu_share, visible_gpus
from copd_engine.types import UserError

TIMES, SESSIONS = "times.jsonl", "sessions.jsonl"


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
        session = stack.enter_context(_session(root)) if todo else ""
        workers: list[Worker] = []
        stack.callback(_stop, workers)
        devices, num_processes = visible_gpus(), min(study.processes, len(todo))
        workers.extend(Worker.start(gpu_share(devices, num_processes, index)) for index in range(num_processes))
        return _Scheduler(study, units, todo, root, command, bar, session).run(workers)


def _stop(workers: list[Worker]) -> None:
    for worker in workers:
        worker.stop()
    for worker in workers:
        worker.process.join()


class _Scheduler:
    def __init__(
        self,
        study: StudyConfig,
        units: Sequence[Unit],
        todo: list[Unit],
        root: Path,
        command: str,
        bar: tqdm[Any],
        session: str,
    ) -> None:
        self._study = study
        self._todo = todo
        self._finished = {unit.name for unit in units} - {unit.name for unit in todo}
        self._root = root
        self._command = command
        self._bar = bar
        self._errors: dict[str, str] = {}
        self._times: dict[str, list[float]] = {}
        self._session = session
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
                if worker.connection in ready and not self._take(worker):
                    # A broken CUDA context would fail every unit after it, an engine left open would keep its memory.
                    worker.end()
                    workers.remove(worker)
                    if self._todo:
                        workers.append(Worker.start(worker.gpus))

    def _next(self) -> Unit | None:
        """The first unit whose needs are met, out of the list; those of which one failed leave it as failed."""
        while self._drop_one():  # what it fails may be needed by one that stands before it
            pass
        for unit in self._todo:
            if self._finished.issuperset(_needs(unit)):
                self._todo.remove(unit)
                return unit
        return None

    def _drop_one(self) -> bool:
        for unit in self._todo:
            failed = next((need for need in _needs(unit) if need in self._errors), None)
            if failed is not None:
                self._todo.remove(unit)
                self._fail(unit, f"it needs {failed}, which failed")
                return True
        return False

    def _job(self, unit: Unit) -> Job:
        pilot = self._study.pilot if unit.variant == PILOT else None
        experts = None if pilot is None else unit.folder.parent / pilot.experts
        return Job(unit, experts, pilot, self._command, self._log_of(unit))

    def _log_of(self, unit: Unit) -> Path:
        return self._root / "logs" / f"{unit.name.replace('/', '-')}.txt"

    def _take(self, worker: Worker) -> bool:
        """Whether the unit finished."""
        job = worker.job
        assert job is not None
        unit, outcome = job.unit, worker.outcome()
        if outcome is None:  # what it computed is known when the session ends
            error = f"its process ended with exit code {worker.process.exitcode}"
            outcome = Outcome(error, time.perf_counter() - worker.given, 0.0)
        line = {
            "unit": unit.name,
            **outcome._asdict(),
            "session": self._session,
            "session_s": time.perf_counter() - self._started,
        }
        _append(self._root / TIMES, line)
        if outcome.error is not None:
            self._fail(unit, outcome.error)
            return False
        self._finished.add(unit.name)
        self._times.setdefault(unit.variant, []).append(outcome.wall_s)
        self._bar.update()
        left = self._seconds_left()
        self._bar.write(f"{unit.name}: finished in {outcome.wall_s:.0f} s; about {left / 60:.0f} min left")
        return True

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


def _needs(unit: Unit) -> list[str]:
    return [f"seed-{unit.seed}/{name}" for name in unit.needs]


def times_of(root: Path) -> list[dict[str, Any]]:
    """What each unit took, in the order in which they ended."""
    return read_jsonl(root / TIMES) if (root / TIMES).is_file() else []


class Spent(NamedTuple):
    """What all sessions of a study took, those too that were stopped. A session that was killed says nothing at its
    end: it counts until its last unit ended, ``num_killed`` of ``num_sessions``."""

    wall_s: float
    cpu_s: float
    num_sessions: int
    num_killed: int


def spent(root: Path) -> Spent:
    """Wall and CPU time of the study in ``root``."""
    lines = read_jsonl(root / SESSIONS) if (root / SESSIONS).is_file() else []
    units = times_of(root)
    names = dict.fromkeys([line["session"] for line in (*lines, *units)])
    stopped = {line["session"]: line for line in lines if line["event"] == "stop"}
    wall_s = cpu_s = 0.0
    for name in names:
        of_units = [line for line in units if line["session"] == name]
        if name in stopped:
            wall_s += stopped[name]["session_s"]
            cpu_s += stopped[name]["cpu_s"]
        else:
            wall_s += max((line["session_s"] for line in of_units), default=0.0)
            cpu_s += sum(line["cpu_s"] for line in of_units)
    return Spent(wall_s, cpu_s, len(names), len(names) - len(stopped))


@contextlib.contextmanager
def _session(root: Path) -> Iterator[str]:
    """A line when the session starts and one when it stops, which knows the CPU time of all processes it had."""
    name, started = datetime.now(UTC).isoformat(timespec="microseconds"), time.perf_counter()
    before = _cpu_seconds_of_children()
    _append(root / SESSIONS, {"session": name, "event": "start"})
    try:
        yield name
    finally:
        took = {"session_s": time.perf_counter() - started, "cpu_s": _cpu_seconds_of_children() - before}
        _append(root / SESSIONS, {"session": name, "event": "stop", **took})


def _cpu_seconds_of_children() -> float:
    """Of those that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _append(file: Path, line: dict[str, Any]) -> None:
    with file.open("a") as lines:
        lines.write(json.dumps(line) + "\n")


@contextlib.contextmanager
def _lock(root: Path) -> Iterator[None]:
    """One process at a time runs a study; the lock ends with the process."""
    with (root / STUDY).open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is running the study in {root}; wait for it") from None
        yield
