"""Which of the groups drawn for a GRPO batch are trained on: those with variance, as far as there are (DAPO, arXiv
2503.14476, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from copd_engine.objectives import groups_with_variance
from copd_engine.rewards import RewardScore
from copd_engine.types import Rollout

#: Rollouts and the scores of each.
RewardedRollouts: TypeAlias = tuple[list[Rollout], list[RewardScore]]


def num_missing(num_prompts: int, groups: Sequence[RewardedRollouts]) -> int:
    """How many further groups it takes to have ``num_prompts`` with variance, if all of them have it."""
    return max(0, num_prompts - sum(map(_has_variance, groups)))


def chosen(groups: Sequence[RewardedRollouts], num_prompts: int) -> list[RewardedRollouts]:
    """The first ``num_prompts`` groups with variance; where there are fewer, the first without fill up. In order."""
    by_use = sorted(range(len(groups)), key=lambda index: (not _has_variance(groups[index]), index))
    return [groups[index] for index in sorted(by_use[:num_prompts])]


def joined(groups: Sequence[RewardedRollouts]) -> RewardedRollouts:
    """All groups' rollouts and scores behind one another."""
    return [r for rollouts, _ in groups for r in rollouts], [s for _, scores in groups for s in scores]


def _has_variance(group: RewardedRollouts) -> bool:
    return bool(groups_with_variance(group[0]))
