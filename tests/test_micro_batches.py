"""Micro-batches: every sample once, within the budget, equal work per rank, and costs that no order changes."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from copd_engine import micro_batches
from copd_engine.micro_batches import CostModel, MicroBatch, Workload, plan_micro_batches, split_micro_batches
from copd_engine.packing import pack
from copd_engine.partition import karmarkar_karp, longest_first
from copd_engine.types import EncodedPrompt, Example

COST = CostModel.of(hidden_size=8, num_layers=2)
# Per prompt its tokens, its responses' tokens, and its images' (height, width) in patches.
GROUPS = st.lists(
    st.tuples(
        st.integers(1, 30),
        st.lists(st.integers(1, 40), min_size=1, max_size=6),
        st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), max_size=2),
    ),
    min_size=1,
    max_size=12,
)


def prompt_of(length: int, images: list[tuple[int, int]] | None = None, frames: int = 1) -> EncodedPrompt:
    grid_thw = torch.tensor([[frames, 2 * height, 2 * width] for height, width in images]) if images else None
    return EncodedPrompt(
        Example("p", "p", "a", "exact"),
        torch.zeros(length, dtype=torch.int64),
        torch.arange(length).expand(3, -1),
        length,
        image_grid_thw=grid_thw,
    )


def samples_of(groups) -> tuple[list[EncodedPrompt], list[int]]:
    prompts, responses = [], []
    for length, lengths, images in groups:
        prompts += [prompt_of(length, images)] * len(lengths)
        responses += lengths
    return prompts, responses


def flops_by_hand(prompts: list[EncodedPrompt], responses: list[int], indexes: tuple[int, ...], cost: CostModel) -> int:
    """Token by token: what it multiplies and what it looks at."""
    total = 0
    for prompt in {id(prompts[i]): prompts[i] for i in indexes}.values():
        total += sum(cost.token + cost.pair * (position + 1) for position in range(prompt.num_tokens))
        for frames, height, width in [] if prompt.image_grid_thw is None else prompt.image_grid_thw.tolist():
            total += frames * height * width * (cost.patch + cost.patch_pair * height * width)
    for i in indexes:
        first = prompts[i].num_tokens
        total += sum(cost.token + cost.pair * (first + position + 1) for position in range(responses[i] - 1))
    return total


def tokens_by_hand(prompts: list[EncodedPrompt], responses: list[int], indexes: tuple[int, ...]) -> int:
    shared = {id(prompts[i]): prompts[i].num_tokens for i in indexes}
    return sum(shared.values()) + sum(responses[i] - 1 for i in indexes)


@given(GROUPS, st.integers(1, 200), st.integers(1, 5), st.sampled_from([longest_first, karmarkar_karp]))
def test_every_sample_once_within_the_budget_on_every_rank(groups, budget, num_ranks, partition):
    cost = replace(COST, patch=1000, patch_pair=7)
    prompts, responses = samples_of(groups)
    plan = plan_micro_batches(Workload.of(prompts, responses), budget, cost, num_ranks, partition)
    assert len(plan) == num_ranks
    assert len({len(batches) for batches in plan}) == 1
    batches = [batch for rank in plan for batch in rank]
    assert sorted(i for batch in batches for i in batch.indexes) == list(range(len(prompts)))
    for batch in batches:
        assert batch.indexes == tuple(sorted(batch.indexes))
        assert batch.num_tokens == tokens_by_hand(prompts, responses, batch.indexes)
        assert batch.flops == flops_by_hand(prompts, responses, batch.indexes, cost)
        assert batch.num_tokens <= budget or len(batch.indexes) == 1
        if batch.indexes:
            row = pack([prompts[i] for i in batch.indexes], [torch.zeros(responses[i]).long() for i in batch.indexes])
            assert row.num_tokens == batch.num_tokens
    for rank in plan:
        assert [batch.flops for batch in rank] == sorted((batch.flops for batch in rank), reverse=True)


@given(GROUPS, st.integers(1, 200), st.integers(1, 4), st.randoms(use_true_random=False))
def test_the_order_of_samples_changes_no_rows_cost(groups, budget, num_ranks, order):
    cost = replace(COST, patch=1000, patch_pair=7)
    prompts, responses = samples_of(groups)
    pairs = list(zip(prompts, responses, strict=True))
    order.shuffle(pairs)
    shuffled = [prompt for prompt, _ in pairs], [response for _, response in pairs]

    def costs(prompts, responses):
        plan = plan_micro_batches(Workload.of(prompts, responses), budget, cost, num_ranks)
        return sorted([(batch.num_tokens, batch.flops) for batch in rank] for rank in plan)

    assert costs(*shuffled) == costs(prompts, responses)
    again = plan_micro_batches(Workload.of(*shuffled), budget, cost, num_ranks)
    assert again == plan_micro_batches(Workload.of(*shuffled), budget, cost, num_ranks)


@given(GROUPS, st.integers(1, 200))
def test_a_group_stays_together_where_it_fits(groups, budget):
    prompts, responses = samples_of(groups)
    for batches in [split_micro_batches(prompts, responses, budget, COST)]:
        where = {i: number for number, batch in enumerate(batches) for i in batch}
        first = 0
        for length, lengths, _ in groups:
            rows = {where[i] for i in range(first, first + len(lengths))}
            fits = length + sum(n - 1 for n in lengths) <= budget
            assert not fits or len(rows) == 1
            first += len(lengths)


def test_a_group_above_the_budget_is_split_with_its_prompt_in_each_part():
    prompts, responses = samples_of([(10, [6, 6, 6, 11, 1], [])])
    (batches,) = plan_micro_batches(Workload.of(prompts, responses), 20, COST)
    # Room of 10 beside the prompt: 10 rows, 5 + 5, 5 + 0.
    assert sorted(batch.num_tokens for batch in batches) == [15, 20, 20]
    assert sum(batch.num_tokens for batch in batches) == 3 * 10 + 5 + 5 + 5 + 10 + 0


def test_a_sample_above_the_budget_has_a_row_of_its_own():
    prompts, responses = samples_of([(10, [50, 3], []), (5, [2], [])])
    batches = split_micro_batches(prompts, responses, 20, COST)
    assert sorted(batches) == [[0], [1, 2]]


def test_ranks_without_work_have_empty_micro_batches():
    prompts, responses = samples_of([(10, [5], [])])
    plan = plan_micro_batches(Workload.of(prompts, responses), 100, COST, num_ranks=3)
    assert sorted(len(rank[0].indexes) for rank in plan) == [0, 0, 1]
    assert [rank for rank in plan if not rank[0].indexes] == [[MicroBatch()]] * 2
    nothing = Workload(*(np.zeros(0, dtype=np.int64) for _ in range(5)))
    assert plan_micro_batches(nothing, 100, COST, num_ranks=2) == [[], []]
    assert split_micro_batches([], [], 100) == []


def log_normal(num_prompts: int, group: int, limit: int = 4096, seed: int = 0) -> Workload:
    generator = np.random.default_rng(seed)
    lengths = np.minimum(generator.lognormal(6.5, 0.9, num_prompts * group).astype(np.int64) + 1, limit)
    lengths[generator.random(len(lengths)) < 0.05] = limit
    zeros = np.zeros(num_prompts, dtype=np.int64)
    prompt_rows = np.minimum(generator.lognormal(5, 0.5, num_prompts).astype(np.int64) + 1, 1024)
    return Workload(np.repeat(np.arange(num_prompts), group), prompt_rows, lengths - 1, zeros, zeros)


@pytest.mark.parametrize("num_ranks", [2, 8])
def test_ranks_and_rows_do_equal_work(num_ranks):
    plan = plan_micro_batches(log_normal(256, 8), 32_768, num_ranks=num_ranks)
    total = sum(batch.flops for rank in plan for batch in rank)
    per_rank = [sum(batch.flops for batch in rank) for rank in plan]
    assert max(per_rank) < total / num_ranks * 1.001
    # What collectives wait for: in each round the slowest rank.
    rounds = [max(rank[k].flops for rank in plan) for k in range(len(plan[0]))]
    assert sum(rounds) < total / num_ranks * 1.1


def test_rows_are_balanced_by_cost_where_the_budget_leaves_room(monkeypatch):
    workload = log_normal(40, 1)
    cost = CostModel(token=1, pair=1)  # attention alone: the order by tokens is far from the order by cost

    def spread(plan):
        flops = [batch.flops for batch in plan[0]]
        return max(flops) / (sum(flops) / len(flops))

    balanced = plan_micro_batches(workload, 16_384, cost)
    monkeypatch.setattr(micro_batches, "_by_cost", lambda *_: None)
    by_tokens = plan_micro_batches(workload, 16_384, cost)
    assert len(balanced[0]) == len(by_tokens[0])
    assert spread(balanced) < 1.25 < spread(by_tokens)


def test_of_equal_tokens_the_costlier_are_placed_first():
    """Rows of 20 for images (costly) and texts of 10 tokens each: an image and a text in both, in whatever order."""
    cost = CostModel(token=1, pair=0, patch=100)
    for kinds in itertools.permutations(["image", "image", "text", "text"]):
        prompts = [prompt_of(10, [(1, 1)] if kind == "image" else None) for kind in kinds]
        (batches,) = plan_micro_batches(Workload.of(prompts, [1] * 4), 20, cost)
        assert [batch.flops for batch in batches] == [420, 420]


def test_the_budget_holds_where_cost_would_rather_not():
    """One image costs more than three texts: all of them beside one another would be 30 tokens."""
    prompts = [prompt_of(10, [(9, 9)]), *(prompt_of(10) for _ in range(3))]
    batches = split_micro_batches(prompts, [1] * 4, 20, CostModel(token=1, pair=0, patch=100))
    assert sorted(map(len, batches)) == [2, 2]


def test_the_cost_of_images_and_long_prompts_counts():
    """Equal tokens: the rank with the image, or with the long sequence, gets fewer of the others."""
    cost = CostModel.of(64, 4, vision_hidden_size=64, vision_layers=4)
    prompts = [prompt_of(20, [(16, 16)]), *(prompt_of(20) for _ in range(7))]
    plan = plan_micro_batches(Workload.of(prompts, [5] * 8), 1000, cost, num_ranks=2)
    with_image = next(rank for rank in plan if 0 in rank[0].indexes)
    assert [len(batch.indexes) for batch in with_image] == [1]
    prompts = [prompt_of(2000), *(prompt_of(100) for _ in range(20))]
    attention_bound = CostModel(token=1, pair=1)
    plan = plan_micro_batches(Workload.of(prompts, [1] * 21), 5000, attention_bound, num_ranks=2)
    assert sorted(sum(len(batch.indexes) for batch in rank) for rank in plan) == [1, 20]


def test_flops_of_a_model_by_hand():
    """One layer of width 4 with an MLP of 10: 2 * (4 * 16 + 3 * 40) per token; Q K^T and P V of 4 each per pair."""
    cost = CostModel.of(4, 1, 10, vision_hidden_size=2, vision_layers=3)
    assert cost.token == 2 * (64 + 120)
    assert cost.pair == 2 * 4 + 2 * 4
    assert cost.patch == 3 * 2 * (4 * 4 + 2 * 2 * 8)  # two matrices of 2 x 8
    assert cost.patch_pair == 3 * (2 * 2 + 2 * 2)
    assert CostModel.of(3, 1).token == CostModel.of(3, 1, 8).token


def test_videos_cost_their_frames():
    workload = Workload.of([prompt_of(3, [(2, 1)], frames=5), prompt_of(4)], [1, 2])
    assert workload.patches_P.tolist() == [5 * 4 * 2, 0]
    assert workload.patch_pairs_P.tolist() == [5 * 8 * 8, 0]
    assert workload.response_rows_B.tolist() == [0, 1]


@pytest.mark.parametrize(("max_tokens", "num_ranks"), [(0, 1), (10, 0)])
def test_bad_arguments(max_tokens, num_ranks):
    prompts, responses = samples_of([(10, [5], [])])
    with pytest.raises(ValueError, match="must be at least 1"):
        plan_micro_batches(Workload.of(prompts, responses), max_tokens, COST, num_ranks)
