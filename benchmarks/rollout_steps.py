"""Shares of a training step with each rollout engine: the real trainer on ``configs/demo.yaml``, a few steps each."""

from __future__ import annotations

import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.rollout_engines import installed
from copd_engine.config import load_config
from copd_engine.trainer import Trainer

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "demo.yaml"
PARTS = {"rollout": "rollout", "sync": "swaps", "teacher": "scoring", "verify": "verify", "update": "update"}
OTHER = "sleep, rest"
WARM_UP = 1


def steps(
    engines: tuple[str, ...], steps_per_phase: int, changes: tuple[str, ...], device: str
) -> list[dict[str, Any]]:
    """A row per phase and engine; the engines take turns step by step, after a warm-up step in each phase."""
    count = steps_per_phase + WARM_UP
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    with ExitStack() as stack:
        trainers = {name: _trainer(name, count, changes, device, stack) for name in installed(engines)}
        for step in range(1, 2 * count + 1):
            for name, trainer in trainers.items():
                record = trainer.step(trainer.schedule.plan(step))
                found.setdefault((record["phase"], name), []).append(record)
    return [_row(phase, name, records[WARM_UP:]) for (phase, name), records in found.items()]


def _trainer(engine: str, count: int, changes: tuple[str, ...], device: str, stack: ExitStack) -> Trainer:
    quiet = ["eval.every=0", "eval.num_prompts=1", "eval.final_num_prompts=1", "checkpoint.every=0"]
    phases = ["schedule.cycles=1", f"schedule.rl_steps={count}", f"schedule.opd_steps={count}", "diagnostics.every=0"]
    config = load_config(CONFIG, [f"rollout.engine={engine}", f"device={device}", *quiet, *phases, *changes])
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="copd-bench-"))
    trainer = Trainer(config, Path(folder))
    stack.callback(trainer.engine.close)
    return trainer


def _row(phase: str, engine: str, records: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "phase": phase,
        "engine": engine,
        "steps": [_seconds(record) for record in records],
        "energy_per_token_j": [record["system"]["energy_per_token_j"] for record in records],
    }


def _seconds(record: dict[str, Any]) -> dict[str, float]:
    """By part. sglang takes another expert's weights in when its turn to sample comes: that time, which stands under
    "rollout" in the metrics, is a sync."""
    swap_s = record["rollout_engine"].get("swap_s", 0.0)
    parts = {part: record["time_s"].get(part, 0.0) for part in PARTS}
    parts |= {"rollout": parts["rollout"] - swap_s, "sync": parts["sync"] + swap_s}
    total = record["step_s"] - record["time_s"].get("diagnostics", 0.0)
    return parts | {OTHER: total - sum(parts.values()), "total": total}


def median_of(row: dict[str, Any], part: str) -> float:
    return statistics.median(step[part] for step in row["steps"])
