"""Rows of the result table, and models on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from copd_engine.evaluate import Accuracy, average
from copd_engine.flops import Work
from copd_engine.models.base import Policy, PromptEncoder

#: Order of the result table.
ROW_KINDS = ("base", "expert", "baseline", "branch", "merged")


def result_row(
    model: str,
    kind: str,
    accuracies: Mapping[str, Accuracy],
    rollouts: int,
    steps: int = 0,
    work: Work | None = None,
) -> dict[str, Any]:
    """One row of ``result.json``; ``num_prompts`` is that of a domain.

    What it took to train the model, all models together that it is made of: ``rollouts``, ``steps`` of the schedule
    (of ``objective.updates_per_step`` optimizer updates each), ``work`` (``train_flops`` and tokens).
    """
    work = work or Work()
    overall = average(accuracies)
    return {
        "model": model,
        "kind": kind,
        "accuracy": accuracy_row(accuracies),
        "stderr": {**{name: a.stderr for name, a in accuracies.items()}, "average": overall.stderr},
        "num_prompts": min(a.num_prompts for a in accuracies.values()),
        "rollouts": rollouts,
        "steps": steps,
        "train_flops": work.flops,
        "train_tokens": {k.removesuffix("_tokens"): v for k, v in asdict(work).items() if k.endswith("_tokens")},
    }


def work_of(row: Mapping[str, Any]) -> Work:
    """The work that a row of :func:`result_row` says its training took."""
    return Work(flops=row["train_flops"], **{f"{key}_tokens": count for key, count in row["train_tokens"].items()})


def accuracy_row(accuracies: Mapping[str, Accuracy]) -> dict[str, float]:
    """Mean accuracy per domain and their average."""
    return {**{name: a.mean for name, a in accuracies.items()}, "average": average(accuracies).mean}


def sorted_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: ROW_KINDS.index(row["kind"]))


def save_model(policy: Policy, encoder: PromptEncoder, folder: Path) -> None:
    """Model, tokenizer and processor in Hugging Face format; plain transformers loads it."""
    folder.mkdir(parents=True, exist_ok=True)
    policy.save(folder)
    encoder.save(folder)
