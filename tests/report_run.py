"""A synthetic run folder, finished and with a baseline, and the report written of it."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from copd_engine.metrics import MetricsLog
from copd_engine.report import write_report

BRANCHES = ("text", "image", "video")
SCRIPT = "<script>alert('x')</script> 3+4=7 & so on #7"


def make_record(step: int, cycle: int, phase: str, branches: tuple[str, ...], kl: float, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng([seed, step])
    domain_level = {name: 0.35 + 0.04 * i for i, name in enumerate(branches)}
    per_branch = {}
    for i, name in enumerate(branches):
        learned = 1 - math.exp(-step / (25 + 6 * i))
        domains = branches if phase == "opd" else (name,)
        rollout = {
            d: {
                "reward_mean": float(np.clip(domain_level[d] + 0.55 * learned + rng.normal(0, 0.04), 0, 1)),
                "response_tokens_mean": 9.0 + 4 * i + 3 * learned + float(rng.normal(0, 0.3)),
                "truncated_fraction": 0.05 * math.exp(-step / 10),
                "zero_variance_groups": int(rng.integers(0, 5) + 8 * learned),
                "num_groups": 16,
            }
            for d in domains
        }
        terms = {"grpo": {"loss": -0.01, "num_tokens": 1234, "num_responses": 256}}
        if phase == "opd":
            for teacher in branches:
                if teacher != name:
                    terms[f"opd:{teacher}"] = {"loss": 0.01, "num_responses": 128, "delta_mean": -kl, "reverse_kl": kl}
        per_branch[name] = {
            "version": step,
            "loss": float(rng.normal(0, 0.02)),
            "grad_norm": float(np.exp(rng.normal(-0.5, 0.3))),
            "lr": 3e-4,
            "skipped": False,
            "num_tokens": 1234,
            "entropy": 0.6 * math.exp(-step / 60) + 0.03 * i,
            "clip_fraction": 0.002,
            "ratio_mean": 1.0,
            "mismatch_mean": 2e-7,
            "mismatch_max": 3e-6,
            "terms": terms,
            "rollout": rollout,
        }
    parts = {"rollout": 0.31, "verify": 0.01, "teacher": 0.08 if phase == "opd" else 0.0, "update": 0.22, "sync": 0.005}
    parts |= {"diagnostics": 0.05, "evaluate": 0.4 if step % 10 == 0 else 0.0, "checkpoint": 0.0}
    pairs = [
        {
            "student": s,
            "teacher": t,
            "overlap": 1 - 0.6 * kl * (1 + 0.2 * j),
            "sum_min": 1 - 0.4 * kl * (1 + 0.2 * j),
            "kl_student_teacher": 0.4 * kl * (1 + 0.2 * j),
            "kl_teacher_student": 0.6 * kl * (1 + 0.2 * j),
            "symmetric_kl": kl * (1 + 0.2 * j),
            "task_cosine": 1 - kl,
        }
        for j, (s, t) in enumerate(itertools.permutations(branches, 2))
    ]
    accuracy = {
        b: {
            d: domain_level[d] + (0.5 if b == d else 0.3) * (1 - math.exp(-step / 25)) + float(rng.normal(0, 0.02))
            for d in branches
        }
        for b in branches
    }
    for row in accuracy.values():
        row["average"] = sum(row.values()) / len(row)
    return {
        "step": step,
        "cycle": cycle,
        "phase": phase,
        "elapsed_s": 0.7 * step,
        "step_s": sum(parts.values()) + 0.02,
        "time_s": parts,
        "branches": per_branch,
        "diagnostics": {
            "pairs": pairs,
            "base": [pair | {"teacher": "base", "task_cosine": None} for pair in pairs[::2]],
        },
        "evaluate": accuracy if step % 10 == 0 else None,
        "system": {
            "rss_bytes": int(1.1e9 + 1e6 * step),
            "gpu": [make_gpu(80.0 - step, 600.0 + step), make_gpu(0.0, None)],
        },
    }


def make_gpu(utilization_percent: float | None, power_w: float | None) -> dict[str, float | None]:
    memory = {"memory_used_bytes": 40e9, "memory_total_bytes": 150e9}
    return {**memory, "utilization_percent": utilization_percent, "power_w": power_w}


def make_run(
    folder: Path, branches: tuple[str, ...] = BRANCHES, cycles: int = 2, rl_steps: int = 6, opd_steps: int = 4
) -> Path:
    """A finished run: base line, ``cycles`` cycles, a baseline of independent experts, samples with a picture."""
    (folder / "media").mkdir(parents=True)
    num_steps = cycles * (rl_steps + opd_steps)
    config = {
        "name": "synthetic",
        "method": "copd",
        "seed": 3,
        "branches": [{"name": name, "data": {"source": "testbed", "domain": name}} for name in branches],
        "schedule": {"cycles": cycles, "rl_steps": rl_steps, "opd_steps": opd_steps},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    kl = 0.01
    with MetricsLog(folder) as log:
        base = make_record(0, 0, "base", branches, 1e-9, 0)
        log.write({key: base[key] for key in ("step", "phase", "diagnostics", "evaluate")})
        for step in range(1, num_steps + 1):
            cycle, within = divmod(step - 1, rl_steps + opd_steps)
            phase = "rl" if within < rl_steps else "opd"
            kl *= 1.12 if phase == "rl" else 0.85
            log.write(make_record(step, cycle + 1, phase, branches, kl, 1))
    kl = 0.01
    with MetricsLog(folder / "baselines" / "expert") as log:
        for step in range(1, num_steps + 4):
            kl *= 1.03
            log.write(make_record(step, 1, "rl", branches, kl, 2))

    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(folder / "media" / "digits.png")
    Image.fromarray(rng.integers(0, 255, (16, 80, 3), dtype=np.uint8)).save(folder / "media" / "strip.png")
    with (folder / "samples.jsonl").open("w") as file:
        for step, branch, reward in itertools.product((1, num_steps), branches, (1.0, 0.0)):
            media = {"image": ["media/digits.png"], "video": ["media/strip.png"]}.get(branch, [])
            sample = {
                "step": step,
                "branch": branch,
                "domain": branch,
                "prompt": f"prompt of {branch}\n3+4=",
                "answer": "7",
            }
            file.write(json.dumps({**sample, "response": SCRIPT, "reward": reward, "media": media}) + "\n")

    def row(model: str, kind: str, level: float, rollouts: int | None) -> dict[str, Any]:
        accuracy = {name: level + 0.01 * i for i, name in enumerate(branches)}
        accuracy["average"] = sum(accuracy.values()) / len(branches)
        stderr = dict.fromkeys([*branches, "average"], 0.0123)
        return {
            "model": model,
            "kind": kind,
            "accuracy": accuracy,
            "stderr": stderr,
            "num_prompts": 400,
            "rollouts": rollouts,
        }

    result = {
        "domains": list(branches),
        "rows": [
            row("merged", "merged", 0.913, 230_400),
            row("base", "base", 0.411, 0),
            *(row(f"expert:{name}", "expert", 0.71 + 0.01 * i, 51_200) for i, name in enumerate(branches)),
            row("average of experts", "baseline", 0.842, 153_600),
            *(row(f"branch:{name}", "branch", 0.85, 76_800) for name in branches),
        ],
        "command": "copd train configs/demo.yaml seed=3",
        "machine": "AMD EPYC, 2 cores",
        "date": "2026-11-23",
        "versions": {"torch": "2.13.0", "transformers": "5.19.0"},
        "train_s": 321.0,
        "peak_rss_bytes": 1_288_490_189,
        "seed": 3,
        "method": "copd",
    }
    (folder / "result.json").write_text(json.dumps(result))
    return folder


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("run") / "synthetic")
    write_report(folder)
    return folder
