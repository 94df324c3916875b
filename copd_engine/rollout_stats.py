"""What groups of rollouts say about their prompts: too easy, too hard, or worth learning from."""

from __future__ import annotations

from collections.abc import Sequence

from copd_engine.rewards import RewardScore
from copd_engine.types import Rollout

RIGHT = 1.0 - 1e-6


def group_stats(rollouts: Sequence[Rollout], scores: Sequence[RewardScore]) -> dict[str, float | None]:
    """``reward_std_mean``: population std of the rewards within a group, mean over groups. ``all_right_fraction`` and
    ``all_wrong_fraction``: groups in which the verifier gave every response 1, or every one 0 (the whole reward where
    it has no verifier term). ``response_tokens_max``. None where an engine lost all."""
    groups: dict[int, list[tuple[float, float]]] = {}
    for rollout, score in zip(rollouts, scores, strict=True):
        verified = next((v for name, v in score.terms.items() if name.startswith("verifier")), score.total)
        groups.setdefault(rollout.request.group, []).append((score.total, verified))
    if not groups:
        names = ("reward_std_mean", "all_right_fraction", "all_wrong_fraction", "response_tokens_max")
        return dict.fromkeys(names)
    stds = [_std([total for total, _ in group]) for group in groups.values()]
    right = sum(all(value >= RIGHT for _, value in group) for group in groups.values())
    wrong = sum(all(value <= 0 for _, value in group) for group in groups.values())
    return {
        "reward_std_mean": sum(stds) / len(stds),
        "all_right_fraction": right / len(groups),
        "all_wrong_fraction": wrong / len(groups),
        "response_tokens_max": max(rollout.num_tokens for rollout in rollouts),
    }


def _std(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return float((sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5)
