"""Distances between branches against full softmaxes of a plain forward."""

from __future__ import annotations

import pytest
import torch

from copd_engine.branch import Branch
from copd_engine.config import ObjectiveConfig, OptimConfig
from copd_engine.diagnostics import PAIR_METRICS, compare_branches
from copd_engine.rollout.base import Sampling
from copd_engine.rollout.embedded import EmbeddedEngine
from copd_engine.types import RolloutRequest
from tests.helpers import prompts_of_all_domains, tiny_model
from tests.plain import plain_logp, plain_model

SAMPLING = Sampling(0.7, 6)
TOP_K = 10


def branches_of(policies, encoder, budget: int = 32_768) -> dict[str, Branch]:
    optim = OptimConfig(max_tokens_per_micro_batch=budget)
    return {n: Branch(n, p, encoder, optim, ObjectiveConfig(), SAMPLING.temperature) for n, p in policies.items()}


@pytest.fixture(scope="module")
def world():
    policy, encoder = tiny_model()
    probes = [RolloutRequest(p, seed=i, group=i) for i, p in enumerate(prompts_of_all_domains(encoder))]
    moved = {"a": policy.clone(), "b": policy.clone(), "c": tiny_model(5)[0]}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in moved["b"].named_parameters().values():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return moved, encoder, probes


def compare(policies, encoder, probes, budget: int = 32_768):
    engine = EmbeddedEngine(policies, encoder)
    return compare_branches(branches_of(policies, encoder, budget), engine, probes, SAMPLING, TOP_K)


def naive(student, teacher, rollouts) -> dict[str, float]:
    """Token means over the states that the student visited, from whole distributions in fp64."""
    p_TV, q_TV = (
        torch.cat(
            [
                plain_logp(plain_model(policy), r.request.prompt, r.response_ids_N, SAMPLING.temperature)
                for r in rollouts
            ]
        ).detach()
        for policy in (student, teacher)
    )
    shared = [
        len(set(p.topk(TOP_K).indices.tolist()) & set(q.topk(TOP_K).indices.tolist())) / TOP_K
        for p, q in zip(p_TV, q_TV, strict=True)
    ]
    forward_T = (p_TV.exp() * (p_TV - q_TV)).sum(1)
    backward_T = (q_TV.exp() * (q_TV - p_TV)).sum(1)
    return {
        "overlap": sum(shared) / len(shared),
        "sum_min": float(torch.minimum(p_TV.exp(), q_TV.exp()).sum(1).mean()),
        "kl_student_teacher": float(forward_T.mean()),
        "kl_teacher_student": float(backward_T.mean()),
        "symmetric_kl": float((forward_T + backward_T).mean()),
    }


def test_every_ordered_pair_matches_whole_softmaxes(world):
    policies, encoder, probes = world
    rows = compare(policies, encoder, probes)
    pairs = [("a", "b"), ("a", "c"), ("b", "a"), ("b", "c"), ("c", "a"), ("c", "b")]
    assert [(row["student"], row["teacher"]) for row in rows] == pairs
    for row in rows:
        student, teacher = policies[row["student"]], policies[row["teacher"]]
        rollouts = EmbeddedEngine({"s": student}, encoder).generate("s", probes, SAMPLING)
        expected = naive(student, teacher, rollouts)
        assert row.keys() - {"student", "teacher"} == set(PAIR_METRICS) == expected.keys()
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, rel=1e-3, abs=1e-5), (row["student"], row["teacher"], name)
    near, far = rows[0], rows[1]
    assert 0 < near["symmetric_kl"] < far["symmetric_kl"]
    assert 1 > near["sum_min"] > far["sum_min"] > 0
    assert 1 > near["overlap"] > far["overlap"]


def test_equal_branches_are_at_distance_0(world):
    policies, encoder, probes = world
    rows = compare({"a": policies["a"], "twin": policies["a"].clone()}, encoder, probes)
    assert len(rows) == 2
    for row in rows:
        assert row["overlap"] == 1.0
        assert row["sum_min"] == pytest.approx(1.0, abs=1e-6)
        assert (row["kl_student_teacher"], row["kl_teacher_student"], row["symmetric_kl"]) == (0.0, 0.0, 0.0)


def test_micro_batches_do_not_change_the_means(world):
    policies, encoder, probes = world
    for row, expected in zip(compare(policies, encoder, probes, 60), compare(policies, encoder, probes), strict=True):
        for name in PAIR_METRICS:
            assert row[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6)


def test_symmetric_kl_is_the_sum_of_both_directions(world):
    for row in compare(*world):
        assert row["symmetric_kl"] == pytest.approx(row["kl_student_teacher"] + row["kl_teacher_student"], rel=1e-5)


def test_nothing_to_compare(world):
    policies, encoder, probes = world
    assert compare({"a": policies["a"]}, encoder, probes) == []
    assert compare(policies, encoder, []) == []


def test_comparing_changes_no_gradient_and_no_weight(world):
    policies, encoder, probes = world
    before = {n: [p.detach().clone() for p in policy.named_parameters().values()] for n, policy in policies.items()}
    compare(policies, encoder, probes)
    for name, policy in policies.items():
        for old, new in zip(before[name], policy.named_parameters().values(), strict=True):
            assert torch.equal(old, new)
            assert new.grad is None
