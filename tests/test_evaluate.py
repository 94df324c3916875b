"""Accuracy: means, standard errors, fixed seeds per prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch

from copd_engine.evaluate import Accuracy, average, evaluate, mean_accuracy
from copd_engine.rollout.base import Sampling
from copd_engine.types import EncodedPrompt, Example, Rollout, RolloutRequest

SAMPLING = Sampling(0.7, 5)


def prompt(uid: str, answer: str) -> EncodedPrompt:
    example = Example(uid, "p", answer, "answer_after_hash")
    return EncodedPrompt(example, torch.zeros(3, dtype=torch.int64), torch.zeros(3, 3, dtype=torch.int64), 3)


class ScriptedEngine:
    """Answers ``1#4`` to everything and keeps what it was asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[RolloutRequest], Sampling]] = []

    def sync(self, expert: str, named_tensors: Mapping[str, torch.Tensor], version: int) -> None:
        raise AssertionError("an evaluation must not touch the weights")

    def generate(self, expert: str, requests: Sequence[RolloutRequest], sampling: Sampling) -> list[Rollout]:
        self.calls.append((expert, list(requests), sampling))
        ids = torch.zeros(3, dtype=torch.int64)
        return [Rollout(request, ids, torch.zeros(3), "stop", 0, text="1#4") for request in requests]

    def close(self) -> None: ...


def test_mean_and_standard_error():
    rewards = [1.0, 0.0, 0.0, 1.0, 1.0]
    accuracy = mean_accuracy(rewards)
    assert accuracy.mean == pytest.approx(0.6)
    assert accuracy.stderr == pytest.approx(np.std(rewards, ddof=1) / np.sqrt(5))
    assert accuracy.num_prompts == 5
    assert mean_accuracy([1.0] * 4) == Accuracy(1.0, 0.0, 4)
    assert mean_accuracy([1.0]) == Accuracy(1.0, 0.0, 1)


def test_average_weighs_domains_equally():
    overall = average({"a": Accuracy(0.2, 0.03, 100), "b": Accuracy(0.8, 0.04, 400)})
    assert overall.mean == pytest.approx(0.5)
    assert overall.stderr == pytest.approx(0.025)  # sqrt(.03^2 + .04^2) / 2
    assert overall.num_prompts == 500


def test_evaluate_by_domain_with_the_same_seeds_every_time():
    prompts = {
        "text": [prompt("t0", "4"), prompt("t1", "5"), prompt("t2", "4"), prompt("t3", "4")],
        "image": [prompt("i0", "5")],
    }
    engine = ScriptedEngine()
    accuracies, samples = evaluate(engine, "hub", prompts, SAMPLING, seed=100)
    assert accuracies["text"].mean == 0.75
    assert accuracies["image"] == Accuracy(0.0, 0.0, 1)
    assert [(domain, r.request.prompt.example.uid, reward) for domain, r, reward in samples] == [
        ("text", "t0", 1.0),
        ("text", "t1", 0.0),
        ("text", "t2", 1.0),
        ("text", "t3", 1.0),
        ("image", "i0", 0.0),
    ]
    evaluate(engine, "spoke", prompts, SAMPLING, seed=100)
    seeds = [[request.seed for request in requests] for _, requests, _ in engine.calls]
    assert seeds == [[100, 101, 102, 103], [100]] * 2
    assert [expert for expert, *_ in engine.calls] == ["hub", "hub", "spoke", "spoke"]
    assert all(sampling is SAMPLING for *_, sampling in engine.calls)


def test_fewer_prompts_are_the_first_of_more():
    """So that the accuracy on 2 prompts and on 4 draws the same responses to the first two."""
    rows = [prompt(str(i), "4") for i in range(4)]
    engine = ScriptedEngine()
    evaluate(engine, "hub", {"text": rows[:2]}, SAMPLING, seed=7)
    evaluate(engine, "hub", {"text": rows}, SAMPLING, seed=7)
    few, many = ([r.seed for r in requests] for _, requests, _ in engine.calls)
    assert many[:2] == few
