"""Distances between branches against full softmaxes of a plain forward."""

from __future__ import annotations

import pytest
import torch

from copd_engine.branch import Branch
from copd_engine.config import ObjectiveConfig, OptimConfig
from copd_engine.diagnostics import BASE, PAIR_METRICS, UpdateAngles, change_cosines, compare_branches
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
        "student_entropy": float(-(p_TV.exp() * p_TV).sum(1).mean()),
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


def test_the_base_is_a_teacher_alone(world):
    """Its rows are those of a branch that holds it, on the states of the others; a single model is measured too."""
    policies, encoder, probes = world
    two, base = {"a": policies["a"], "b": policies["b"]}, policies["c"]
    engine = EmbeddedEngine(two, encoder)
    rows = compare_branches(branches_of(two, encoder), engine, probes, SAMPLING, TOP_K, base)
    assert [(row["student"], row["teacher"]) for row in rows] == [("a", "b"), ("a", BASE), ("b", "a"), ("b", BASE)]
    expected = {(row["student"], row["teacher"]): row for row in compare(policies, encoder, probes)}
    for row in rows:
        other = "c" if row["teacher"] == BASE else row["teacher"]
        for name in PAIR_METRICS:
            assert row[name] == expected[row["student"], other][name]
    one = {"a": policies["a"]}
    alone = compare_branches(branches_of(one, encoder), EmbeddedEngine(one, encoder), probes, SAMPLING, TOP_K, base)
    assert [(row["student"], row["teacher"]) for row in alone] == [("a", BASE)]


def random_tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in (("w", (7, 5)), ("b", (11,)))}


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.double().flatten() for tensor in tensors.values()])


def test_cosines_of_changes_over_all_weights():
    """The mean over tensors, or a start shared by mistake, would give other numbers."""
    ends = {name: random_tensors(seed) for seed, name in enumerate("abc")}
    starts = {name: random_tensors(seed) for seed, name in enumerate("abc", start=10)}
    found = change_cosines(ends, starts)
    assert set(found) == {(a, b) for a in "abc" for b in "abc" if a != b}
    for (a, b), value in found.items():
        changes = [flat(ends[name]) - flat(starts[name]) for name in (a, b)]
        assert value == pytest.approx(float(torch.nn.functional.cosine_similarity(*changes, dim=0)), abs=1e-6)


def test_cosines_of_changes_that_are_plain():
    start = random_tensors(0)
    step = random_tensors(1)
    moved = {
        "on": {name: start[name] + step[name] for name in start},
        "further": {name: start[name] + 3 * step[name] for name in start},
        "back": {name: start[name] - step[name] for name in start},
        "still": start,
    }
    found = change_cosines(moved, dict.fromkeys(moved, start))
    assert found["on", "further"] == pytest.approx(1, abs=1e-6)
    assert found["back", "on"] == pytest.approx(-1, abs=1e-6)
    assert found["on", "still"] is None
    assert change_cosines({"on": moved["on"]}, {"on": start}) == {}


def test_small_changes_of_large_weights_keep_their_angle():
    """An update at RL's learning rates is far below the weights: sums in fp64 over fp32 differences."""
    start = {"w": torch.full((1000, 100), 100.0)}
    step = {"w": torch.full((1000, 100), 2.0**-14)}
    step["w"][::2] *= -1
    ends = {"a": {"w": start["w"] + step["w"]}, "b": {"w": start["w"] + step["w"].abs()}}
    assert change_cosines(ends, dict.fromkeys(ends, start))["a", "b"] == pytest.approx(0, abs=1e-9)


def test_update_angles_are_those_since_the_last_call(world):
    policies, encoder, _ = world
    branches = branches_of({name: policies["a"].clone() for name in "xy"}, encoder)
    angles = UpdateAngles(branches)
    assert angles.cosines(branches) == {("x", "y"): None, ("y", "x"): None}

    def move(name: str, sign: float) -> None:
        with torch.no_grad():
            for parameter in branches[name].parameters.values():
                parameter += sign * 0.1

    move("x", 1), move("y", 1)
    resumed = UpdateAngles(branches)
    resumed.load_tensors(angles.tensors())
    assert angles.cosines(branches)["x", "y"] == pytest.approx(1, abs=1e-5)
    assert resumed.cosines(branches)["x", "y"] == pytest.approx(1, abs=1e-5)
    move("x", 1), move("y", -1)
    assert angles.cosines(branches)["x", "y"] == pytest.approx(-1, abs=1e-5)


def test_a_student_of_which_the_engine_lost_all_has_no_rows(world) -> None:
    """Zeros would look like branches that have drifted apart, or come together."""
    policies, encoder, probes = world

    class Losing(EmbeddedEngine):
        def generate(self, expert, requests, sampling):
            return [] if expert == "a" else super().generate(expert, requests, sampling)

    rows = compare_branches(branches_of(policies, encoder), Losing(policies, encoder), probes, SAMPLING, TOP_K)
    assert [(row["student"], row["teacher"]) for row in rows] == [("b", "a"), ("b", "c"), ("c", "a"), ("c", "b")]
