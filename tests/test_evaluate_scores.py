"""mean@n, pass@k, maj@n and bootstrap intervals, by hand and by brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from copd_engine.evaluation.scores import (
    bootstrap,
    majority_score,
    mean_at_n,
    pass_at_k,
    powers_up_to,
    stratified,
)

rewards_of = st.integers(1, 7).flatmap(
    lambda n: st.lists(st.lists(st.sampled_from([0.0, 1.0]), min_size=n, max_size=n), min_size=1, max_size=4)
)


@given(rewards_of)
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(rows):
    rewards_PG = np.array(rows)
    for k in range(1, rewards_PG.shape[1] + 1):
        expected = [np.mean([any(subset) for subset in itertools.combinations(row, k)]) for row in rows]
        assert pass_at_k(rewards_PG, k) == pytest.approx(expected)


def test_pass_at_k_by_hand():
    """4 samples, 1 right: 1 - C(3, 2) / C(4, 2) = 1/2. A partial reward is not right."""
    assert pass_at_k(np.array([[0, 1, 0, 0.5]]), 2) == pytest.approx([0.5])
    assert pass_at_k(np.array([[0, 1, 0, 0], [1, 1, 0, 1]]), 1) == pytest.approx([0.25, 0.75])
    assert pass_at_k(np.array([[0, 1, 1, 1]]), 2) == pytest.approx([1.0])  # w < k


def test_pass_at_k_of_many_samples_does_not_overflow():
    rewards_PG = np.zeros((1, 4096))
    rewards_PG[0, 0] = 1
    assert pass_at_k(rewards_PG, 1024) == pytest.approx([0.25])


@pytest.mark.parametrize("k", [0, 5])
def test_pass_at_k_needs_k_samples(k):
    with pytest.raises(ValueError, match=f"pass@{k} of 4 samples"):
        pass_at_k(np.zeros((1, 4)), k)


@given(rewards_of)
def test_one_of_one_is_the_mean(rows):
    rewards_PG = np.array(rows)
    assert pass_at_k(rewards_PG, 1) == pytest.approx(mean_at_n(rewards_PG))


@pytest.mark.parametrize(
    ("num_samples", "powers"),
    [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8]), (64, [1, 2, 4, 8, 16, 32, 64])],
)
def test_powers_up_to(num_samples, powers):
    assert powers_up_to(num_samples) == powers


@pytest.mark.parametrize(
    ("answers", "rewards", "score"),
    [
        (["7", "7", "8"], [1, 1, 0], 1.0),
        (["7", "8", "8"], [1, 0, 0], 0.0),
        (["7", "8"], [1, 0], 0.5),  # a tie
        (["7", "8", "9"], [1, 0, 0], 1 / 3),
        (["7", "8", "8", "9", "9"], [1, 0, 0, 0, 0], 0.0),  # a tie of wrong ones
        (["1/2", "0.5", "8"], [1, 1, 0], 1.0),  # right ones vote together
        ([None, None, "7"], [0, 0, 1], 1.0),  # None does not vote
        ([None, "8"], [1, 0], 0.0),  # nor does a right one
        ([None, None], [1, 0], 0.0),
        ([None, None], [0, 0], 0.0),
        (["a", "a", "b"], [0.6, 0.4, 0.0], 0.5),  # partial rewards
    ],
)
def test_majority_by_hand(answers, rewards, score):
    assert majority_score(answers, [float(r) for r in rewards]) == pytest.approx(score)


@given(st.lists(st.tuples(st.sampled_from(["a", "b", "c", None]), st.sampled_from([0.0, 1.0])), min_size=1, max_size=6))
def test_majority_is_the_mean_over_fair_draws_among_tied_answers(samples):
    answers = ["right" if reward and answer is not None else answer for answer, reward in samples]
    counts = {answer: answers.count(answer) for answer in answers if answer is not None}
    tied = [answer for answer, count in counts.items() if count == max(counts.values())]
    expected = np.mean([answer == "right" for answer in tied]) if tied else 0.0
    assert majority_score(*zip(*samples, strict=True)) == pytest.approx(expected)


# Intervals


def test_interval_covers_the_mean_of_a_binomial():
    """About 95 of 100 intervals hold the true mean; the bound is loose."""
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        interval = bootstrap(rng.binomial(1, 0.3, 100).astype(float), seed, num_resamples=1000)
        covered += interval.low <= 0.3 <= interval.high
    assert 0.90 <= covered / 200 <= 0.99


def test_interval_is_as_wide_as_the_normal_one():
    values_P = np.random.default_rng(1).binomial(1, 0.4, 400).astype(float)
    interval = bootstrap(values_P, seed=0)
    half = 1.96 * values_P.std() / np.sqrt(400)
    assert interval.value == pytest.approx(values_P.mean())
    assert interval.low == pytest.approx(values_P.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(values_P.mean() + half, abs=0.1 * half)


def test_interval_of_equal_values_has_no_width_and_seeds_are_kept():
    assert bootstrap(np.ones(5), seed=3) == (1.0, 1.0, 1.0)
    values_P = np.random.default_rng(0).random(20)
    assert bootstrap(values_P, seed=3) == bootstrap(values_P, seed=3)
    assert bootstrap(values_P, seed=3) != bootstrap(values_P, seed=4)


def test_blocks_change_nothing_but_memory(monkeypatch):
    values_P = np.random.default_rng(0).random(50)
    whole = bootstrap(values_P, seed=0)
    monkeypatch.setattr("copd_engine.evaluation.scores._BLOCK", 1000)
    assert bootstrap(values_P, seed=0) == pytest.approx(whole)


def test_strata_weigh_equally_and_are_resampled_within():
    small, large = np.array([1.0, 0.0]), np.full(1000, 0.5)
    interval = stratified({"small": small, "large": large}, seed=0)
    assert interval.value == pytest.approx(0.5)
    # Only the small one varies: its mean is 0, 1/2 or 1.
    assert (interval.low, interval.high) == (pytest.approx(0.25), pytest.approx(0.75))
