"""Which samples share a packed row, and which rank computes it: a token budget per row, equal work per rank.

The smallest part that moves is a unit: a prompt with all its responses where they fit the budget, else with some of
them, and the prompt counted again in each part. Units go to ranks by cost (multiway number partitioning) and on each
rank into rows by tokens (first-fit decreasing). Within the number of rows that this takes, rows are then made as equal
in cost as their room allows.

Which of equal samples goes where depends on their order; how many tokens and FLOPs each row has does not.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from copd_engine.partition import Partition, RoomTree, first_fit_decreasing, longest_first
from copd_engine.types import EncodedPrompt

#: Rows of least cost that are tried for room before the first one with room is taken.
TRIES = 4


@dataclass(frozen=True)
class CostModel:
    """FLOPs of a forward: ``token`` per packed token (linear layers), ``pair`` per (query, key) pair of attention,
    ``patch`` and ``patch_pair`` likewise for the vision tower, where a patch sees the patches of its image or frame.

    A backward costs twice as much everywhere, so it changes no balance. The output head is left out.
    """

    token: int
    pair: int
    patch: int = 0
    patch_pair: int = 0

    @classmethod
    def of(
        cls,
        hidden_size: int,
        num_layers: int,
        intermediate_size: int | None = None,
        vision_hidden_size: int = 0,
        vision_layers: int = 0,
        attention_size: int | None = None,
        kv_size: int | None = None,
    ) -> CostModel:
        """From the sizes of a transformer with D = ``hidden_size``, I = ``intermediate_size`` (default 8/3 D), A =
        ``attention_size``, heads times their width, and ``kv_size``, the same of the key-value heads (default D).

        Two FLOPs per parameter and token: 2 D (A + kv_size) parameters of attention's projections and 3 D I of a gated
        MLP per layer. Two products of A multiply-adds per pair and layer, Q K^T and P V: 4 A FLOPs. The vision tower
        has the same form with A = D and an MLP of two matrices and width 4 D, which is as many parameters.
        """
        attention_size = attention_size or hidden_size
        projections = 2 * hidden_size * (attention_size + (kv_size or hidden_size))
        mlp = 8 * hidden_size**2 if intermediate_size is None else 3 * hidden_size * intermediate_size
        return cls(
            token=2 * num_layers * (projections + mlp),
            pair=4 * num_layers * attention_size,
            patch=24 * vision_layers * vision_hidden_size**2,
            patch_pair=4 * vision_layers * vision_hidden_size,
        )


#: The form of a 4B model for callers without one (Qwen3-VL-4B: D = 2560, I = 9728, 36 layers, 32 heads of 128, 8 of
#: keys and values; vision 1024, 24 layers).
DEFAULT_COST = CostModel.of(2560, 36, 9728, 1024, 24, 4096, 1024)


@dataclass(frozen=True)
class Workload:
    """What planning needs to know of B samples over P prompts, int64 arrays.

    ``prompt_of_B``; ``prompt_rows_P`` tokens; ``response_rows_B``: rows of each response in a packed row, one less than
    its tokens; ``patches_P`` and ``patch_pairs_P``: vision patches of each prompt, and pairs of patches of one image or
    frame.
    """

    prompt_of_B: np.ndarray
    prompt_rows_P: np.ndarray
    response_rows_B: np.ndarray
    patches_P: np.ndarray
    patch_pairs_P: np.ndarray

    @classmethod
    def of(cls, prompts: Sequence[EncodedPrompt], response_tokens: Sequence[int]) -> Workload:
        """``prompts[b]`` and the number of response tokens of each sample; one object given twice is one prompt."""
        number: dict[int, int] = {}
        unique: list[EncodedPrompt] = []
        for prompt in prompts:
            if id(prompt) not in number:
                number[id(prompt)] = len(unique)
                unique.append(prompt)
        patches = [_patches(prompt) for prompt in unique]
        return cls(
            np.array([number[id(prompt)] for prompt in prompts], dtype=np.int64),
            np.array([prompt.num_tokens for prompt in unique], dtype=np.int64),
            np.maximum(np.array(response_tokens, dtype=np.int64) - 1, 0),
            np.array([num for num, _ in patches], dtype=np.int64),
            np.array([pairs for _, pairs in patches], dtype=np.int64),
        )


def _patches(prompt: EncodedPrompt) -> tuple[int, int]:
    num = pairs = 0
    for grid_thw in (prompt.image_grid_thw, prompt.video_grid_thw):
        if grid_thw is not None:
            for frames, height, width in grid_thw.tolist():
                num += frames * height * width
                pairs += frames * (height * width) ** 2
    return num, pairs


@dataclass(frozen=True)
class MicroBatch:
    """Samples of one packed row, ascending; its tokens and forward FLOPs. An empty one has none of them."""

    indexes: tuple[int, ...] = ()
    num_tokens: int = 0
    flops: int = 0


def plan_micro_batches(
    workload: Workload,
    max_tokens: int,
    cost: CostModel = DEFAULT_COST,
    num_ranks: int = 1,
    partition: Partition = longest_first,
) -> list[list[MicroBatch]]:
    """Rows of at most ``max_tokens`` for each rank, the costliest first; every sample once.

    A sample above the budget has a row of its own. Every rank has the same number of micro-batches, because each of
    them is a round of collectives for all; a rank with fewer units than that has empty ones at its end, for which it
    must run a forward that adds nothing to the gradient. ``partition`` parts units over ranks: differencing makes their
    sums more even than LPT and takes longer, but the rounds, each of which waits for its slowest rank, gain nothing
    (``benchmarks/RESULTS-packing.md``).
    """
    if max_tokens < 1 or num_ranks < 1:
        raise ValueError(f"max_tokens and num_ranks must be at least 1, got {max_tokens} and {num_ranks}")
    units = _units(workload, max_tokens, cost)
    shares = partition([unit.flops for unit in units], num_ranks) if num_ranks > 1 else [list(range(len(units)))]
    parts = [[units[i] for i in share] for share in shares]
    rows = [_by_tokens(part, max_tokens) for part in parts]
    num_rows = max(map(len, rows))
    balanced = [_by_cost(part, num_rows, max_tokens) for part in parts]
    # All ranks in the same way: rounds of one rank's even rows beside another's uneven ones would wait for both.
    if all(part is not None for part in balanced):
        rows = [part for part in balanced if part is not None]
    plan = []
    for chosen in rows:
        batches = [
            MicroBatch(
                tuple(sorted(i for unit in row for i in unit.indexes)),
                sum(unit.num_tokens for unit in row),
                sum(unit.flops for unit in row),
            )
            for row in chosen
        ]
        batches += [MicroBatch()] * (num_rows - len(batches))
        plan.append(sorted(batches, key=lambda batch: (-batch.flops, -batch.num_tokens, batch.indexes)))
    return plan


def split_micro_batches(
    prompts: Sequence[EncodedPrompt],
    response_tokens: Sequence[int],
    max_tokens: int,
    cost: CostModel = DEFAULT_COST,
) -> list[list[int]]:
    """Indexes of the samples of each micro-batch on one rank; no empty ones. See :func:`plan_micro_batches`."""
    (batches,) = plan_micro_batches(Workload.of(prompts, response_tokens), max_tokens, cost)
    return [list(batch.indexes) for batch in batches if batch.indexes]


def _units(workload: Workload, max_tokens: int, cost: CostModel) -> list[MicroBatch]:
    """Prompts with their responses; groups above the budget in parts."""
    if len(workload.prompt_of_B) == 0:
        return []
    rows_B = workload.response_rows_B
    order = np.argsort(workload.prompt_of_B, kind="stable")
    sorted_prompts = workload.prompt_of_B[order]
    starts = np.flatnonzero(np.diff(sorted_prompts, prepend=-1))
    prompts = sorted_prompts[starts]
    prompt_rows = workload.prompt_rows_P[prompts]
    # In Python's integers where sums could pass 2^63: FLOPs of a whole group of long responses.
    prompt_flops = [
        rows * cost.token + rows * (rows + 1) // 2 * cost.pair + patches * cost.patch + pairs * cost.patch_pair
        for rows, patches, pairs in zip(
            prompt_rows.tolist(),
            workload.patches_P[prompts].tolist(),
            workload.patch_pairs_P[prompts].tolist(),
            strict=True,
        )
    ]
    own_rows = rows_B[order]
    own_pairs = own_rows * np.repeat(prompt_rows, np.diff(starts, append=len(order))) + own_rows * (own_rows + 1) // 2
    tokens = (prompt_rows + np.add.reduceat(own_rows, starts)).tolist()
    pairs = np.add.reduceat(own_pairs, starts).tolist()
    bounds = [*starts.tolist(), len(order)]
    indexes = order.tolist()
    units = []
    for g, flops in enumerate(prompt_flops):
        first, last, prompt = bounds[g], bounds[g + 1], int(prompt_rows[g])
        if tokens[g] <= max_tokens:
            own = (tokens[g] - prompt) * cost.token + pairs[g] * cost.pair
            units.append(MicroBatch(tuple(indexes[first:last]), tokens[g], flops + own))
            continue
        sizes, group_pairs = own_rows[first:last].tolist(), own_pairs[first:last].tolist()
        for part in first_fit_decreasing(sizes, max_tokens - prompt):
            num_rows = sum(sizes[i] for i in part)
            own = num_rows * cost.token + sum(group_pairs[i] for i in part) * cost.pair
            units.append(MicroBatch(tuple(indexes[first + i] for i in part), prompt + num_rows, flops + own))
    return units


def _by_tokens(units: Sequence[MicroBatch], max_tokens: int) -> list[list[MicroBatch]]:
    """As few rows as first-fit decreasing finds."""
    # Of equal tokens the costlier first, so that which one is taken does not depend on their order.
    ordered = sorted(units, key=lambda unit: -unit.flops)
    bins = first_fit_decreasing([unit.num_tokens for unit in ordered], max_tokens)
    return [[ordered[i] for i in row] for row in bins]


def _by_cost(units: Sequence[MicroBatch], num_rows: int, max_tokens: int) -> list[list[MicroBatch]] | None:
    """At most ``num_rows`` rows of similar cost: each unit to a row of the least cost that has room. None: no room."""
    rows = [[unit] for unit in units if unit.num_tokens > max_tokens]
    num_open = num_rows - len(rows)
    if num_open <= 0:
        return None
    open_rows: list[list[MicroBatch]] = [[] for _ in range(num_open)]
    flops = [0] * num_open
    tree = RoomTree(num_open, max_tokens)
    heap = [(0, row) for row in range(num_open)]
    for unit in sorted(units, key=lambda unit: (-unit.num_tokens, -unit.flops)):
        if unit.num_tokens > max_tokens:
            continue
        found: int | None = None
        passed: list[tuple[int, int]] = []
        while heap and found is None and len(passed) < TRIES:
            entry = heapq.heappop(heap)
            if entry[0] != flops[entry[1]]:
                continue  # its row has grown since
            passed.append(entry)
            if tree.room(entry[1]) >= unit.num_tokens:
                found = entry[1]
        if found is None:
            found = tree.first_with(unit.num_tokens)
        if found is None:
            return None
        tree.take(found, unit.num_tokens)
        flops[found] += unit.flops
        open_rows[found].append(unit)
        for entry in passed:
            if entry[1] != found:
                heapq.heappush(heap, entry)
        heapq.heappush(heap, (flops[found], found))
    return rows + [row for row in open_rows if row]
