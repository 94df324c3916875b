"""Step time by part and peak memory of the first steps of a run.

``python benchmarks/bench_step.py`` runs a few steps of each phase of ``configs/demo.yaml`` without evaluation,
diagnostics and checkpoints, and prints median and spread of the step time, the time of each part, rollouts and tokens
per second, and peak resident memory. The ratio is to a peer in the same run: the same update with every rollout
packed behind a copy of its prompt.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from copd_engine import run_folder
from copd_engine.branch import Branch
from copd_engine.config import load_config
from copd_engine.metrics import peak_rss_bytes
from copd_engine.objectives import TrainSample
from copd_engine.step import Timer
from copd_engine.trainer import Trainer
from copd_engine.types import Rollout

PARTS = ("rollout", "verify", "teacher", "update", "sync")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/demo.yaml"))
    parser.add_argument("--steps", type=int, default=8, help="measured steps per phase, after two warm-up steps")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    rl, opd = arguments.steps + 2, arguments.steps + 2
    config = load_config(
        arguments.config,
        [f"schedule.rl_steps={rl}", f"schedule.opd_steps={opd}", "schedule.cycles=1", f"device={arguments.device}"],
    )
    quiet = {"every": 0}
    config = config.model_copy(
        update={
            "diagnostics": config.diagnostics.model_copy(update=quiet),
            "eval": config.eval.model_copy(update={**quiet, "num_prompts": 1, "final_num_prompts": 1}),
            "checkpoint": config.checkpoint.model_copy(update=quiet),
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Trainer(config, Path(folder)), rl, opd)
    print(f"{run_folder.machine()}, {torch.get_num_threads()} threads, {run_folder.today()}, torch {torch.__version__}")
    for phase, row in figures["phases"].items():
        spread = f"median {row['median_s']:.3f} s, min {row['min_s']:.3f}, max {row['max_s']:.3f}"
        parts = ", ".join(f"{name} {row['parts'][name] * 1e3:.0f}" for name in PARTS)
        print(f"phase {phase}: {spread} over {row['steps']} steps of {row['rollouts']:.0f} rollouts; ms: {parts}")
        if (energy_j := row["energy_per_token_j"]) is not None:
            print(f"phase {phase}: {1e3 * energy_j:.3g} mJ per token packed for the updates or sampled")
    shared = figures["update"]
    print(
        f"update of one branch: {shared['shared_s']:.3f} s with prompts shared by their group, "
        f"{shared['repeated_s']:.3f} s with a copy per rollout (ratio {shared['repeated_s'] / shared['shared_s']:.2f}, "
        f"packed tokens {shared['shared_tokens']} / {shared['repeated_tokens']})"
    )
    print(f"peak resident memory: {figures['peak_rss_bytes'] / 2**30:.2f} GiB")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


def measure(trainer: Trainer, rl_steps: int, opd_steps: int) -> dict[str, Any]:
    """Run all steps of one cycle; the first two of each phase are warm-up."""
    phases: dict[str, list[dict[str, Any]]] = {"rl": [], "opd": []}
    for step in range(1, rl_steps + opd_steps + 1):
        record = trainer.step(trainer.schedule.plan(step))
        phases[record["phase"]].append(record)
    rows = {name: summarise(records[2:]) for name, records in phases.items()}
    return {"phases": rows, "update": compare_packing(trainer), "peak_rss_bytes": peak_rss_bytes()}


def summarise(records: list[dict[str, Any]]) -> dict[str, Any]:
    times = [sum(record["time_s"].get(part, 0.0) for part in PARTS) for record in records]
    rollouts = [
        sum(domain["num_rollouts"] for branch in record["branches"].values() for domain in branch["rollout"].values())
        for record in records
    ]
    energies = [record["system"]["energy_per_token_j"] for record in records]
    known = [energy for energy in energies if energy is not None]
    return {
        "energy_per_token_j": statistics.median(known) if known else None,
        "steps": len(records),
        "median_s": statistics.median(times),
        "min_s": min(times),
        "max_s": max(times),
        "rollouts": statistics.mean(rollouts),
        "parts": {part: statistics.median(record["time_s"].get(part, 0.0) for record in records) for part in PARTS},
    }


def compare_packing(trainer: Trainer, repeats: int = 5) -> dict[str, float]:
    """One branch's forward and backward over a fresh batch, prompts shared against prompts repeated."""
    plan = trainer.schedule.plan(1)
    name = plan.assignments[-1].student
    branch = trainer.branches[name]
    [(rollouts, _)] = trainer.steps.roll_out(replace(plan, assignments=plan.of(name)), Timer()).values()
    weight = 1.0 / len(rollouts)
    shared = [TrainSample(rollout, "grpo", weight, advantage=1.0) for rollout in rollouts]
    repeated = [replace(sample, rollout=_with_own_prompt(sample.rollout)) for sample in shared]
    times: dict[str, list[float]] = {"shared": [], "repeated": []}
    for _ in range(repeats + 1):
        times["shared"].append(_forward_backward(branch, shared))
        times["repeated"].append(_forward_backward(branch, repeated))
    return {
        "shared_s": statistics.median(times["shared"][1:]),
        "repeated_s": statistics.median(times["repeated"][1:]),
        "shared_tokens": branch.pack([s.rollout for s in shared]).num_tokens,
        "repeated_tokens": branch.pack([s.rollout for s in repeated]).num_tokens,
    }


def _with_own_prompt(rollout: Rollout) -> Rollout:
    """The same rollout behind a copy of its prompt, which packing cannot share."""
    request = replace(rollout.request, prompt=copy.copy(rollout.request.prompt))
    return replace(rollout, request=request)


def _forward_backward(branch: Branch, samples: list[TrainSample]) -> float:
    begin = time.perf_counter()
    branch.update(samples)
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
