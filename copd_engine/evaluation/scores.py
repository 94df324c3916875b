"""Scores of n samples per prompt, and intervals by resampling the prompts.

Arrays are fp64 of shape [P, G], prompts by samples, unless said otherwise.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

NUM_RESAMPLES = 10_000
#: Resamples are made in blocks of at most so many drawn prompts.
_BLOCK = 4_000_000


class Interval(NamedTuple):
    """An estimate, and the percentile bootstrap's bounds around it."""

    value: float
    low: float
    high: float


def mean_at_n(rewards_PG: np.ndarray) -> np.ndarray:
    """mean@n of each prompt, ``[P]``."""
    return np.asarray(rewards_PG, np.float64).mean(1)


def pass_at_k(rewards_PG: np.ndarray, k: int) -> np.ndarray:
    """pass@k of each prompt, ``[P]``: 1 - C(n - c, k) / C(n, k) where c of n samples are right, the unbiased estimate
    of the chance that one of k samples is right (arXiv 2107.03374, eq. 1). A sample is right at reward 1.

    ValueError unless 1 <= k <= n.
    """
    num_samples = rewards_PG.shape[1]
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} of {num_samples} samples")
    num_wrong_P1 = num_samples - (np.asarray(rewards_PG) >= 1.0).sum(1, keepdims=True)
    # C(w, k) / C(n, k) as a product of k factors; it is 0 where w < k, and nothing overflows.
    steps = np.arange(k)
    factors_Pk = np.clip((num_wrong_P1 - steps) / (num_samples - steps), 0.0, None)
    return 1.0 - factors_Pk.prod(1)


def powers_up_to(num_samples: int) -> list[int]:
    """1, 2, 4, ... and ``num_samples`` itself: the k of pass@k that are shown."""
    powers = [2**i for i in range(num_samples.bit_length()) if 2**i <= num_samples]
    return powers if powers[-1] == num_samples else [*powers, num_samples]


def majority_score(answers: Sequence[str | None], rewards: Sequence[float]) -> float:
    """maj@n of one prompt: the reward of the answer that most samples gave.

    Right samples (reward 1) vote together, however they wrote the answer; others by equal text. None does not vote,
    right or wrong. Of a tie the mean counts, which is what a fair draw among the tied answers gives on average. 0 where
    nobody votes.
    """
    votes: dict[str | None, list[float]] = defaultdict(list)
    for answer, reward in zip(answers, rewards, strict=True):
        if answer is not None:
            votes[None if reward >= 1.0 else answer].append(reward)
    if not votes:
        return 0.0
    most = max(map(len, votes.values()))
    return float(np.mean([np.mean(group) for group in votes.values() if len(group) == most]))


def bootstrap(values_P: np.ndarray, seed: int, num_resamples: int = NUM_RESAMPLES) -> Interval:
    """Mean over prompts and its 95 % percentile interval, prompts drawn with replacement."""
    return stratified({"": values_P}, seed, num_resamples)


def stratified(
    values: Mapping[str, np.ndarray], seed: int, num_resamples: int = NUM_RESAMPLES, percent: float = 95.0
) -> Interval:
    """Mean over the strata (benchmarks), each with equal weight, of the mean over their prompts, and its percentile
    interval: the prompts of every stratum are resampled within it.

    Every stratum draws from a stream of its own, named by its key, so that equal keys and numbers of prompts give equal
    draws whatever stands beside them.
    """
    means_R = np.zeros(num_resamples)
    for name, values_P in values.items():
        rng = np.random.default_rng([seed, *name.encode()])
        means_R += _resampled_means(np.asarray(values_P, np.float64), rng, num_resamples)
    means_R /= len(values)
    tail = (100.0 - percent) / 2
    low, high = np.percentile(means_R, [tail, 100.0 - tail])
    return Interval(float(np.mean([np.mean(v) for v in values.values()])), float(low), float(high))


def _resampled_means(values_P: np.ndarray, rng: np.random.Generator, num_resamples: int) -> np.ndarray:
    count = len(values_P)
    block = max(1, _BLOCK // count)
    means = [
        values_P[rng.integers(0, count, (min(block, num_resamples - start), count))].mean(1)
        for start in range(0, num_resamples, block)
    ]
    return np.concatenate(means)
