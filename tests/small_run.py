"""A whole run that takes a second: a tiny Qwen3-VL that answers ``1`` or ``2``, and data whose answers are those.

An untrained model would never be right, so every group would be without variance and nothing would be learned.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from copd_engine.config import RunConfig, build_config
from copd_engine.metrics import read_metrics
from copd_engine.result import save_model
from copd_engine.runs import run_with_baselines
from copd_engine.testbed.tasks import DOMAINS, testbed_examples
from tests.helpers import tiny_model

NUM_ROWS = 16
#: What differs between two equal runs.
TIMES = ("elapsed_s", "step_s", "time_s", "system", "rollout_engine")


def write_base(folder: Path) -> Path:
    """A model whose first embedding dimension makes ``1``, ``2`` and the end token likely."""
    policy, encoder = tiny_model()
    answers = [*encoder.tokenizer("12")["input_ids"], encoder.end_token_id]
    with torch.no_grad():
        embedding = policy.named_parameters()["model.language_model.embed_tokens.weight"]
        embedding[:, 0] = 5.0
        embedding[answers, 0] = 7.0
        embedding[encoder.end_token_id, 0] = 7.3  # short responses are right more often
    save_model(policy, encoder, folder)
    return folder


def write_data(folder: Path) -> Path:
    """``text.jsonl``, ``image.jsonl`` and ``video.jsonl`` with the testbed's prompts and answers of our own."""
    folder.mkdir(parents=True)
    for domain in DOMAINS:
        rows = []
        for number, example in enumerate(testbed_examples(domain, "train", NUM_ROWS, 0)):
            row: dict[str, Any] = {"prompt": example.prompt, "answer": 1 + number % 2, "uid": f"{domain}-{number}"}
            for image in example.images:
                row["images"] = [f"{domain}-{number}.png"]
                image.save(folder / row["images"][0])
            for video in example.videos:
                row["videos"] = [f"{domain}-{number}.npy"]
                np.save(folder / row["videos"][0], video)
            rows.append(row)
        write_rows(folder / f"{domain}.jsonl", rows)
    return folder


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def small_config(base: Path, data: Path, output_dir: Path, **changes: Any) -> dict[str, Any]:
    """A CoPD run of two cycles; ``changes`` are of whole sections' keys: ``schedule={"cycles": 1}``."""
    config: dict[str, Any] = {
        "name": "small",
        "output_dir": str(output_dir),
        "num_threads": 1,
        "device": "cpu",
        "model": {"path": str(base)},
        "branches": [
            {"name": d, "data": {"source": "jsonl", "path": str(data / f"{d}.jsonl"), "eval_size": 4}} for d in DOMAINS
        ],
        "schedule": {"cycles": 2, "rl_steps": 2, "opd_steps": 1},
        "rollout": {"prompts_per_step": 2, "group_size": 4, "max_new_tokens": 8},
        "optim": {"lr": 3e-3, "max_tokens_per_micro_batch": 256},
        "eval": {"every": 3, "num_prompts": 2, "final_num_prompts": 4},
        "diagnostics": {"every": 0, "num_prompts": 1},
        "checkpoint": {"every": 2, "keep": 2},
    }
    for key, value in changes.items():
        config[key] = {**config.get(key, {}), **value} if isinstance(value, dict) else value
    return config


def write_config(file: Path, config: dict[str, Any]) -> Path:
    file.write_text(yaml.safe_dump(config))
    return file


def train(config: RunConfig | dict[str, Any]) -> Path:
    """The run folder after ``copd train``."""
    config = build_config(config) if isinstance(config, dict) else config
    run_dir = config.output_dir / config.name
    run_with_baselines(config, run_dir)
    return run_dir


def numbers(run_dir: Path) -> list[dict[str, Any]]:
    """The metrics without what only the clock and the machine decide."""
    return [{key: value for key, value in row.items() if key not in TIMES} for row in read_metrics(run_dir)]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder``."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
