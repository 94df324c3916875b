"""From rollouts to weighted samples: denominators by hand, and which responses are forwarded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from copd_engine.algorithms import Assignment
from copd_engine.config import build_config
from copd_engine.objectives import LmHead, TeacherStates, TrainSample
from copd_engine.samples import SampleBuilder
from copd_engine.types import Rollout
from tests.test_objectives import rollout

#: (reward, group, tokens): group 1 has no variance, and one member of group 2 stands at its group's mean.
ROLLOUTS = [(1, 0, 2), (0, 0, 6), (1, 1, 4), (1, 1, 8), (1, 2, 3), (0.5, 2, 5), (0, 2, 12)]
NATIVE = Assignment("a", "a", 3, weight=0.5)
CROSS = Assignment("a", "b", 3, teacher="b", weight=0.5)


class Teacher:
    """Counts what it is asked for."""

    beta = 0.7

    def __init__(self) -> None:
        self.asked: list[str] = []

    def score(self, rollouts: Sequence[Rollout]) -> list[torch.Tensor]:
        self.asked.append("score")
        return [torch.full((r.num_tokens,), -float(i)) for i, r in enumerate(rollouts)]

    def teacher_states(self, rollouts: Sequence[Rollout]) -> list[TeacherStates]:
        self.asked.append("states")
        head = LmHead(torch.zeros(5, 4), None)
        return [TeacherStates(torch.full((r.num_tokens, 4), float(i)), head) for i, r in enumerate(rollouts)]


def samples(assignment: Assignment = NATIVE, teacher: Teacher | None = None, **sections: Any) -> list[TrainSample]:
    config = build_config(
        {
            "branches": [{"name": name, "data": {"domain": "text"}} for name in "ab"],
            "rollout": {"max_new_tokens": 12, "max_prompt_tokens": 3},
            **sections,
        }
    )
    rollouts = [rollout(*values) for values in ROLLOUTS]
    rollouts = [replace(r, finish_reason="length") if r.num_tokens == 12 else r for r in rollouts]
    builder = SampleBuilder(config, {"a": Teacher(), "b": teacher or Teacher()})  # type: ignore[arg-type]
    return builder.samples(assignment, rollouts, builder.pools({assignment: rollouts})[assignment.term])[0]


def weights(found: Sequence[TrainSample]) -> dict[int, float]:
    """Token weight by number of tokens, which differs between the rollouts."""
    return {s.rollout.num_tokens: s.token_weight for s in found}


#: All seven responses have 40 tokens, the five of groups with variance 28.
NATIVE_WEIGHTS = {
    ("sequence_mean", "keep"): {n: 0.5 / (7 * n) for n in (2, 6, 3, 12)},
    ("sequence_mean", "drop"): {n: 0.5 / (5 * n) for n in (2, 6, 3, 12)},
    ("token_mean", "keep"): dict.fromkeys((2, 6, 3, 12), 0.5 / 40),
    ("token_mean", "drop"): dict.fromkeys((2, 6, 3, 12), 0.5 / 28),
    ("constant", "keep"): dict.fromkeys((2, 6, 3, 12), 0.5 / (7 * 12)),
    ("constant", "drop"): dict.fromkeys((2, 6, 3, 12), 0.5 / (5 * 12)),
}


@pytest.mark.parametrize(("aggregation", "zero_variance"), NATIVE_WEIGHTS)
def test_weights_of_grpo_rows(aggregation, zero_variance):
    found = samples(objective={"loss_aggregation": aggregation, "zero_variance": zero_variance})
    assert weights(found) == pytest.approx(NATIVE_WEIGHTS[aggregation, zero_variance])


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("sequence_mean", {n: 0.5 / (7 * n) for n in (2, 6, 4, 8, 3, 5, 12)}),
        ("token_mean", dict.fromkeys((2, 6, 4, 8, 3, 5, 12), 0.5 / 40)),
        ("constant", dict.fromkeys((2, 6, 4, 8, 3, 5, 12), 0.5 / (7 * 12))),
    ],
)
def test_weights_of_distilled_rows_do_not_know_of_variance(aggregation, expected):
    found = samples(CROSS, objective={"loss_aggregation": aggregation, "zero_variance": "drop"})
    assert weights(found) == pytest.approx(expected)


#: Mixed RLVR's one term: of 3 prompts of a all groups above, of 1 of b one group of its own, with 20 tokens.
POOLED = {Assignment("m", "a", 3, weight=0.75): ROLLOUTS, Assignment("m", "b", 1, weight=0.25): [(1, 3, 1), (0, 3, 19)]}


def pooled_weights(lost: int | None = None, **objective: Any) -> dict[int, float]:
    """Of both sources; ``lost``: a response of so many tokens never came back."""
    config = build_config(
        {
            "branches": [{"name": name, "data": {"domain": "text"}} for name in "ab"],
            "rollout": {"max_new_tokens": 20, "max_prompt_tokens": 3},
            "objective": objective,
        }
    )
    builder = SampleBuilder(config, {})
    drawn = {a: [rollout(*values) for values in rows if values[2] != lost] for a, rows in POOLED.items()}
    pools = builder.pools(drawn)
    assert list(pools) == ["grpo"]
    return weights([s for a, rollouts in drawn.items() for s in builder.samples(a, rollouts, pools["grpo"])[0]])


#: 9 responses of 60 tokens, 7 of groups with variance of 48.
TRAINED = (2, 6, 3, 12, 1, 19)


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ({}, {n: 1 / (9 * n) for n in TRAINED}),
        ({"zero_variance": "drop"}, {n: 1 / (7 * n) for n in TRAINED}),
        ({"loss_aggregation": "token_mean"}, dict.fromkeys(TRAINED, 1 / 60)),
        ({"loss_aggregation": "token_mean", "zero_variance": "drop"}, dict.fromkeys(TRAINED, 1 / 48)),
        ({"loss_aggregation": "constant"}, dict.fromkeys(TRAINED, 1 / (9 * 20))),
    ],
)
def test_assignments_of_one_term_have_one_denominator(objective, expected):
    """Each by its own source's would weigh a source's token the more, the shorter its responses are."""
    assert pooled_weights(**objective) == pytest.approx(expected)


def test_a_lost_response_leaves_all_others_of_the_term_equal():
    assert pooled_weights(lost=4) == pytest.approx({n: 1 / (8 * n) for n in TRAINED})


def test_pooled_sources_weigh_as_each_alone_where_nothing_differs():
    """sequence_mean over equal groups: a source's share of the responses is its share of the prompts."""
    config = build_config({"branches": [{"name": name, "data": {"domain": "text"}} for name in "ab"]})
    builder = SampleBuilder(config, {})
    drawn = {
        Assignment("m", "a", 2, weight=2 / 3): [
            rollout(r, g, n) for r, g, n in [(1, 0, 2), (0, 0, 3), (1, 1, 4), (0, 1, 5)]
        ],
        Assignment("m", "b", 1, weight=1 / 3): [rollout(1, 2, 6), rollout(0, 2, 7)],
    }
    pool = builder.pools(drawn)["grpo"]
    for assignment, rollouts in drawn.items():
        alone = builder.pools({assignment: rollouts})["grpo"]
        one, other = (weights(builder.samples(assignment, rollouts, p)[0]) for p in (pool, alone))
        assert one == pytest.approx(other, rel=1e-15)


def test_cut_responses_count_with_what_is_left_and_masked_ones_with_all():
    cut = samples(
        CROSS, objective={"loss_aggregation": "token_mean"}, optim={"max_length": 10, "too_long": "truncate_response"}
    )
    # Seven tokens are left of those of 8 and 12.
    assert sum(s.token_weight * s.rollout.num_tokens for s in cut) == pytest.approx(0.5)
    assert [s.token_weight for s in cut] == pytest.approx([0.5 / 34] * 7)
    masked = samples(CROSS, objective={"loss_aggregation": "token_mean", "mask_truncated": True})
    assert 12 not in weights(masked)
    assert [s.token_weight for s in masked] == pytest.approx([0.5 / 40] * 6)


@pytest.mark.parametrize(("zero_variance", "forwarded"), [("keep", (2, 6, 4, 8, 3, 5, 12)), ("drop", (2, 6, 3, 5, 12))])
def test_a_kl_to_the_reference_needs_responses_without_advantage_too(zero_variance, forwarded):
    found = samples(objective={"zero_variance": zero_variance, "kl": {"weight": 0.1}})
    assert tuple(weights(found)) == forwarded
    # Without it they are counted but not forwarded: 5 stands at its group's mean.
    assert tuple(weights(samples(objective={"zero_variance": zero_variance}))) == (2, 6, 3, 12)


@pytest.mark.parametrize("signal", ["sampled", "sampled_cv", "full", "forward", "jsd"])
def test_what_a_signal_asks_of_the_teacher(signal):
    teacher = Teacher()
    found = samples(CROSS, teacher, distillation={"signal": signal})
    assert teacher.asked == ["score" if signal == "sampled" else "states"]
    for number, sample in enumerate(found):
        assert (sample.is_distilled, sample.beta, sample.term) == (True, 0.7, "opd:b")
        if signal == "sampled":
            assert sample.teacher is None
            assert sample.teacher_logp_N.unique().tolist() == [-number]
        else:
            assert sample.teacher_logp_N is None
            assert sample.teacher.hidden_ND.unique().tolist() == [number]
