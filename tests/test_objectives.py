"""Advantages and token weights against formulas written out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from copd_engine.objectives import TrainSample, grpo_advantages, token_weight
from copd_engine.types import EncodedPrompt, Example, Rollout, RolloutRequest

PROMPT = EncodedPrompt(
    Example("p", "p", "a", "exact"), torch.zeros(3, dtype=torch.int64), torch.zeros(3, 3, dtype=torch.int64), 3
)


def rollout(reward: float = 0.0, group: int = 0, num_tokens: int = 2) -> Rollout:
    ids = torch.zeros(num_tokens, dtype=torch.int64)
    request = RolloutRequest(PROMPT, seed=0, group=group)
    return Rollout(request, ids, torch.zeros(num_tokens), "stop", 0, reward=reward)


def test_grpo_adv_by_hand():
    """Rewards 1, 0, 0, 0: mean 1/4, population std sqrt(3)/4, so (3/4) / (sqrt(3)/4) = sqrt(3)."""
    advantages, flat, groups = grpo_advantages([rollout(r) for r in (1, 0, 0, 0)])
    root = 3**0.5
    assert advantages == pytest.approx([root, -1 / root, -1 / root, -1 / root], abs=1e-5)
    assert (flat, groups) == (0, 1)


@pytest.mark.parametrize(
    ("mode", "expected"), [("population", [1, -1]), ("sample", [0.5**0.5, -(0.5**0.5)]), ("none", [0.5, -0.5])]
)
def test_ways_to_divide(mode, expected):
    advantages, *_ = grpo_advantages([rollout(1.0), rollout(0.0)], mode)
    assert advantages == pytest.approx(expected, abs=1e-5)


@given(st.lists(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=6), min_size=1, max_size=5))
def test_grpo_adv_of_ragged_groups(rewards):
    """Groups are numbered as a trainer might: not from 0 and not in order."""
    names = [7, 3, 9, 1, 5]
    rollouts = [rollout(r, names[g]) for g, group in enumerate(rewards) for r in group]
    advantages, flat, groups = grpo_advantages(rollouts, eps=1e-3)
    expected: list[float] = []
    for group in rewards:
        values = np.array(group, np.float64)
        expected += list((values - values.mean()) / (values.std() + 1e-3))
    assert advantages == pytest.approx(expected, abs=1e-5)
    assert groups == len(rewards)
    assert flat == sum(len(set(group)) == 1 for group in rewards)


def test_groups_without_variance_get_exactly_0_and_are_counted():
    rewards = [(0.3, 0), (0.3, 0), (0.3, 0), (1.0, 1), (0.0, 1), (1.0, 2), (0.5, 3), (0.5, 3)]
    advantages, flat, groups = grpo_advantages([rollout(r, g) for r, g in rewards])
    assert [a == 0.0 for a in advantages] == [True] * 3 + [False] * 2 + [True] * 3
    assert (flat, groups) == (3, 4)


def test_members_of_a_group_must_stand_together():
    with pytest.raises(ValueError, match="non-decreasing"):
        grpo_advantages([rollout(1.0, 0), rollout(0.0, 1), rollout(0.0, 0)])


def test_grpo_copies_one_number_to_all_tokens():
    sample = TrainSample(rollout(), "grpo", token_weight=1.0, advantage=-1.5)
    assert sample.advantages(torch.tensor([-0.1, -2.0])).tolist() == [-1.5, -1.5]


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.5])
def test_opd_adv_is_beta_times_teacher_minus_student(beta):
    teacher_logp_N, student_logp_N = torch.tensor([-0.5, -3.0]), torch.tensor([-1.5, -2.0])
    sample = TrainSample(rollout(), "opd:hub", token_weight=1.0, teacher_logp_N=teacher_logp_N, beta=beta)
    assert sample.advantages(student_logp_N).tolist() == [beta * 1.0, beta * -1.0]


def test_opd_adv_estimates_minus_the_reverse_kl():
    """Averaged over the student's own tokens, delta is -KL(student || teacher)."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.log_softmax(torch.randn(6, generator=generator), 0) for _ in range(2))
    tokens_N = torch.multinomial(student.exp(), 200_000, replacement=True, generator=generator)
    sample = TrainSample(rollout(), "opd:hub", 1.0, teacher_logp_N=teacher[tokens_N], beta=1.0)
    kl = (student.exp() * (student - teacher)).sum()
    assert float(sample.advantages(student[tokens_N]).mean()) == pytest.approx(-float(kl), abs=0.01)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.floats(0.1, 2))
def test_weights_of_a_term_sum_to_the_terms_weight(lengths, weight):
    total = sum(token_weight(weight, len(lengths), num_tokens) * num_tokens for num_tokens in lengths)
    assert total == pytest.approx(weight)
