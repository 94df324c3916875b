"""A process that trains units, one after the other. It ends with the study's own process, however that ends."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from copd_engine import checkpoint
from copd_engine.child_process import end_with_parent
from copd_engine.run_folder import CHECKPOINTS
from copd_engine.study.config import PILOT, PilotConfig
from copd_engine.study.plan import Unit
from copd_engine.types import UserError

VISIBLE = "CUDA_VISIBLE_DEVICES"


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
    """The process, seen from outside. ``job`` is what it is training, ``given`` the time at which it got it; ``gpus``
    what it sees as ``CUDA_VISIBLE_DEVICES``, None for the same as the study's own process.

    It is no daemon, which could have no children, and sglang runs in one: :func:`end_with_parent` ends it instead.
    """

    process: multiprocessing.process.BaseProcess
    connection: Connection
    gpus: str | None = None
    job: Job | None = None
    given: float = 0.0

    @classmethod
    def start(cls, gpus: str | None = None) -> Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs,))
        with _visible(gpus):  # the child's from its first line on, before anything imports torch
            process.start()
        theirs.close()
        return cls(process, ours, gpus)

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
        """Make the process end: on its own where it is idle."""
        self.connection.close()
        if self.job is not None:
            self.process.terminate()

    def end(self) -> None:
        """End the process as it is, with whatever a failed unit left behind in it."""
        self.connection.close()
        self.process.terminate()
        self.process.join()


@contextlib.contextmanager
def _visible(gpus: str | None) -> Iterator[None]:
    """Processes that are started in the block see these GPUs."""
    before = os.environ.get(VISIBLE)
    if gpus is not None:
        os.environ[VISIBLE] = gpus
    try:
        yield
    finally:
        if gpus is not None and before is None:
            del os.environ[VISIBLE]
        elif before is not None:
            os.environ[VISIBLE] = before


def gpu_share(devices: Sequence[str], num_processes: int, index: int) -> str | None:
    """What process ``index`` gets of these GPUs, as ``CUDA_VISIBLE_DEVICES``: every ``num_processes``-th of them, one
    in turn where there are fewer than processes; None, which changes nothing, where there is nothing to share out."""
    if len(devices) < 2 or num_processes < 2:
        return None
    return ",".join(devices[index::num_processes]) or devices[index % len(devices)]


def visible_gpus() -> list[str]:
    """Names of the CUDA devices that this process sees, without asking CUDA: it would take memory on the first one."""
    named = os.environ.get(VISIBLE)
    if named is None:
        return [str(number) for number in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]
    return [name for item in named.split(",") if (name := item.strip())]


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

        try:
            Trainer(unit.config, unit.folder, job.command).run()
        except UserError:
            if damage := _damage(unit.folder / CHECKPOINTS):
                raise UserError(
                    f"{damage}; no other checkpoint is whole: remove {unit.folder}, and the same command trains it anew"
                ) from None
            raise
        # Nobody goes on from a finished unit; of a large model they would be most of the study's disk.
        shutil.rmtree(unit.folder / CHECKPOINTS)


def _damage(checkpoints: Path) -> str | None:
    """What is wrong with the newest checkpoint, if none is whole."""
    damage = None
    for path in checkpoint.complete_checkpoints(checkpoints):
        try:
            checkpoint.read_manifest(path)
        except UserError as error:
            damage = str(error)
        else:
            return None
    return damage


def _cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
