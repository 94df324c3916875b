"""A process that trains units, one after the other. It ends with the study's own process, however that ends."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import signal
import threading
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from copd_engine.child_process import end_with_parent
from copd_engine.run_folder import CHECKPOINTS
from copd_engine.study.config import PILOT, PilotConfig
from copd_engine.study.plan import Unit
from copd_engine.types import UserError


class Job(NamedTuple):
    """A unit, and what it is trained with. ``experts``: the run whose experts the pilot takes. ``log``: where its
    process writes what it would print."""

    unit: Unit
    experts: Path | None
    pilot: PilotConfig | None
    command: str
    log: Path


class Outcome(NamedTuple):
    """``error`` is None for a unit that finished. ``cpu_s``: of the process and of those it started."""

    error: str | None
    wall_s: float
    cpu_s: float


@dataclass
class Worker:
    """The process, seen from outside. ``job`` is what it is training, ``given`` the time at which it got it."""

    process: multiprocessing.process.BaseProcess
    connection: Connection
    job: Job | None = None
    given: float = 0.0

    @classmethod
    def start(cls) -> Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        return cls(process, ours)

    def give(self, job: Job) -> None:
        self.job, self.given = job, time.perf_counter()
        self.connection.send(job)

    def outcome(self) -> Outcome | None:
        """What became of its job; None where the process died."""
        self.job = None
        try:
            outcome: Outcome = self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            return None
        return outcome

    def stop(self) -> None:
        """End the process: on its own where it is idle."""
        self.connection.close()
        if self.job is not None:
            self.process.terminate()
        self.process.join()


def _serve(connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the study's process answers it
    end_with_parent()
    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, which a terminated process leaves behind
    while True:
        try:
            job: Job = connection.recv()
        except EOFError:
            return
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with job.log.open("a") as log:
            for descriptor in (1, 2):
                os.dup2(log.fileno(), descriptor)
        wall, cpu = time.perf_counter(), _cpu_seconds()
        error = None
        try:
            _train(job)
        except UserError as problem:
            error = " ".join(str(problem).split())
        except Exception as problem:
            traceback.print_exc()
            error = f"{type(problem).__name__}: {' '.join(str(problem).split())}"
        connection.send(Outcome(error, time.perf_counter() - wall, _cpu_seconds() - cpu))


def _train(job: Job) -> None:
    unit = job.unit
    if unit.variant == PILOT:
        from copd_engine.study.pilot import run_pilot

        assert job.pilot is not None
        assert job.experts is not None
        run_pilot(unit.config, job.pilot, job.experts, unit.folder)
    else:
        from copd_engine.trainer import Trainer

        Trainer(unit.config, unit.folder, job.command).run()
        # Nobody goes on from a finished unit; of a large model they would be most of the study's disk.
        shutil.rmtree(unit.folder / CHECKPOINTS)


def _cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
