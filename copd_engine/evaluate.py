"""Accuracy on held-out prompts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from copd_engine.prompts import in_chunks, without_pixels
from copd_engine.rollout.base import RolloutEngine, Sampling
from copd_engine.types import EncodedPrompt, Rollout, RolloutRequest
from copd_engine.verifiers import verify_all


@dataclass(frozen=True)
class Accuracy:
    """Mean score of the verifier over ``num_prompts`` held-out prompts, one sample each, and its standard error."""

    mean: float
    stderr: float
    num_prompts: int


def evaluate(
    engine: RolloutEngine,
    expert: str,
    prompts: Mapping[str, Sequence[EncodedPrompt]],
    sampling: Sampling,
    seed: int,
    num_prompts: int | None = None,
) -> tuple[dict[str, Accuracy], list[tuple[str, Rollout, float]]]:
    """Accuracy of ``expert`` per domain on the first ``num_prompts`` (all without), and every sampled response as
    (domain, rollout, reward).

    Prompt i of a domain always gets the same seed, so models are compared on equal draws. Pixel inputs are held for a
    bounded number of prompts at a time; the returned rollouts have none.
    """
    accuracies: dict[str, Accuracy] = {}
    samples: list[tuple[str, Rollout, float]] = []
    for domain, encoded in prompts.items():
        rewards: list[float] = []
        for chunk in in_chunks(islice(encoded, num_prompts)):
            requests = [
                RolloutRequest(prompt, seed=seed + index, group=index)
                for index, prompt in enumerate(chunk, start=len(rewards))
            ]
            rollouts = engine.generate(expert, requests, sampling)
            scores = verify_all([(rollout.text, rollout.request.prompt.example) for rollout in rollouts])
            rewards += scores
            samples += [(domain, _slim(rollout), score) for rollout, score in zip(rollouts, scores, strict=True)]
        accuracies[domain] = mean_accuracy(rewards)
    return accuracies, samples


def _slim(rollout: Rollout) -> Rollout:
    request = rollout.request
    return replace(rollout, request=replace(request, prompt=without_pixels(request.prompt)))


def mean_accuracy(rewards: Sequence[float]) -> Accuracy:
    count = len(rewards)
    mean = sum(rewards) / count
    variance = sum((reward - mean) ** 2 for reward in rewards) / max(1, count - 1)
    return Accuracy(mean, math.sqrt(variance / count), count)


def average(accuracies: Mapping[str, Accuracy]) -> Accuracy:
    """Mean over domains, each with equal weight."""
    count = len(accuracies)
    mean = sum(a.mean for a in accuracies.values()) / count
    stderr = math.sqrt(sum(a.stderr**2 for a in accuracies.values())) / count
    return Accuracy(mean, stderr, sum(a.num_prompts for a in accuracies.values()))
