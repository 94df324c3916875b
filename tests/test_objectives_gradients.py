"""Every knob of the objective through ``Branch.update`` against autograd through full logits, one sample at a time.

The formulas are written out by hand from the papers; ``docs/objectives.md`` names them. Groups share their prompt's
rows in the packed batch, which the plain model does not know of.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

import copd_engine.batch_loss as batch_loss_module
from copd_engine.branch import Branch, split_groups
from copd_engine.config import ObjectiveConfig, OptimConfig
from copd_engine.objectives import TrainSample
from copd_engine.types import Rollout
from tests.objective_world import (
    BETA,
    CLIP_HIGH,
    CLIP_LOW,
    TEMPERATURE,
    Truth,
    World,
    advantage_of,
    clipped,
    kl,
    make_world,
    of_tokens,
)
from tests.test_branch import Gradients, assert_close, gradients, updates


@pytest.fixture(scope="module")
def world() -> World:
    return make_world()


# The ratio: after one update of two


def second_update(world: World, **objective: Any) -> tuple[Gradients, dict[str, Any], list[TrainSample], Truth]:
    """The gradient of a step's second update, its metrics, its samples and the truth about its policies."""
    branch = world.branch(updates_per_step=2, **objective)
    samples = [*world.grpo(), *world.distilled()]
    before: list[Any] = []
    branch.optimizer.register_step_pre_hook(lambda *_: before.append(branch.policy.clone()))
    seen, metrics = updates(branch, samples)
    later = [replace(s, token_weight=2 * s.token_weight) for s in split_groups(samples, 2)[1]]
    return seen[1], metrics, later, Truth(world, before[1], world.policies["student"])


def rho_of(truth: Truth, sample: TrainSample, level: str) -> torch.Tensor:
    """With gradient. GSPO's s_i = (pi(y) / pi_old(y)) ** (1 / |y|) at every token."""
    rollout = sample.rollout
    gap_N = of_tokens(truth.logp(rollout), rollout) - of_tokens(truth.frozen("old", rollout), rollout)
    if level == "token":
        return gap_N.exp()
    return gap_N.mean().exp().expand(len(gap_N))


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_clipped_surrogate_with_ratios_of_tokens_and_of_sequences(world, level):
    """sequence, GRPO rows: autograd through s_i itself. The distilled rows' advantages differ by token: GSPO's token
    form, s_{i,t} = sg(s_i) pi / sg(pi)."""
    actual, metrics, samples, truth = second_update(world, ratio_level=level, clip_low=CLIP_LOW, clip_high=CLIP_HIGH)
    seen: list[torch.Tensor] = []

    def losses_of(sample: TrainSample) -> torch.Tensor:
        rho_N = rho_of(truth, sample, level)
        seen.append(rho_N.detach())
        if level == "sequence" and sample.is_distilled:
            logp_N = of_tokens(truth.logp(sample.rollout), sample.rollout)
            rho_N = rho_N.detach() * (logp_N - logp_N.detach()).exp()
        return clipped(rho_N, advantage_of(truth, sample))

    assert_close(actual, truth.gradients(samples, losses_of), 1e-4)
    rho_N = torch.cat(seen)
    assert float((rho_N - 1).abs().max()) > 0.2  # ratios and clips to speak of
    assert metrics["clip_fraction"] > 0


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_cispo_keeps_every_token_at_its_clipped_weight(world, level):
    actual, metrics, samples, truth = second_update(world, surrogate="cispo", ratio_level=level)
    outside: list[torch.Tensor] = []

    def losses_of(sample: TrainSample) -> torch.Tensor:
        rho_N = rho_of(truth, sample, level).detach()
        outside.append((rho_N < 1 - CLIP_LOW) | (rho_N > 1 + CLIP_HIGH))
        weight_N = rho_N.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
        return -weight_N * advantage_of(truth, sample) * of_tokens(truth.logp(sample.rollout), sample.rollout)

    assert_close(actual, truth.gradients(samples, losses_of), 1e-4)
    num_outside = int(torch.cat(outside).sum())
    assert num_outside > 0
    assert metrics["clip_fraction"] == pytest.approx(num_outside / metrics["num_tokens"])


@pytest.mark.parametrize("objective", [{"ratio_level": "sequence"}, {"surrogate": "cispo"}])
def test_the_ratio_of_the_first_update_is_exactly_1(world, objective):
    metrics = world.branch(**objective).update([*world.grpo(), *world.distilled()])
    assert metrics["ratio_mean"] == 1.0
    assert metrics["clip_fraction"] == 0.0
    plain = gradients(world.branch(), world.grpo())
    assert_close(gradients(world.branch(**objective), world.grpo()), plain, 1e-6)


# Sampler and trainer differ


def correction_of(truth: Truth, rollout: Rollout, mode: str, cap: float) -> torch.Tensor:
    ratio_N = (
        of_tokens(truth.frozen("old", rollout), rollout) - of_tokens(truth.frozen("sampler", rollout), rollout)
    ).exp()
    if mode == "truncate":
        return ratio_N.clamp(max=cap)
    return torch.where((ratio_N > cap) | (ratio_N < 1 / cap), 0, ratio_N)


@pytest.mark.parametrize(("mode", "cap"), [("truncate", 1.1), ("truncate", None), ("mask", 1.2)])
def test_importance_correction_multiplies_the_weights_of_all_sampled_rows(world, mode, cap):
    samples = [*world.grpo(), *world.distilled()]
    seen, metrics = updates(world.branch(importance_correction={"mode": mode, "cap": cap}), samples)
    truth = Truth(world)
    corrections: list[torch.Tensor] = []

    def losses_of(sample: TrainSample) -> torch.Tensor:
        correction_N = correction_of(truth, sample.rollout, mode, cap or math.inf)
        corrections.append(correction_N)
        return correction_N * clipped(rho_of(truth, sample, "token"), advantage_of(truth, sample))

    assert_close(seen[0], truth.gradients(samples, losses_of), 1e-4)
    weights_N = torch.cat(corrections)
    capped_N = weights_N == {"truncate": cap or math.inf, "mask": 0}[mode]
    assert metrics["correction_mean"] == pytest.approx(float(weights_N.mean()), rel=1e-4)
    assert metrics["correction_capped"] == pytest.approx(float(capped_N.double().mean()))
    assert (metrics["correction_capped"] > 0) == (cap is not None)


def test_the_mismatch_is_measured_and_equal_engines_have_weights_of_1(world):
    truth = Truth(world)
    gap_N = torch.cat(
        [of_tokens(truth.frozen("old", r), r) - of_tokens(truth.frozen("sampler", r), r) for r in world.native]
    )
    metrics = world.branch().update(world.grpo())
    assert "correction_mean" not in metrics
    assert metrics["mismatch_mean"] == pytest.approx(float(gap_N.abs().mean()), rel=1e-4)
    assert metrics["mismatch_kl"] == pytest.approx(float((gap_N.exp() - 1 - gap_N).mean()), rel=1e-3)
    equal = [
        replace(s, rollout=replace(s.rollout, sampler_logp_N=n))
        for s, n in zip(world.grpo(), world.branch().score(world.native), strict=True)
    ]
    metrics = world.branch(importance_correction={"mode": "mask", "cap": 1.01}).update(equal)
    assert metrics["correction_mean"] == pytest.approx(1.0, abs=1e-6)
    assert metrics["correction_capped"] == 0.0
    assert metrics["mismatch_kl"] == pytest.approx(0.0, abs=1e-9)


# KL to the base model


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "full"])
def test_kl_to_the_reference_on_the_rows_of_grpo_alone(world, estimator):
    samples = [*world.grpo(), *world.distilled()]
    weight = 0.5
    seen, metrics = updates(world.branch(kl={"weight": weight, "estimator": estimator}), samples)
    truth = Truth(world)
    measured: list[torch.Tensor] = []

    def losses_of(sample: TrainSample) -> torch.Tensor:
        advantage, rho_N = advantage_of(truth, sample), rho_of(truth, sample, "token")
        if sample.is_distilled:
            return clipped(rho_N, advantage)
        logp_NV, reference_NV = truth.logp(sample.rollout), truth.frozen("base", sample.rollout)
        gap_N = of_tokens(logp_NV, sample.rollout) - of_tokens(reference_NV, sample.rollout)
        value_N = {
            "k1": gap_N,
            "k2": gap_N.square() / 2,
            "k3": (-gap_N).exp() - 1 + gap_N,
            "full": kl(logp_NV, reference_NV),
        }[estimator]
        measured.append(value_N.detach())
        if estimator == "k1":
            return clipped(rho_N, advantage - weight * gap_N.detach())
        return clipped(rho_N, advantage) + weight * value_N

    assert_close(seen[0], truth.gradients(samples, losses_of), 1e-4)
    assert metrics["terms"]["grpo"]["reference_kl"] == pytest.approx(float(torch.cat(measured).mean()), rel=1e-3)
    assert "reference_kl" not in metrics["terms"]["opd:a"]
    assert sum(t["loss"] for t in metrics["terms"].values()) == pytest.approx(metrics["loss"], abs=1e-6)


def test_a_kl_needs_its_reference(world):
    branch = world.branch()
    with pytest.raises(ValueError, match=r"objective.kl.weight = 0.1 needs the reference policy"):
        Branch("x", branch.policy, world.encoder, OptimConfig(), ObjectiveConfig(kl={"weight": 0.1}), TEMPERATURE)


# Distillation


def jsd(student_NV: torch.Tensor, teacher_NV: torch.Tensor, beta: float) -> torch.Tensor:
    mixed_NV = (beta * teacher_NV.exp() + (1 - beta) * student_NV.exp()).log()
    return beta * kl(teacher_NV, mixed_NV) + (1 - beta) * kl(student_NV, mixed_NV)


@pytest.mark.parametrize("signal", ["full", "forward", "jsd"])
def test_exact_divergences_from_two_teachers_beside_grpo(world, signal):
    samples = [*world.grpo(), *world.distilled(signal)]
    seen, metrics = updates(world.branch(distillation={"signal": signal, "jsd_beta": 0.3}), samples)
    truth = Truth(world)
    reverse: dict[str, list[torch.Tensor]] = {"opd:a": [], "opd:b": []}

    def losses_of(sample: TrainSample) -> torch.Tensor:
        if not sample.is_distilled:
            return clipped(rho_of(truth, sample, "token"), sample.advantage)
        student_NV, teacher_NV = truth.logp(sample.rollout), truth.frozen(sample.term[4:], sample.rollout)
        reverse[sample.term].append(kl(student_NV, teacher_NV).detach())
        return (
            BETA
            * {
                "full": kl(student_NV, teacher_NV),
                "forward": kl(teacher_NV, student_NV),
                "jsd": jsd(student_NV, teacher_NV, 0.3),
            }[signal]
        )

    assert_close(seen[0], truth.gradients(samples, losses_of), 1e-4)
    for term, values in reverse.items():
        row = metrics["terms"][term]
        assert row["exact_reverse_kl"] == pytest.approx(float(torch.cat(values).mean()), rel=1e-3)
        assert ("exact_jsd" in row) == (signal == "jsd")
    sampled = world.branch().update(world.distilled())["terms"]
    assert metrics["terms"]["opd:a"]["delta_mean"] == pytest.approx(sampled["opd:a"]["delta_mean"], rel=1e-3)
    assert sum(t["loss"] for t in metrics["terms"].values()) == pytest.approx(metrics["loss"], abs=1e-6)


def test_exact_divergences_and_an_exact_kl_to_the_base_have_a_head_each(world):
    """Three heads beside the student's in one update."""
    samples = [*world.grpo(), *world.distilled("full")]
    kl_config = {"weight": 0.5, "estimator": "full"}
    actual = gradients(world.branch(distillation={"signal": "full"}, kl=kl_config), samples)
    truth = Truth(world)

    def losses_of(sample: TrainSample) -> torch.Tensor:
        student_NV = truth.logp(sample.rollout)
        if sample.is_distilled:
            return BETA * kl(student_NV, truth.frozen(sample.term[4:], sample.rollout))
        surrogate_N = clipped(rho_of(truth, sample, "token"), sample.advantage)
        return surrogate_N + 0.5 * kl(student_NV, truth.frozen("base", sample.rollout))

    assert_close(actual, truth.gradients(samples, losses_of), 1e-4)


@pytest.mark.parametrize("num_updates", [1, 2])
def test_the_control_variate_adds_the_old_policys_exact_kl_to_the_advantage(world, num_updates):
    branch = world.branch(distillation={"signal": "sampled_cv"}, updates_per_step=num_updates)
    samples = [*world.grpo(), *world.distilled("sampled_cv")]
    before: list[Any] = []
    branch.optimizer.register_step_pre_hook(lambda *_: before.append(branch.policy.clone()))
    seen, metrics = updates(branch, samples)
    part = [replace(s, token_weight=num_updates * s.token_weight) for s in split_groups(samples, num_updates)[-1]]
    truth = Truth(world, before[-1], world.policies["student"])
    means: list[torch.Tensor] = []

    def losses_of(sample: TrainSample) -> torch.Tensor:
        advantage = advantage_of(truth, sample)
        if sample.is_distilled:
            exact_N = kl(truth.frozen("old", sample.rollout), truth.frozen(sample.term[4:], sample.rollout))
            means.append(exact_N)
            advantage = advantage + BETA * exact_N
        return clipped(rho_of(truth, sample, "token"), advantage)

    assert_close(seen[-1], truth.gradients(part, losses_of), 1e-4)
    if num_updates == 1:
        rows = metrics["terms"].values()
        total = sum(row["exact_reverse_kl"] * row["num_tokens"] for row in rows if "exact_reverse_kl" in row)
        assert total == pytest.approx(float(torch.cat(means).sum()), rel=1e-3)


def test_the_control_variates_statistics_hold_the_old_log_probs(world, monkeypatch):
    """No projection of their own; the ratio against them is 1 but for rounding."""
    samples, projected = world.distilled("sampled_cv"), []
    monkeypatch.setattr(batch_loss_module, "linear_logprob", lambda *args, **_: projected.append(args))
    metrics = world.branch(distillation={"signal": "sampled_cv"}).update(samples)
    assert not projected
    assert metrics["ratio_mean"] == pytest.approx(1, abs=1e-6)
    assert metrics["terms"]["opd:a"]["exact_reverse_kl"] > 0


def test_teacher_states_stay_as_they_were_when_the_teacher_is_updated(world):
    """The head is tied to the embedding, which is trained."""
    teacher = world.branch("a")
    first = teacher.teacher_states(world.cross["a"])
    second = teacher.teacher_states(world.cross["b"])
    assert first[0].head is second[0].head
    before = first[0].head.weight_VD.clone()
    teacher.update(world.grpo())
    assert not torch.equal(teacher.policy.lm_head_weight, before)
    assert torch.equal(first[0].head.weight_VD, before)
    again = teacher.teacher_states(world.cross["a"])
    assert torch.equal(again[0].head.weight_VD, teacher.policy.lm_head_weight)
    frozen = world.branch("a")
    frozen.policy.lm_head_weight.requires_grad_(False)
    assert (
        frozen.teacher_states(world.cross["a"])[0].head.weight_VD.data_ptr() == frozen.policy.lm_head_weight.data_ptr()
    )
