"""What the estimators of the objective estimate: exact expectations over the vocabulary, through ``Branch.update``.

A response of one token for every entry of the vocabulary, its loss weight the probability that it is sampled: the
gradient of that batch is the expected gradient at the prompt's last state.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import copd_engine.batch_loss as batch_loss_module
from copd_engine.objectives import TrainSample
from copd_engine.types import Rollout, RolloutRequest
from tests.objective_world import BETA, World, make_world
from tests.test_branch import Gradients, assert_close, gradients, updates, whole_norm


@pytest.fixture(scope="module")
def world() -> World:
    return make_world()


@pytest.fixture(scope="module")
def every_token(world: World) -> list[Rollout]:
    request = world.native[0].request
    vocabulary = torch.arange(len(world.policies["student"].lm_head_weight))
    return [
        Rollout(RolloutRequest(request.prompt, 0, 0), vocabulary[v : v + 1], torch.zeros(1), "length", 0)
        for v in vocabulary.tolist()
    ]


def expected_over(world: World, rollouts: list[Rollout], sampler: str, **sample: Any) -> list[TrainSample]:
    """One sample per token, weighted by its probability under ``sampler``, whose log-probs it has."""
    return [
        TrainSample(replace(rollout, sampler_logp_N=logp_N), "grpo", float(logp_N.exp()), **sample)
        for rollout, logp_N in zip(rollouts, world.branch(sampler).score(rollouts), strict=True)
    ]


def distilled(world: World, rollouts: list[Rollout], signal: str, teacher: str = "a") -> list[TrainSample]:
    samples = [replace(s, term=f"opd:{teacher}", beta=BETA) for s in expected_over(world, rollouts, "student")]
    branch = world.branch(teacher)
    if signal == "sampled":
        scores = branch.score(rollouts)
        return [replace(s, teacher_logp_N=logp_N) for s, logp_N in zip(samples, scores, strict=True)]
    return [replace(s, teacher=t) for s, t in zip(samples, branch.teacher_states(rollouts), strict=True)]


def distance(actual: Gradients, expected: Gradients) -> float:
    """Relative, of the whole gradient."""
    return whole_norm({name: actual[name] - expected[name] for name in expected}) / whole_norm(expected)


# Sampled by another policy than the trainer's


def test_importance_weights_without_a_cap_are_unbiased_and_what_is_capped_or_missing_is_not(world, every_token):
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(len(every_token), generator=generator).tolist()

    def gradient(sampler: str, **correction: Any) -> Gradients:
        samples = expected_over(world, every_token, sampler)
        samples = [replace(s, advantage=reward) for s, reward in zip(samples, rewards, strict=True)]
        return gradients(world.branch(importance_correction=correction), samples)

    truth = gradient("student")
    assert_close(gradient("sampler", mode="truncate", cap=None), truth, 1e-4)
    assert distance(gradient("sampler"), truth) > 0.02
    assert distance(gradient("sampler", mode="truncate", cap=1.02), truth) > 0.01
    assert distance(gradient("sampler", mode="mask", cap=1.02), truth) > 0.01
    # A wide cap cuts nothing here.
    assert_close(gradient("sampler", mode="mask", cap=50.0), truth, 1e-4)


# Distillation


def test_both_sampled_signals_have_the_gradient_of_the_exact_reverse_kl(world, every_token):
    exact = gradients(world.branch(distillation={"signal": "full"}), distilled(world, every_token, "full"))
    sampled = gradients(world.branch(), distilled(world, every_token, "sampled"))
    with_baseline = gradients(
        world.branch(distillation={"signal": "sampled_cv"}), distilled(world, every_token, "sampled_cv")
    )
    assert_close(sampled, exact, 1e-3)
    assert_close(with_baseline, exact, 1e-3)


def test_the_control_variate_has_advantages_of_mean_0_and_lowers_the_variance(world, every_token, monkeypatch):
    """Of the gradient with respect to the logits, A_v (onehot_v - p), over v ~ p, at teachers near and far."""
    calls: list[dict[str, Any]] = []
    loss = batch_loss_module.linear_policy_loss
    monkeypatch.setattr(batch_loss_module, "linear_policy_loss", lambda *a, **k: (calls.append(k), loss(*a, **k))[1])
    p_V = torch.cat(world.branch().score(every_token)).double().exp()
    for teacher in ("sampler", "a", "b", "base"):
        advantages, variances = {}, {}
        for signal in ("sampled", "sampled_cv"):
            calls.clear()
            world.branch(distillation={"signal": signal}).update(distilled(world, every_token, signal, teacher))
            advantage_V = advantages[signal] = torch.cat([call["advantage_T"] for call in calls]).double()
            norm_V = 1 - 2 * p_V + p_V.square().sum()
            mean_V = p_V * (advantage_V - (p_V * advantage_V).sum())
            variances[signal] = float((p_V * advantage_V.square() * norm_V).sum() - mean_V.square().sum())
        assert float((p_V * advantages["sampled_cv"]).sum()) == pytest.approx(0, abs=1e-6)
        shift_V = advantages["sampled_cv"] - advantages["sampled"]
        exact = -float((p_V * advantages["sampled"]).sum())
        torch.testing.assert_close(shift_V, torch.full_like(shift_V, exact), rtol=1e-3, atol=1e-6)
        assert variances["sampled_cv"] < variances["sampled"], teacher


def test_a_detached_divergence_as_the_advantage_teaches_nothing(world, every_token):
    """Which is why the config refuses it: the same number for every token of the vocabulary."""
    metrics = world.branch(distillation={"signal": "full"}).update(distilled(world, every_token, "full"))
    divergence = metrics["terms"]["opd:a"]["exact_reverse_kl"]
    assert divergence > 1e-3
    signal = whole_norm(gradients(world.branch(), distilled(world, every_token, "sampled")))
    detached = expected_over(world, every_token, "student", advantage=-BETA * divergence)
    assert whole_norm(gradients(world.branch(), detached)) < 1e-4 * signal
    # One token's gradient is no smaller than ever: only its expectation is 0.
    assert whole_norm(gradients(world.branch(), [replace(detached[5], token_weight=1.0)])) > 1e-2 * signal


# Estimators of the KL to the base model


def test_what_the_estimators_of_the_reference_kl_differentiate(world, every_token):
    """k1 in the advantage and k2: KL(pi || base). k3: KL(base || pi)."""
    samples = expected_over(world, every_token, "student")

    def gradient(estimator: str) -> Gradients:
        return gradients(world.branch(kl={"weight": BETA, "estimator": estimator}), samples)

    reverse = gradient("full")
    assert_close(gradient("k1"), reverse, 1e-3)
    assert_close(gradient("k2"), reverse, 1e-3)
    forward = gradients(
        world.branch(distillation={"signal": "forward"}), distilled(world, every_token, "forward", "base")
    )
    assert_close(gradient("k3"), forward, 1e-3)
    assert distance(forward, reverse) > 0.02


def test_k1_differentiated_would_be_zero(world, every_token):
    """The gradient of log pi(v) - log base(v) is that of log pi(v): an advantage of -1 for every token."""
    samples = expected_over(world, every_token, "student", advantage=-1.0)
    seen, _ = updates(world.branch(), samples)
    single = gradients(world.branch(), [replace(samples[5], token_weight=1.0)])
    assert whole_norm(seen[0]) < 1e-4 * whole_norm(single)
