"""Worker processes that compare answers under a limit of time and memory, and can be killed.

sympy may take forever for a short text (``9**9**9**9``), holds the interpreter's lock while it does, and takes all
memory there is. Only another process can be stopped. Workers start when first needed and stay; one that runs out of
time or dies is replaced, and the other comparisons of the batch are not touched.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import lru_cache
from multiprocessing.connection import Connection, wait
from typing import Any

logger = logging.getLogger(__name__)

MAX_WORKERS = 8
#: What a worker says between loading what a comparison needs and the comparison itself, whose time starts there.
BEGIN = b"begin"
#: Exit status of a worker that ran into its memory limit.
OUT_OF_MEMORY = 3
_WORKER = "copd_engine.verifiers.worker"
#: Starts of a worker that end before it could begin, one after the other, until the run stops.
_MAX_FAILED_STARTS = 3


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of one comparison: seconds of CPU time, and of the clock on a machine that is busy; bytes of address space.

    CPU time decides where it can, so that a score does not depend on the load, which is high while responses are being
    sampled on the same cores; the clock ends what waits for nothing. ``load_s``: starting a worker and
    importing what the comparison needs, which is no part of it.
    """

    cpu_s: float = 2.0
    wall_s: float = 10.0
    memory_bytes: int = 2 << 30
    load_s: float = 120.0


@dataclass(frozen=True)
class Failures:
    """Comparisons that ended without a result, each scored 0: for lack of time, of memory, or by a crash."""

    timeouts: int = 0
    out_of_memory: int = 0
    crashes: int = 0


@dataclass(frozen=True)
class Job:
    """``function(*call)``, a score; ``prepare(*call)`` goes before it, outside the time limit.

    Both are found by their module's name in the worker.
    """

    function: Callable[..., float]
    call: tuple[Any, ...]
    prepare: Callable[..., object] | None = None


class _Worker:
    """One process and what it is busy with."""

    def __init__(self, limits: Limits) -> None:
        ours, theirs = socket.socketpair()
        # The parent's import path as it stands, and nothing of the working directory in front of it.
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the worker)
        command = [sys.executable, "-P", "-m", _WORKER, str(theirs.fileno()), str(os.getpid())]
        command += [str(limits.memory_bytes), str(limits.cpu_s), str(limits.wall_s)]
        self.process = subprocess.Popen(
            command,
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._stderr,
            # No hash seed: sympy's order of terms, and with it what it can settle, must not change from run to run.
            env=os.environ | threads | {"PYTHONPATH": path, "PYTHONHASHSEED": "0", "CUDA_VISIBLE_DEVICES": ""},
            start_new_session=True,  # out of reach of the terminal's Ctrl-C
        )
        theirs.close()
        self.connection = Connection(ours.detach())
        self.job: int | None = None
        self.begun = False
        self.deadline = 0.0

    def end(self) -> int:
        """Kill it if it runs; its exit status, negative for a signal."""
        self.connection.close()
        self.process.kill()
        status = self.process.wait()
        self._stderr.close()
        return status

    def last_words(self) -> str:
        self._stderr.seek(0)
        return self._stderr.read()[-2000:].decode(errors="replace").strip()


class WorkerPool:
    """Runs batches of jobs on up to ``num_workers`` processes (default: one per core, at most 8).

    Batches of several threads go one after the other.
    """

    def __init__(self, num_workers: int | None = None, limits: Limits | None = None) -> None:
        self.num_workers = num_workers or min(MAX_WORKERS, _num_cores())
        self.limits = limits or Limits()
        self.failures = Failures()
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()
        self._failed_starts = 0
        self._submitted: list[tuple[Sequence[Job], Future[list[float]]]] = []
        self._submitting = threading.Lock()  # of the two around it
        self._works_off = False
        self._closing = threading.Event()

    @property
    def pids(self) -> list[int]:
        """Of the workers that were started and not ended."""
        return [worker.process.pid for worker in self._workers]

    def run(self, jobs: Sequence[Job]) -> list[float]:
        """The score of each job, in order; 0 where it ran out of time or memory or its worker crashed (counted).

        A job whose worker is killed from outside or crashes gets one more worker. Raises RuntimeError for an exception
        of a job's function, and where workers cannot be started at all.
        """
        return self._run_batches([jobs])[0]

    def submit(self, jobs: Sequence[Job]) -> Future[list[float]]:
        """:meth:`run` beside the caller. Batches that wait while another is run are run together."""
        future: Future[list[float]] = Future()
        with self._submitting:
            self._submitted.append((jobs, future))
            if not self._works_off:
                self._works_off = True
                threading.Thread(target=self._work_off, name="verifiers", daemon=True).start()
        return future

    def close(self) -> None:
        """End all workers; the next batch starts new ones. What was submitted and has no scores gets none."""
        with self._submitting:
            for _, future in self._submitted:
                future.cancel()
            self._submitted.clear()
        self._closing.set()
        with self._lock:
            self._closing.clear()
            for worker in list(self._workers):
                self._drop(worker)

    def _work_off(self) -> None:
        """In a thread of its own, which ends when nothing is left."""
        while True:
            with self._submitting:
                batches = self._submitted.copy()
                self._submitted.clear()
                if not batches:
                    self._works_off = False
                    return
            try:
                results = self._run_batches([jobs for jobs, _ in batches])
            except Exception as error:
                for _, future in batches:
                    future.set_exception(error)
            else:
                for (_, future), scores in zip(batches, results, strict=True):
                    future.set_result(scores)

    def _run_batches(self, batches: Sequence[Sequence[Job]]) -> list[list[float]]:
        payloads = [[pickle.dumps((job.prepare, job.function, job.call)) for job in jobs] for jobs in batches]
        # Rollouts of a group often end in the same answer: it is compared once. Not across batches: which of them meet
        # is chance, and the counts of failures must not depend on it.
        different = list(dict.fromkeys((number, payload) for number, batch in enumerate(payloads) for payload in batch))
        with self._lock:
            try:
                score_of = dict(zip(different, self._run([payload for _, payload in different]), strict=True))
            except BaseException:
                # Nobody will read the answers that are under way.
                for worker in [worker for worker in self._workers if worker.job is not None]:
                    self._drop(worker)
                raise
        return [[score_of[number, payload] for payload in batch] for number, batch in enumerate(payloads)]

    def _run(self, payloads: list[bytes]) -> list[float]:
        scores = [0.0] * len(payloads)
        waiting = deque(range(len(payloads)))
        crashed_once: set[int] = set()
        while True:
            if self._closing.is_set():
                raise RuntimeError("the verifiers' workers were ended")
            while waiting and (idle := self._idle()):
                self._give(idle, waiting, payloads)
            busy = [worker for worker in self._workers if worker.job is not None]
            if not busy:
                return scores
            timeout = max(0.0, min(worker.deadline for worker in busy) - time.monotonic())
            ready = set(wait([worker.connection for worker in busy], timeout))
            for worker in busy:
                job = worker.job
                assert job is not None
                if worker.connection in ready:
                    score = self._receive(worker, job, waiting, crashed_once)
                    if score is not None:
                        scores[job] = score
                elif time.monotonic() >= worker.deadline:
                    if not worker.begun:
                        raise RuntimeError(f"a verifier's worker was not ready within {self.limits.load_s:g} s")
                    self._count(timeouts=1)
                    self._drop(worker)

    def _idle(self) -> _Worker | None:
        for worker in self._workers:
            if worker.job is None:
                return worker
        if len(self._workers) == self.num_workers:
            return None
        self._workers.append(_Worker(self.limits))
        return self._workers[-1]

    def _give(self, worker: _Worker, waiting: deque[int], payloads: list[bytes]) -> None:
        """Hand it the next job."""
        worker.job, worker.begun = waiting.popleft(), False
        worker.deadline = time.monotonic() + self.limits.load_s
        # One that has died in the meantime shows as the end of its connection.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            worker.connection.send_bytes(payloads[worker.job])

    def _receive(self, worker: _Worker, job: int, waiting: deque[int], crashed_once: set[int]) -> float | None:
        """Its message: the score, or None where there is none yet or will be none."""
        try:
            message = worker.connection.recv_bytes()
        except (EOFError, OSError):
            self._died(worker, job, waiting, crashed_once)
            return None
        if message == BEGIN:
            worker.begun, self._failed_starts = True, 0
            # A little more than the worker's own timers: whoever it is that ends it, it counts as a timeout.
            worker.deadline = time.monotonic() + self.limits.wall_s + 0.1
            return None
        worker.job = None
        reply = json.loads(message)
        if "error" in reply:
            raise RuntimeError(f"a verifier failed in its worker:\n{reply['error']}")
        return float(reply["score"])

    def _died(self, worker: _Worker, job: int, waiting: deque[int], crashed_once: set[int]) -> None:
        words = worker.last_words()
        status = self._drop(worker)
        if not worker.begun:
            self._failed_starts += 1
            if self._failed_starts >= _MAX_FAILED_STARTS:
                self._failed_starts = 0
                raise RuntimeError(f"a verifier's worker ended before it was ready (status {status}): {words}")
            waiting.appendleft(job)
        elif status in (-signal.SIGPROF, -signal.SIGALRM):
            self._count(timeouts=1)
        elif status == OUT_OF_MEMORY:
            self._count(out_of_memory=1)
        elif job not in crashed_once:
            crashed_once.add(job)
            waiting.appendleft(job)
        else:
            self._count(crashes=1)

    def _drop(self, worker: _Worker) -> int:
        self._workers.remove(worker)
        return worker.end()

    def _count(self, timeouts: int = 0, out_of_memory: int = 0, crashes: int = 0) -> None:
        now = self.failures
        self.failures = replace(
            now,
            timeouts=now.timeouts + timeouts,
            out_of_memory=now.out_of_memory + out_of_memory,
            crashes=now.crashes + crashes,
        )


def shared_pool() -> WorkerPool:
    """The pool of this process. A forked child has one of its own: it cannot share its parent's workers."""
    return _pool_of(os.getpid())


@lru_cache(maxsize=1)
def _pool_of(pid: int) -> WorkerPool:
    pool = WorkerPool()

    def close() -> None:
        if os.getpid() == pid:  # a fork inherits this, and must leave its parent's workers alone
            pool.close()

    atexit.register(close)
    return pool


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
