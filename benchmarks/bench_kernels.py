"""The kernels beside their peers: time, error against fp64, memory.

``python -m benchmarks.bench_kernels`` measures every peer that is installed at N=2048, D=1024, V=32768 and prints the
tables; ``make bench-kernels`` installs the peers and writes benchmarks/RESULTS.md. Every peer runs in a process of its
own on the same inputs. The rounds go through all peers in turn, so a drift of the machine hits all alike.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.adapter import package_version
from benchmarks.peers import OURS, PEERS, select
from benchmarks.problem import CLOSE_GAP, DTYPES, GAP, OUTPUTS, TASKS, make, relative_error, truth
from benchmarks.tables import naive_bytes, render
from benchmarks.worker import ROOT, PeerError, Worker
from copd_engine import run_folder

LARGE_TASKS = ("reverse_kl", "grpo")
BEGIN = time.monotonic()


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    record: dict[str, Any] = {**head(options), "tables": [], "memory": [], "large": []}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder))
        for dtype in options.dtypes:
            for task in options.tasks if options.repeats else ():
                record["tables"].append(bench.table(task, options.shape, dtype))
        for vocab_size in options.memory_vocab:
            for dtype in options.dtypes:
                for task in options.tasks:
                    record["memory"].append(bench.memory(task, [*options.shape[:2], vocab_size], dtype))
        if options.large:
            record["large"] = [bench.large(task, options.large_shape) for task in LARGE_TASKS]
    record["memory_method"] = bench.memory_method
    if options.step:
        command = [sys.executable, "benchmarks/bench_step.py", "--device", options.device]
        say("the step")
        record["step"] = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    text = render(record)
    print(text)
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(text)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench_kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--shape", nargs=3, type=int, metavar=("N", "D", "V"), default=[2048, 1024, 32768])
    parser.add_argument("--peers", nargs="+", default=[], metavar="PEER", help=f"default all: {', '.join(PEERS)}")
    parser.add_argument("--repeats", type=int, default=5, help="rounds; 0 leaves out the tables at --shape")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: the physical cores")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--limit-s", type=float, default=300, help="longest that a peer may take for one request")
    parser.add_argument("--memory-vocab", nargs="+", type=int, default=[], metavar="V", help="memory at these V too")
    parser.add_argument("--memory-peers", nargs="+", default=[], metavar="PEER", help="whose; default all of --peers")
    parser.add_argument("--large", action="store_true", help="also our op alone at --large-shape, bf16")
    parser.add_argument("--large-shape", nargs=3, type=int, metavar=("N", "D", "V"), default=[4096, 2560, 151936])
    parser.add_argument("--large-limit-s", type=float, default=1800)
    parser.add_argument("--step", action="store_true", help="also bench_step.py")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--markdown", type=Path, help="write the tables here")
    parser.add_argument("--by", default="", help="command to name in the head of the tables")
    options = parser.parse_args(arguments)
    try:
        options.peers = select(options.peers)
        options.memory_peers = select(options.memory_peers) if options.memory_peers else options.peers
    except ValueError as error:
        parser.error(str(error))
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.exit(1, "bench_kernels: --device cuda needs a CUDA GPU, and torch finds none on this machine\n")
    options.command = "python -m benchmarks.bench_kernels " + shlex.join(
        sys.argv[1:] if arguments is None else arguments
    )
    return options


def head(options: argparse.Namespace) -> dict[str, Any]:
    packages = {PEERS[name].package: package_version(PEERS[name]) for name in options.peers}
    device = options.device if options.device == "cpu" else torch.cuda.get_device_name()
    return {
        "command": options.command,
        "by": options.by,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": run_folder.machine(),
        "device": device,
        "threads": options.threads,
        "amx": has_amx(),
        "versions": {**run_folder.versions(), **{name: number for name, number in packages.items() if number}},
        "repeats": options.repeats,
        "gap": GAP,
        "close_gap": CLOSE_GAP,
    }


def has_amx() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.is_file() and "amx_bf16" in cpuinfo.read_text()


def say(text: str) -> None:
    print(f"[{time.monotonic() - BEGIN:6.0f} s] {text}", file=sys.stderr, flush=True)


class Bench:
    """Inputs in ``folder``, one worker per peer; a peer without a figure gets a row with ``failure``."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.memory_method = "not measured"

    def table(self, task: str, shape: Sequence[int], dtype: str) -> dict[str, Any]:
        """Times, errors and memory of all peers."""
        say(f"{task} {dtype} {_shape(shape)}: inputs and fp64 truth")
        floor = self._write("far", task, shape, dtype, GAP)
        close_floor = self._write("close", task, shape, dtype, CLOSE_GAP) if task == "reverse_kl" else {}
        rows = [_row(name, task) for name in self.options.peers]
        workers: dict[str, Worker] = {}
        for row in rows:
            if "failure" in row:
                continue
            worker = workers[row["peer"]] = self._worker(row["peer"])
            self._check(row, worker, truth="far")
            if close_floor:
                close = {kind: self._path("close", kind) for kind in ("problem", "truth")}
                row["close_errors"] = _ask(row, worker, do="errors", **close).get("errors", {})
            say(f"{task} {dtype}: {row['peer']} {row.get('failure', 'checked')}")
        for number in range(self.options.repeats):
            for row in rows:
                if answer := _ask(row, workers.get(row["peer"]), do="time"):
                    row["seconds"] = [*row.get("seconds", []), answer["seconds"]]
            say(f"{task} {dtype}: round {number + 1} of {self.options.repeats}")
        if self.options.device != "cpu":
            for row in rows:
                row.update(_ask(row, workers.get(row["peer"]), do="energy"))
        for worker in workers.values():
            worker.close()
        floors = {"floor": floor, "close_floor": close_floor}
        return {"task": task, "dtype": dtype, "shape": list(shape), "rows": rows, **floors}

    def memory(self, task: str, shape: Sequence[int], dtype: str) -> dict[str, Any]:
        """Memory alone, one peer's process at a time."""
        say(f"memory of {task} {dtype} {_shape(shape)}: inputs")
        self._write("far", task, shape, dtype, GAP, exact=False)
        rows = [_row(name, task) for name in self.options.memory_peers]
        for row in rows:
            if "failure" not in row:
                worker = self._worker(row["peer"])
                self._check(row, worker)
                worker.close()
                say(f"memory of {task} {dtype}: {row['peer']} {row.get('failure', 'measured')}")
        return {"task": task, "dtype": dtype, "shape": list(shape), "rows": rows}

    def large(self, task: str, shape: Sequence[int]) -> dict[str, Any]:
        """Our op alone: memory, then the time of one call."""
        need = naive_bytes(task, shape) / 2**30
        say(f"large: {task} bf16 {_shape(shape)}: inputs; the naive form would need {need:.1f} GiB beside them")
        self._write("far", task, shape, "bf16", GAP, exact=False)
        row = _row(OURS, task)
        worker = self._worker(OURS, self.options.large_limit_s)
        self._check(row, worker)
        row.update(_ask(row, worker, do="time"))
        worker.close()
        say(f"large: {task} {row.get('failure', 'done')}")
        return {**row, "task": task, "dtype": "bf16", "shape": list(shape)}

    def _write(
        self, name: str, task: str, shape: Sequence[int], dtype: str, gap: float, *, exact: bool = True
    ) -> dict[str, float]:
        """Save the inputs, and the truth if asked for; returns the error that rounding the truth alone makes."""
        num_tokens, hidden_size, vocab_size = shape
        problem = make(task, (num_tokens, hidden_size, vocab_size), DTYPES[dtype], gap=gap, device=self.options.device)
        problem.save(Path(self._path(name, "problem")))
        if not exact:
            return {}
        outputs = truth(problem)
        torch.save(outputs, self._path(name, "truth"))
        # Scores are fp32 whatever the inputs are.
        kept = torch.float32 if task == "scoring" else DTYPES[dtype]
        floor = {key: relative_error(x.to(kept), x) for key, x in zip(OUTPUTS[task], outputs, strict=True)}
        del problem, outputs
        if self.options.device != "cpu":
            # The peers' processes need the room.
            torch.cuda.empty_cache()
        return floor

    def _path(self, name: str, kind: str) -> str:
        return str(self.folder / f"{name}.{kind}.pt")

    def _worker(self, peer: str, limit_s: float | None = None) -> Worker:
        return Worker(
            peer,
            Path(self._path("far", "problem")),
            threads=self.options.threads,
            device=self.options.device,
            limit_s=limit_s or self.options.limit_s,
        )

    def _check(self, row: dict[str, Any], worker: Worker, truth: str | None = None) -> None:
        answer = _ask(row, worker, do="check", truth=None if truth is None else self._path(truth, "truth"))
        self.memory_method = answer.pop("memory_method", self.memory_method)
        row.update(answer)


def _row(name: str, task: str) -> dict[str, Any]:
    peer = PEERS[name]
    row: dict[str, Any] = {"peer": name, "version": package_version(peer)}
    if task not in peer.tasks:
        row["failure"] = f"not its task: {peer.missing[task]}"
    elif row["version"] is None:
        row["failure"] = f"{peer.package} is not installed"
    return row


def _ask(row: dict[str, Any], worker: Worker | None, **request: Any) -> dict[str, Any]:
    """The worker's answer; empty, with the reason in ``row``, for a peer that has failed now or before."""
    if worker is None or "failure" in row:
        return {}
    try:
        return worker.ask(**request)
    except PeerError as error:
        row["failure"] = str(error)
        return {}


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


if __name__ == "__main__":
    main()
