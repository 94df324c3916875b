"""What groups say about their prompts."""

from __future__ import annotations

import statistics

import pytest
import torch

from copd_engine.rewards import RewardScore
from copd_engine.rollout_stats import group_stats
from copd_engine.types import EncodedPrompt, Example, Rollout, RolloutRequest


def rollout(group: int, num_tokens: int = 2) -> Rollout:
    prompt = EncodedPrompt(Example("e", "p", "1", "exact"), torch.zeros(3, dtype=torch.int64), torch.zeros(3, 3), 3)
    ids = torch.zeros(num_tokens, dtype=torch.int64)
    return Rollout(RolloutRequest(prompt, 0, group), ids, torch.zeros(num_tokens), "stop", 0)


def stats(groups: list[list[float]], terms: bool = True) -> dict[str, float | None]:
    """Groups dealt in turn, so that members do not stand together."""
    members = [
        (g, v) for column in range(max(map(len, groups))) for g, vs in enumerate(groups) for v in vs[column:][:1]
    ]
    # The reward is ten times the verifier's value: all right is the verifier's word.
    scores = [RewardScore(10 * v, {"verifier": v, "format": 1.0} if terms else {}) for _, v in members]
    return group_stats([rollout(g, 2 + g) for g, _ in members], scores)


def test_shares_of_groups_that_are_all_right_or_all_wrong() -> None:
    found = stats([[1, 1, 1], [0, 0], [1, 0, 1], [1, 1, 0.5], [0.5, 0.4], [0, 0, 0]])
    assert found["all_right_fraction"] == pytest.approx(1 / 6)
    assert found["all_wrong_fraction"] == pytest.approx(2 / 6)
    spread = [0.0, 0.0, statistics.pstdev([10, 0, 10]), statistics.pstdev([10, 10, 5]), 0.5, 0.0]
    assert found["reward_std_mean"] == pytest.approx(sum(spread) / 6)
    assert found["response_tokens_max"] == 7


def test_without_a_verifier_the_whole_reward_counts() -> None:
    found = stats([[1, 1], [0.05, 0.1], [-0.1, 0]], terms=False)
    assert (found["all_right_fraction"], found["all_wrong_fraction"]) == (pytest.approx(1 / 3), pytest.approx(1 / 3))


def test_nothing_to_say_of_no_rollouts() -> None:
    assert set(group_stats([], []).values()) == {None}
