"""What a run tells while it trains: the bar's postfix, and a line for each evaluation."""

from __future__ import annotations

from typing import Any


def progress(record: dict[str, Any]) -> str:
    """Cycle, phase and each branch's mean reward, on its native prompts where it had any."""
    rewards = (
        f"{name} {row['rollout'].get(name, _pooled(row))['reward_mean']:.2f}"
        for name, row in record["branches"].items()
    )
    return f"cycle {record['cycle']} {record['phase']}  reward: " + " ".join(rewards)


def _pooled(row: dict[str, Any]) -> dict[str, float]:
    parts = row["rollout"].values()
    kept = [part for part in parts if part["num_rollouts"]]
    total = sum(part["num_rollouts"] for part in kept)
    rewards = sum(part["reward_mean"] * part["num_rollouts"] for part in kept)
    return {"reward_mean": rewards / total if total else float("nan")}


def accuracy_line(method: str, record: dict[str, Any]) -> str:
    """Held-out accuracy by branch and domain, of a record that has an evaluation."""
    rows = [
        f"{branch}: " + " ".join(f"{domain} {value:.2f}" for domain, value in row.items())
        for branch, row in record["evaluate"].items()
    ]
    return f"{method} step {record['step']} held-out accuracy  " + "  |  ".join(rows)
