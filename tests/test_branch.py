"""One parameter update against autograd through full logits, one sample at a time, in a plain transformers model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

import copd_engine.batch_loss as batch_loss_module
import copd_engine.branch as branch_module
from copd_engine.branch import Branch
from copd_engine.config import ObjectiveConfig, OptimConfig
from copd_engine.objectives import TrainSample, grpo_advantages, token_weight
from copd_engine.rollout.base import Sampling
from copd_engine.rollout.embedded import EmbeddedEngine
from copd_engine.types import Rollout, RolloutRequest
from tests.helpers import perturbed, prompts_of_all_domains, tiny_model
from tests.plain import plain_model, plain_token_logp

TEMPERATURE = 0.8
BETA = 0.7
Gradients = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Term:
    """What a term is made of, for the formula written by hand: no token weights, no advantages."""

    rollouts: list[Rollout]
    weight: float
    teacher: str | None = None


@dataclass(frozen=True)
class World:
    policies: dict[str, Any]
    encoder: Any
    terms: list[Term]

    def branch(self, name: str = "student", objective: dict[str, Any] | None = None, **optim: Any) -> Branch:
        """A fresh branch; the gradient is not clipped unless asked for."""
        return Branch(
            name,
            self.policies[name].clone(),
            self.encoder,
            OptimConfig(**{"lr": 1e-3, "max_grad_norm": 1e9} | optim),
            ObjectiveConfig(**objective or {}),
            TEMPERATURE,
        )

    def samples(self, terms: Sequence[Term] | None = None, beta: float = BETA) -> list[TrainSample]:
        """As the trainer makes them."""
        samples: list[TrainSample] = []
        for term in self.terms if terms is None else terms:
            count = len(term.rollouts)
            if term.teacher is None:
                advantages, *_ = grpo_advantages(term.rollouts)
                samples += [
                    TrainSample(r, "grpo", token_weight(term.weight, count, r.num_tokens), advantage=a)
                    for r, a in zip(term.rollouts, advantages, strict=True)
                ]
                continue
            scores = self.branch(term.teacher).score(term.rollouts)
            samples += [
                TrainSample(
                    r,
                    f"opd:{term.teacher}",
                    token_weight(term.weight, count, r.num_tokens),
                    teacher_logp_N=score,
                    beta=beta,
                )
                for r, score in zip(term.rollouts, scores, strict=True)
            ]
        return samples


@pytest.fixture(scope="module")
def world() -> World:
    """Native: two text groups of three, one without variance. Cross: 2 image responses of a, 3 video responses of b."""
    policy, encoder = tiny_model()
    policies = {"student": policy, "a": perturbed(policy, 1), "b": perturbed(policy, 2)}
    text, image, video, text2, image2, _ = prompts_of_all_domains(encoder)
    prompts = [text] * 3 + [text2] * 3 + [image, image2] + [video] * 3
    groups = [0] * 3 + [1] * 3 + [2, 3] + [4] * 3
    requests = [RolloutRequest(p, seed=i, group=g) for i, (p, g) in enumerate(zip(prompts, groups, strict=True))]
    rollouts = EmbeddedEngine(policies, encoder).generate("student", requests, Sampling(TEMPERATURE, 9))
    # Responses of different lengths.
    rollouts = [
        replace(r, response_ids_N=r.response_ids_N[: 3 + i % 6], sampler_logp_N=r.sampler_logp_N[: 3 + i % 6])
        for i, r in enumerate(rollouts)
    ]
    rewards = [1.0, 0.0, 0.25, 1.0, 0.0, 0.0]
    native = [r.with_reward(reward) for r, reward in zip(rollouts, rewards, strict=False)]
    return World(policies, encoder, [Term(native, 1.0), Term(rollouts[6:8], 0.4, "a"), Term(rollouts[8:], 0.6, "b")])


def naive_gradients(world: World, terms: Sequence[Term], student, old=None, beta: float = BETA) -> Gradients:
    """-sum_m w_m 1/n_m sum_i 1/|y_i| sum_t min(rho A, clip(rho) A), differentiated by autograd.

    ``student``: the policy that is updated; ``old``: the one before the step's first update, if another.
    """
    plain = plain_model(student)
    plain_old = plain_model(old or student)
    loss = torch.zeros((), dtype=torch.float64)
    for term in terms:
        rewards: dict[int, list[float]] = {}
        for rollout in term.rollouts:
            rewards.setdefault(rollout.request.group, []).append(rollout.reward)
        teacher = None if term.teacher is None else plain_model(world.policies[term.teacher])
        for rollout in term.rollouts:
            logp_N = plain_token_logp(plain, rollout, TEMPERATURE)
            with torch.no_grad():
                old_logp_N = plain_token_logp(plain_old, rollout, TEMPERATURE)
                if teacher is None:
                    group = torch.tensor(rewards[rollout.request.group], dtype=torch.float64)
                    std = (group - group.mean()).square().mean().sqrt()
                    advantage_N = ((rollout.reward - group.mean()) / (std + 1e-6)).expand(len(logp_N))
                else:
                    advantage_N = beta * (plain_token_logp(teacher, rollout, TEMPERATURE) - old_logp_N)
            rho_N = (logp_N - old_logp_N).exp()
            surrogate_N = torch.minimum(rho_N * advantage_N, rho_N.clamp(0.8, 1.28) * advantage_N)
            loss = loss - term.weight / len(term.rollouts) * surrogate_N.mean()
    loss.backward()
    return {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}


def updates(branch: Branch, samples: Sequence[TrainSample]) -> tuple[list[Gradients], dict[str, Any]]:
    """Gradients just before each optimizer step, and the metrics."""
    seen: list[Gradients] = []

    def keep(*_: Any) -> None:
        seen.append({n: p.grad.clone() for n, p in branch.parameters.items() if p.grad is not None})

    branch.optimizer.register_step_pre_hook(keep)
    return seen, branch.update(samples)


def gradients(branch: Branch, samples: Sequence[TrainSample]) -> Gradients:
    (only,), _ = updates(branch, samples)
    return only


def assert_close(actual: Gradients, expected: Gradients, relative: float) -> None:
    """Norm of the difference, per parameter, against the parameter's and (for tiny ones) the whole gradient's norm."""
    assert actual.keys() == expected.keys()
    whole = math.sqrt(sum(float(g.double().square().sum()) for g in expected.values()))
    assert whole > 0
    for name, gradient in expected.items():
        error = float((actual[name].double() - gradient.double()).norm())
        bound = relative * max(float(gradient.norm()), 1e-2 * whole)
        assert error <= bound, f"{name}: error {error:.1e}, norm {float(gradient.norm()):.1e}"


def whole_norm(gradient: Gradients) -> float:
    return math.sqrt(sum(float(g.double().square().sum()) for g in gradient.values()))


# The gradient


def test_gradient_of_native_and_cross_batches_with_two_teachers(world):
    actual = gradients(world.branch(), world.samples())
    assert_close(actual, naive_gradients(world, world.terms, world.policies["student"]), 1e-4)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_gradient_of_each_term_alone(world, index):
    terms = world.terms[index : index + 1]
    actual = gradients(world.branch(), world.samples(terms))
    assert_close(actual, naive_gradients(world, terms, world.policies["student"]), 1e-4)


def test_terms_add_up_nothing_is_whitened_across_them(world):
    together = gradients(world.branch(), world.samples())
    apart = [gradients(world.branch(), world.samples([term])) for term in world.terms]
    names = together.keys()
    expected = {n: sum((g[n] for g in apart if n in g), torch.zeros_like(together[n])) for n in names}
    assert_close(together, expected, 1e-5)


def test_each_term_is_normalised_by_its_own_number_of_responses(world):
    """Every response of one term twice: that term, and the others, keep their gradient."""
    native, a, b = world.terms
    doubled = replace(a, rollouts=a.rollouts * 2)
    actual = gradients(world.branch(), world.samples([native, doubled, b]))
    assert_close(actual, gradients(world.branch(), world.samples()), 1e-5)


def test_micro_batches_and_order_do_not_change_the_gradient(world):
    samples = world.samples()
    expected = gradients(world.branch(max_tokens_per_micro_batch=100_000), samples)
    for budget in (1, 90, 150):
        assert_close(gradients(world.branch(max_tokens_per_micro_batch=budget), samples), expected, 1e-5)
    generator = torch.Generator().manual_seed(0)
    for budget in (60, 100_000):
        shuffled = [samples[i] for i in torch.randperm(len(samples), generator=generator)]
        assert_close(gradients(world.branch(max_tokens_per_micro_batch=budget), shuffled), expected, 1e-5)


def test_a_student_that_equals_its_teacher_gets_exactly_zero_gradient(world):
    world = replace(world, policies=world.policies | {"a": world.policies["student"].clone()})
    seen, metrics = updates(world.branch(), world.samples(world.terms[1:2]))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in seen[0].values())
    assert metrics["terms"]["opd:a"]["delta_mean"] == 0.0
    # Beside native samples the student's forward is another one than the teacher's: zero up to rounding.
    native = gradients(world.branch(), world.samples(world.terms[:1]))
    both = gradients(world.branch(), world.samples(world.terms[:2]))
    assert_close({n: both[n] for n in native}, native, 1e-5)


def test_beta_scales_the_cross_gradient_alone(world):
    cross = world.terms[1:]
    once = gradients(world.branch(), world.samples(cross, beta=1.0))
    thrice = gradients(world.branch(), world.samples(cross, beta=3.0))
    assert_close(thrice, {name: 3 * g for name, g in once.items()}, 1e-5)
    seen, metrics = updates(world.branch(), world.samples(cross, beta=0.0))
    assert whole_norm(seen[0]) == 0.0
    _, with_beta = updates(world.branch(), world.samples(cross, beta=3.0))
    # The distance to the teacher is measured whatever beta is.
    for term in ("opd:a", "opd:b"):
        assert metrics["terms"][term]["reverse_kl"] == pytest.approx(with_beta["terms"][term]["reverse_kl"], rel=1e-5)
        assert metrics["terms"][term]["reverse_kl"] != 0.0


def test_rows_without_advantage_may_be_left_out(world):
    native = world.terms[0].rollouts
    flat = [*native[:3], *(r.with_reward(1.0) for r in native[3:])]
    samples = world.samples([Term(flat, 1.0)])
    assert [s.advantage == 0.0 for s in samples] == [False] * 3 + [True] * 3
    kept = [s for s in samples if s.advantage != 0.0]
    assert_close(gradients(world.branch(), kept), gradients(world.branch(), samples), 1e-5)


# Ratio, clip and several updates per step


@pytest.fixture
def calls(monkeypatch) -> list[tuple[Any, dict[str, Any]]]:
    """Results and arguments of every call of the loss."""
    seen: list[tuple[Any, dict[str, Any]]] = []
    loss = batch_loss_module.linear_policy_loss

    def keep(*args: Any, **kwargs: Any) -> Any:
        result = loss(*args, **kwargs)
        seen.append((result, kwargs))
        return result

    monkeypatch.setattr(batch_loss_module, "linear_policy_loss", keep)
    return seen


@pytest.mark.parametrize(("budget", "num_batches"), [(1, 11), (90, 3), (100_000, 1)])
def test_the_ratio_of_the_first_update_is_exactly_1(world, calls, budget, num_batches):
    metrics = world.branch(max_tokens_per_micro_batch=budget).update(world.samples())
    assert len(calls) == num_batches
    assert all(torch.equal(result.ratio_T, torch.ones_like(result.ratio_T)) for result, _ in calls)
    assert metrics["ratio_mean"] == 1.0
    assert metrics["clip_fraction"] == 0.0


def test_the_second_update_has_ratios_clips_and_the_right_gradient(world, calls):
    branch = world.branch(objective={"updates_per_step": 2}, lr=0.02)
    samples = world.samples()
    parts = branch_module.split_groups(samples, 2)
    before: list[Any] = []
    branch.optimizer.register_step_pre_hook(lambda *_: before.append(branch.policy.clone()))
    seen, metrics = updates(branch, samples)
    assert len(seen) == 2 == branch.version
    (first, _), (second, arguments) = calls
    assert torch.equal(first.ratio_T, torch.ones_like(first.ratio_T))
    # The ratio against the policy before the first update.
    old, new = world.policies["student"], before[1]
    expected = torch.cat(
        [
            (
                plain_token_logp(plain_model(new), s.rollout, TEMPERATURE)
                - plain_token_logp(plain_model(old), s.rollout, TEMPERATURE)
            )
            .detach()
            .exp()
            for s in parts[1]
        ]
    )
    torch.testing.assert_close(second.ratio_T.double(), expected, rtol=1e-4, atol=1e-5)
    advantage_T = arguments["advantage_T"]
    clipped = ((expected > 1.28) & (advantage_T > 0)) | ((expected < 0.8) & (advantage_T < 0))
    outside = (expected > 1.28) | (expected < 0.8)
    assert 0 < int(clipped.sum()) < int(outside.sum()) < len(outside)
    assert torch.equal(second.clipped_T, clipped)
    assert metrics["clip_fraction"] == pytest.approx(int(clipped.sum()) / metrics["num_tokens"])
    # Twice the sum over this part's terms: each update weighs as much as a whole step.
    count = {term.teacher: len(term.rollouts) for term in world.terms}
    part = [
        Term(
            [r for r in term.rollouts if any(s.rollout is r for s in parts[1])],
            2 * term.weight * sum(s.rollout is r for r in term.rollouts for s in parts[1]) / count[term.teacher],
            term.teacher,
        )
        for term in world.terms
    ]
    part = [term for term in part if term.rollouts]
    assert len(part) > 1
    assert_close(seen[1], naive_gradients(world, part, new, old), 1e-3)


def test_updates_split_by_whole_groups(world):
    samples = world.samples()
    for parts in (1, 2, 3, 50):
        split = branch_module.split_groups(samples, parts)
        assert sorted(id(s) for part in split for s in part) == sorted(map(id, samples))
        assert all(split)
        for left, right in itertools.combinations(split, 2):
            assert not {s.rollout.request.group for s in left} & {s.rollout.request.group for s in right}


def test_updates_see_every_term_whatever_their_order(world):
    """One term's groups in front of the other's or behind them: the same two updates."""
    first, *_ = world.samples()
    samples = [
        replace(first, term=term, rollout=replace(first.rollout, request=replace(first.rollout.request, group=group)))
        for group, term in enumerate(["grpo", "grpo", "opd:image", "opd:video", "opd:image"])
    ]
    expected = [{("grpo", 0), ("opd:image", 2), ("opd:video", 3)}, {("grpo", 1), ("opd:image", 4)}]
    for order in (samples, samples[2:] + samples[:2]):
        split = branch_module.split_groups(order, 2)
        assert [{(s.term, s.rollout.request.group) for s in part} for part in split] == expected


def test_the_loss_is_that_of_one_step_however_many_updates(world):
    """At lr 0 the updates differ in nothing: their mean is the step's loss, and the terms add up to it."""
    losses = []
    for count in (1, 2):
        metrics = world.branch(objective={"updates_per_step": count}, lr=1e-30).update(world.samples())
        losses.append(metrics["loss"])
        assert sum(term["loss"] for term in metrics["terms"].values()) == pytest.approx(metrics["loss"], abs=1e-6)
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert losses[0] != 0.0


# Scores and metrics


def test_scores_are_the_log_probs_of_a_plain_forward_at_the_sampling_temperature(world):
    rollouts = [r for term in world.terms for r in term.rollouts]
    plain = plain_model(world.policies["a"])
    for budget in (1, 100, 100_000):
        scores = world.branch("a", max_tokens_per_micro_batch=budget).score(rollouts)
        for rollout, score_N in zip(rollouts, scores, strict=True):
            expected = plain_token_logp(plain, rollout, TEMPERATURE).detach()
            torch.testing.assert_close(score_N.double(), expected, atol=1e-5, rtol=1e-5)
            assert not score_N.requires_grad
    assert world.branch().score([]) == []


def test_metrics_count_tokens_per_term_and_estimate_the_reverse_kl(world):
    metrics = world.branch().update(world.samples())
    student, teacher = plain_model(world.policies["student"]), plain_model(world.policies["a"])
    rollouts = world.terms[1].rollouts
    delta = torch.cat(
        [plain_token_logp(teacher, r, TEMPERATURE) - plain_token_logp(student, r, TEMPERATURE) for r in rollouts]
    )
    row = metrics["terms"]["opd:a"]
    assert row["num_responses"] == 2
    assert row["num_tokens"] == len(delta)
    assert row["delta_mean"] == pytest.approx(float(delta.mean().detach()), abs=1e-5)
    assert row["reverse_kl"] == -row["delta_mean"]
    assert metrics["num_tokens"] == sum(r.num_tokens for term in world.terms for r in term.rollouts)
    assert metrics["mismatch_max"] < 1e-5  # the sampler's log-probs are the trainer's
    assert metrics["terms"]["grpo"]["num_responses"] == 6
    assert "delta_mean" not in metrics["terms"]["grpo"]


# Optimizer


def test_the_gradient_is_clipped_to_its_norm(world):
    unclipped = gradients(world.branch(), world.samples())
    limit = whole_norm(unclipped) / 10
    seen, metrics = updates(world.branch(max_grad_norm=limit), world.samples())
    assert metrics["grad_norm"] == pytest.approx(whole_norm(unclipped), rel=1e-5)
    assert whole_norm(seen[0]) == pytest.approx(limit, rel=1e-4)


def test_an_update_moves_the_policy_up_the_objective(world):
    """One small step makes good responses likelier and brings the student closer to its teachers."""
    branch = world.branch(lr=1e-4)
    samples = world.samples()
    before = branch.score([s.rollout for s in samples])
    branch.update(samples)
    after = branch.score([s.rollout for s in samples])
    gain = sum(
        s.token_weight * float((s.advantages(old) * (new - old)).sum())
        for s, old, new in zip(samples, before, after, strict=True)
    )
    assert gain > 0
    assert branch.version == 1


def test_no_samples_no_update(world):
    branch = world.branch()
    before = {name: p.detach().clone() for name, p in branch.parameters.items()}
    metrics = branch.update([])
    assert branch.version == 0
    assert (metrics["loss"], metrics["grad_norm"], metrics["skipped"], metrics["num_tokens"]) == (None, None, False, 0)
    assert all(torch.equal(before[name], p) for name, p in branch.parameters.items())


def test_a_nan_is_left_out_and_counted(world):
    branch = world.branch()
    before = {name: p.detach().clone() for name, p in branch.parameters.items()}
    samples = world.samples()
    broken = [*samples[:-1], replace(samples[-1], teacher_logp_N=samples[-1].teacher_logp_N * float("nan"))]
    for count in (1, 2):
        metrics = branch.update(broken)
        assert metrics["skipped"]
        assert metrics["loss"] is None
        assert (branch.version, branch.num_skipped, branch.num_skipped_in_a_row) == (0, count, count)
    assert all(torch.equal(before[name], p) for name, p in branch.parameters.items())
    assert not branch.update(samples)["skipped"]
    assert (branch.version, branch.num_skipped, branch.num_skipped_in_a_row) == (1, 2, 0)
    # What was left out leaves no trace: the same weights as without it.
    clean = world.branch()
    clean.update(samples)
    assert all(torch.equal(clean.parameters[name], p) for name, p in branch.parameters.items())
