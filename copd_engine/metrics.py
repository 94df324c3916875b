"""The numbers of a run: one JSON line per optimizer step, and what a run folder holds.

A run folder is written by the trainer and read by ``report/``; this is the contract between them.

``config.yaml``
    The resolved config.
``metrics.jsonl``
    One object per optimizer step, flushed to disk before the next step starts::

        {"step": 12,                      # 1-based
         "cycle": 1, "phase": "rl",       # "rl" (phase I) or "opd" (phase II)
         "elapsed_s": 33.1, "step_s": 0.61,
         "time_s": {"rollout": s,     # from the prompts to the last group, verifiers of this process among it
                    "verify": s,      # what was left to wait for worker processes, which score beside the sampling
                    "teacher": s, "update": s, "sync": s, "diagnostics": s, "evaluate": s,
                    "checkpoint": s},                # of the checkpoint that followed the line before
         "branches": {"text": {
             "version": 13, "loss": x, "grad_norm": x, "lr": x, "skipped": false, "num_tokens": n, "entropy": x,
             "clip_fraction": x, "ratio_mean": x, "mismatch_mean": x, "mismatch_max": x, "mismatch_kl": x,
             "terms": {"grpo": {"loss": x, "num_tokens": n, "num_responses": n},
                       "opd:image": {"loss": x, "num_tokens": n, "num_responses": n, "delta_mean": x,
                                     "reverse_kl": x}},              # opd:<teacher>
             "rollout": {"text": {"reward_mean": x, "reward_terms": {"verifier": x}, "response_tokens_mean": x,
                                  "response_tokens_max": n, "truncated_fraction": x, "reward_std_mean": x,  # in groups
                                  "all_right_fraction": x, "all_wrong_fraction": x,   # of the groups
                                  "zero_variance_groups": n, "num_groups": n, "beta": x,    # beta of a cross batch
                                  "too_long_truncated": n, "too_long_dropped": n,     # by optim.too_long
                                  "requests_lost": n,  # by the rollout engine
                                  "num_resampled_groups": n,  # by objective.dynamic_sampling
                                  "prompts_skipped": n}},    # since the start; by domain of the prompts
             "work": {"prefilled_tokens": n, "generated_tokens": n, "scored_tokens": n, "trained_tokens": n,
                      "flops": n}}},              # of this step, see flops.py
         "diagnostics": null | {"pairs": [           # ordered pairs, measured after the step's update
             {"student": "text", "teacher": "image", "overlap": x, "sum_min": x, "kl_student_teacher": x,
              "kl_teacher_student": x, "symmetric_kl": x, "student_entropy": x, "task_cosine": x, "update_cosine": x}],
             "base": [...]},                         # the same of each model against the base, without the cosines
         "evaluate": null | {"text": {"text": x, "image": x, "average": x}},          # branch -> domain -> accuracy
         "system": {"rss_bytes": n,
                    "gpu": null | [{"memory_used_bytes": n, "memory_total_bytes": n, "utilization_percent": x,
                                    "power_w": x,                    # as the line is written, all GPUs of the machine
                                    "energy_j": x, "mean_utilization_percent": x,
                                    "peak_memory_bytes": n}],        # of the step, GPUs that the trainer sees
                    "energy_per_token_j": x},    # of those GPUs; tokens packed for the updates and tokens sampled
         "rollout_engine": {...},                 # RolloutEngine.stats() of the step: counts, bytes, seconds
         "verifier_failures": {"timeouts": n, "out_of_memory": n, "crashes": n}}     # scored 0, in this step

    Other objectives than the paper's write more (``docs/objectives.md``).
    Any value may be missing or null (a skipped step has no loss); NaN and infinity are written as null. A line with
    ``"step": 0, "phase": "base"`` may open the file, with "evaluate" and "diagnostics" of the base alone.
``samples.jsonl``
    ``{"step": 20, "branch": "image", "domain": "image", "prompt": s, "response": s, "answer": s, "reward": 1.0,
    "media": ["media/abc.png"]}``; paths are relative to the run folder, a video is stored as a filmstrip.
``result.json``
    Written once, at the end: ``{"domains": [s], "rows": [{"model": s, "kind": "base|expert|baseline|branch|merged",
    "accuracy": {domain: x, "average": x}, "stderr": {...}, "num_prompts": n per domain, "rollouts": n, "steps": n,
    "train_flops": n, "train_tokens": {"prefilled": n, "generated": n, "scored": n, "trained": n}}],
    "command": s, "machine": s, "date": "2026-11-23", "versions": {package: version}, "train_s": x, "peak_rss_bytes": n,
    "seed": n, "method": s, "num_steps": n, "flops_goal": null | n (``flops_of``)}``. Steps (of the schedule), rollouts
    and FLOPs are those of all models that a row is made of.
``scores/<model>.json``
    ``{domain: [score of each held-out prompt]}`` of every model of the result, for paired comparisons.
``baselines/<method>/``
    The same structure for a baseline that was trained beside this run.
"""

from __future__ import annotations

import importlib
import json
import math
import numbers
import os
import resource
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import psutil

from copd_engine.gpu_meter import GpuMeter, gpu_stats
from copd_engine.types import UserError

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """Appends one JSON line per step to ``run_dir/metrics.jsonl``; each line is on disk when :meth:`write` returns.

    ``resume_step``: continue a run from its checkpoint of that step; lines of later steps, and a last line torn by a
    kill, are dropped first. Without it the file must not exist yet (:class:`UserError`): nothing is overwritten.
    ``tensorboard``: also write every number as a scalar under ``run_dir/tensorboard``.
    """

    def __init__(self, run_dir: str | Path, *, tensorboard: bool = False, resume_step: int | None = None) -> None:
        self.path = Path(run_dir) / METRICS_FILE
        # Before any file is touched: a missing package must not leave a half-started run folder behind.
        summary_writer = _summary_writer_class() if tensorboard else None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if resume_step is not None:
            drop_later_steps(self.path, resume_step)
        elif self.path.exists() and self.path.stat().st_size:
            raise UserError(f"{self.path} already holds a run: resume it, or choose another run folder")
        self._file: IO[str] = self.path.open("a", encoding="utf-8")
        self._tensorboard = None
        if summary_writer is not None:
            purge_step = None if resume_step is None else resume_step + 1
            self._tensorboard = summary_writer(str(self.path.parent / "tensorboard"), purge_step=purge_step)

    def write(self, record: dict[str, Any]) -> None:
        """Write one step. NaN and infinity become null.

        Raises TypeError, naming the key, for a value that JSON does not know (a tensor); nothing is written then.
        """
        if not isinstance(record.get("step"), int):
            raise TypeError(f"a metrics record needs an integer 'step', it has {record.get('step')!r}")
        cleaned = _clean(record, "")
        self._file.write(json.dumps(cleaned, allow_nan=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._tensorboard is not None:
            for name, value in flatten_scalars(cleaned):
                self._tensorboard.add_scalar(name, value, global_step=record["step"])
            self._tensorboard.flush()

    def close(self) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The records of a run in file order. Raises :class:`UserError` for a missing file or a broken line."""
    path = Path(run_dir) / METRICS_FILE
    if not path.is_file():
        raise UserError(f"{run_dir} is not a run folder: it has no {METRICS_FILE}")
    return read_jsonl(path)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file. A broken last line is left out, as a kill in the middle of a write leaves one;
    any other broken line raises :class:`UserError` with file and line number. NaN and infinity are read as None."""
    lines = path.read_bytes().split(b"\n")
    last = max((number for number, line in enumerate(lines, start=1) if line.strip()), default=0)
    records = []
    for number, line in enumerate(lines[:last], start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line, parse_constant=lambda _: None)
            if not isinstance(record, dict):
                raise ValueError(f"it is {type(record).__name__}, not an object")
        except ValueError as error:
            if number == last:
                break
            raise UserError(f"{path}:{number}: not a JSON line ({error})") from None
        records.append(record)
    return records


def drop_later_steps(path: Path, step: int) -> None:
    """Keep the lines of a JSON-lines file whose "step" is at most ``step``; a torn last line goes too.

    The new content is written aside and renamed, so that a kill leaves either the old file or the new one.
    A file that does not exist stays so.
    """
    if not path.exists():
        return
    kept = [record for record in read_jsonl(path) if (record.get("step") or 0) <= step]
    aside = path.with_name(path.name + ".tmp")
    with aside.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    folder = os.open(path.parent, os.O_RDONLY)  # the rename itself is on disk only after this
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def flatten_scalars(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """``("branches/text/loss", 0.5)`` for every number below ``record``; ordered pairs are named
    ``diagnostics/pairs/<student>_from_<teacher>/overlap``, other list items by their position."""

    def walk(node: Any, name: str) -> Iterator[tuple[str, float]]:
        if isinstance(node, dict):
            for key, value in node.items():
                yield from walk(value, f"{name}/{key}" if name else key)
        elif isinstance(node, list):
            for position, value in enumerate(node):
                is_pair = isinstance(value, dict) and "student" in value and "teacher" in value
                label = f"{value['student']}_from_{value['teacher']}" if is_pair else str(position)
                yield from walk(value, f"{name}/{label}")
        elif isinstance(node, int | float):
            yield name, float(node)

    yield from walk(record, "")


def system_stats(meter: GpuMeter | None = None, num_tokens: int = 0) -> dict[str, Any]:
    """Resident memory of this process, and of every GPU of the machine what NVML says (null where there is none).

    A number that a GPU does not offer (utilisation of a MIG slice, power under virtualisation) is None. ``meter``: adds
    what it has measured, and its energy over ``num_tokens``.
    """
    stats: dict[str, Any] = {"rss_bytes": int(psutil.Process().memory_info().rss), "gpu": gpu_stats()}
    if meter is not None:
        for index, use in meter.use.items():
            stats["gpu"][index] |= asdict(use)
        energy_j = meter.energy_j()
        stats["energy_per_token_j"] = energy_j / num_tokens if energy_j is not None and num_tokens else None
    return stats


def step_tokens(branches: Mapping[str, Mapping[str, Any]]) -> int:
    """Tokens of a step, from the ``branches`` of its record: those packed for the updates and all that were sampled,
    trained on or not."""
    return sum(branch["num_packed_tokens"] + branch["work"]["generated_tokens"] for branch in branches.values())


def peak_rss_bytes() -> int:
    """The largest resident memory that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)  # Linux counts in KiB, macOS in bytes


def _summary_writer_class() -> Any:
    try:
        return importlib.import_module("torch.utils.tensorboard").SummaryWriter
    except ImportError:
        raise UserError("tensorboard: true needs an extra package: pip install 'copd-engine[tensorboard]'") from None


def _clean(value: Any, where: str) -> Any:
    """``value`` with numbers as plain Python numbers and NaN or infinity as None."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):  # numpy's scalars too
        return float(value) if math.isfinite(value) else None
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"metrics {where or 'record'}: key {key!r} is not a string")
        return {key: _clean(item, f"{where}.{key}" if where else key) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item, f"{where}[{position}]") for position, item in enumerate(value)]
    raise TypeError(f"metrics {where}: {type(value).__name__} cannot be written as JSON")
