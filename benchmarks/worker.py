"""A process of its own for each peer: memory is measured fresh, and a peer that fails or hangs takes nothing with it.

The parent sends one JSON line per request and waits for one line back. ``python -m benchmarks.worker`` is the child.
"""

from __future__ import annotations

import json
import os
import resource
import select
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks import measure
from benchmarks.adapter import Call, Outputs
from benchmarks.peers import PEERS
from benchmarks.problem import NUM_SEQUENCES, OUTPUTS, Problem, load, make, relative_error
from copd_engine.gpu_meter import GpuMeter

ROOT = Path(__file__).resolve().parent.parent
# The child ends with a Python error before the machine runs out and ends some other process.
MEMORY_SHARE = 0.92


class PeerError(Exception):
    """Why a peer has no figure."""


class Worker:
    """The parent's side. Every request raises PeerError if the peer failed, died or took longer than ``limit_s``."""

    def __init__(self, peer: str, problem: Path, *, threads: int, device: str, limit_s: float) -> None:
        self.limit_s = limit_s
        arguments = [peer, str(problem), str(threads), device]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise PeerError(self._death()) from None
        ready, _, _ = select.select([self.process.stdout], [], [], self.limit_s)
        if not ready:
            self.close()
            raise PeerError(f"took longer than {self.limit_s:.0f} s")
        line = self.process.stdout.readline()
        if not line:
            raise PeerError(self._death())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            self.close()
            raise PeerError(answer["error"])
        return answer

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()

    def _death(self) -> str:
        code = self.process.wait()
        return "killed, out of memory" if code == -9 else f"its process ended with status {code}"


class Session:
    """The child's side: one peer and the inputs of one task."""

    def __init__(self, peer: str, problem: Path, device: str) -> None:
        self.peer, self.device = PEERS[peer], device
        self.problem = load(problem, device)
        self.call: Call | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        match request["do"]:
            case "check":
                return self.check(request.get("truth"))
            case "errors":
                problem = load(Path(request["problem"]), self.device)
                return {
                    "errors": self._errors(self.peer.tasks[problem.task](problem)(), problem.task, request["truth"])
                }
            case "time":
                return {"seconds": self.time()}
            case "energy":
                assert self.call is not None
                energy_j = measure.joules(self.call, GpuMeter())
                self._share_gpu()
                return {"energy_j": energy_j}
        raise ValueError(f"unknown request {request}")

    def check(self, truth: str | None) -> dict[str, Any]:
        """Memory of the first call, and its errors; the call of a peer that compiles is the second."""
        prepare, problem = self.peer.tasks[self.problem.task], self.problem
        call: Call
        if self.peer.compiles:
            # What the compiler itself takes is no part of a training step.
            call = prepare(problem)
            call()
        else:
            _warm_up(prepare, problem, self.device)
            # Buffers that are kept between calls count.
            call = lambda: prepare(problem)()  # noqa: E731
        outputs, extra_bytes, method = measure.extra_bytes(call, self.device)
        peak_bytes = measure.process_peak_bytes(self.device)
        if problem.task != "scoring":
            extra_bytes -= sum(output.numel() * output.element_size() for output in outputs if output is not None)
        errors = {} if truth is None else self._errors(outputs, problem.task, truth)
        del outputs
        self.call = prepare(problem)
        self._share_gpu()
        return {
            "extra_bytes": max(0, extra_bytes),
            "peak_bytes": peak_bytes,
            "memory_method": method,
            "errors": errors,
        }

    def time(self) -> float:
        assert self.call is not None
        if self.device != "cpu":
            # The memory was given back, so the first call asks the driver for it.
            self.call()
        elapsed = measure.seconds(self.call, self.device)
        self._share_gpu()
        return elapsed

    def _share_gpu(self) -> None:
        """Other peers' processes wait on the same GPU."""
        if self.device != "cpu":
            torch.cuda.empty_cache()

    def _errors(self, outputs: Outputs, task: str, truth: str) -> dict[str, float]:
        exact = torch.load(truth, map_location=self.device)
        return {
            name: relative_error(output.detach(), correct)
            for name, output, correct in zip(OUTPUTS[task], outputs, exact, strict=False)
            if output is not None and self.peer.checked
        }


def _warm_up(prepare: Callable[[Problem], Call], problem: Problem, device: str) -> None:
    """One small call: libraries are loaded and threads started before memory is watched."""
    small = make(problem.task, (8 * NUM_SEQUENCES, problem.shape[1], 512), problem.hidden_TD.dtype, device=device)
    prepare(small)()


def _limit_memory() -> None:
    free = psutil.virtual_memory().available
    mapped = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (mapped + int(MEMORY_SHARE * free), resource.RLIM_INFINITY))


def main() -> None:
    peer, problem, threads, device = sys.argv[1:]
    # Answers have the pipe to themselves: what a library prints goes the way of stderr.
    with os.fdopen(os.dup(1), "w", buffering=1) as answers:
        os.dup2(2, 1)
        torch.set_num_threads(int(threads))
        session = Session(peer, Path(problem), device)
        if device == "cpu":
            _limit_memory()
        for line in sys.stdin:
            try:
                answer = session.answer(json.loads(line))
            # Whatever a peer raises is a row of the table.
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"}
            answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
