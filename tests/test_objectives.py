"""Advantages and token weights against formulas written out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from copd_engine.config import ImportanceCorrectionConfig, ObjectiveConfig
from copd_engine.objectives import (
    TrainSample,
    as_clipped_surrogate,
    grpo_advantages,
    importance_correction,
    token_weight,
)
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


log_ratios = st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=9)


@given(log_ratios, st.floats(1, 50))
def test_importance_weights_are_ratios_and_the_cap_says_which_are_not(log_ratio, cap):
    ratios = [float(np.exp(np.float64(x))) for x in log_ratio]
    # A ratio at a bound may fall on either side in fp32.
    near = [min(abs(r - cap), abs(r - 1 / cap)) < 1e-4 * r for r in ratios]
    for mode in ("truncate", "mask"):
        weights_N, capped_N = importance_correction(
            torch.tensor(log_ratio), ImportanceCorrectionConfig(mode=mode, cap=cap)
        )
        for ratio, weight, is_capped, at_bound in zip(ratios, weights_N.tolist(), capped_N.tolist(), near, strict=True):
            if at_bound:
                continue
            expected = min(ratio, cap) if mode == "truncate" else ratio * (1 / cap <= ratio <= cap)
            assert weight == pytest.approx(expected, rel=1e-5)
            assert is_capped == (ratio > cap or (mode == "mask" and ratio < 1 / cap))


@given(st.lists(log_ratios, min_size=1, max_size=4))
def test_the_sequence_ratio_is_the_geometric_mean_of_its_own_response(log_ratio):
    old_N = torch.linspace(-3, -0.1, sum(map(len, log_ratio)))
    logp_N = old_N + torch.tensor([x for response in log_ratio for x in response])
    config = ObjectiveConfig(ratio_level="sequence")
    surrogate = as_clipped_surrogate(logp_N, old_N, [len(response) for response in log_ratio], config)
    means = [np.mean(response) for response in log_ratio for _ in response]
    assert (logp_N - surrogate.old_logp_N).tolist() == pytest.approx(means, abs=1e-5)
    # Nothing has moved: exactly 1.
    assert torch.equal(as_clipped_surrogate(old_N, old_N, [len(old_N)], config).old_logp_N, old_N)
