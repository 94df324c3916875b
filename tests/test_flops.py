"""What training takes, against sums over tokens and pairs by hand."""

from __future__ import annotations

from itertools import starmap
from pathlib import Path

import pytest
import torch

from copd_engine.evaluate import Accuracy
from copd_engine.flops import Work, WorkMeter
from copd_engine.micro_batches import CostModel
from copd_engine.result import result_row, work_of
from copd_engine.types import EncodedPrompt, Rollout, RolloutRequest
from tests.families import FAMILIES, build
from tests.helpers import prompts_of_all_domains, tiny_model

SIZES = {"hidden_size": 4, "num_layers": 3, "intermediate_size": 8, "vision_hidden_size": 2, "vision_layers": 5}
VOCAB = 10
# Per token two FLOPs for 4 D^2 + 3 D I parameters in each layer; 4 D per pair and layer; head 2 D V.
TOKEN, PAIR, HEAD = 3 * 2 * (4 * 16 + 3 * 4 * 8), 3 * 4 * 4, 2 * 4 * VOCAB
PATCH, PATCH_PAIR = 5 * 24 * 4, 5 * 4 * 2


@pytest.fixture(scope="module")
def prompts() -> list[EncodedPrompt]:
    return prompts_of_all_domains(tiny_model()[1], 1)


def rollout(prompt: EncodedPrompt, group: int, num_tokens: int) -> Rollout:
    ids = torch.zeros(num_tokens, dtype=torch.int64)
    return Rollout(RolloutRequest(prompt, 0, group), ids, torch.zeros(num_tokens), "stop", 0)


def forward(prompt: EncodedPrompt, responses: list[int]) -> int:
    """Token by token: the prompt once, each response on it; the last token of a response is not fed back."""
    length, flops = prompt.num_tokens, 0
    rows = [position + 1 for position in range(length)]
    for num_tokens in responses:
        rows += [length + position + 1 for position in range(num_tokens - 1)]
        flops += num_tokens * HEAD
    flops += sum(TOKEN + seen * PAIR for seen in rows)
    for grid in (prompt.image_grid_thw, prompt.video_grid_thw):
        for frames, height, width in grid.tolist() if grid is not None else ():
            patches = height * width
            flops += frames * patches * (PATCH + patches * PATCH_PAIR)
    return flops


def test_every_token_and_pair_is_counted_once(prompts: list[EncodedPrompt]) -> None:
    lengths = [[5, 1, 3], [2, 2], [7]]
    rollouts = [rollout(p, group, n) for group, (p, own) in enumerate(zip(prompts, lengths, strict=True)) for n in own]
    flops = sum(starmap(forward, zip(prompts, lengths, strict=True)))
    meter = WorkMeter(SIZES, VOCAB)
    num_prompt, num_response = sum(p.num_tokens for p in prompts), 20
    assert meter.sampled(rollouts) == Work(num_prompt, num_response, flops=flops)
    assert meter.scored(rollouts) == Work(scored_tokens=num_prompt + num_response, flops=flops)
    assert meter.trained(rollouts) == Work(trained_tokens=num_prompt + num_response, flops=3 * flops)


def test_a_frozen_vision_tower_has_no_backward(prompts: list[EncodedPrompt]) -> None:
    rollouts = [rollout(p, group, 3) for group, p in enumerate(prompts)]
    blind = {key: size for key, size in SIZES.items() if not key.startswith("vision")}
    frozen, whole, decoder = (
        WorkMeter(SIZES, VOCAB, freeze_vision=True),
        WorkMeter(SIZES, VOCAB),
        WorkMeter(blind, VOCAB),
    )
    vision = whole.scored(rollouts).flops - decoder.scored(rollouts).flops
    assert vision > 0
    assert frozen.trained(rollouts).flops == 3 * decoder.scored(rollouts).flops + vision
    assert whole.trained(rollouts).flops == 3 * (decoder.scored(rollouts).flops + vision)
    assert frozen.sampled(rollouts) == whole.sampled(rollouts)
    assert frozen.scored(rollouts) == whole.scored(rollouts)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_costs_two_flops_per_parameter_that_multiplies_it(family: str) -> None:
    """Of the decoder's linear layers; of a mixture's experts those that are chosen, the router left out."""
    policy = build(family)
    config = policy.module.config.get_text_config()
    active = 0.0
    for name, parameter in policy.module.named_parameters():
        if ".layers." not in name or "visual" in name or parameter.dim() < 2 or "mlp.gate." in name:
            continue
        chosen = config.num_experts_per_tok / config.num_experts if "experts" in name else 1
        active += chosen * parameter.numel()
    assert CostModel.of(**policy.sizes).token == 2 * active


def test_a_pair_costs_two_products_of_all_heads() -> None:
    """Heads whose widths do not add up to the hidden size."""
    cost = CostModel.of(**SIZES, attention_size=12, kv_size=6)
    assert cost.pair == 3 * 4 * 12
    assert cost.token == 3 * 2 * (2 * 4 * 12 + 2 * 4 * 6 + 3 * 4 * 8)


def test_nothing_costs_nothing() -> None:
    meter = WorkMeter(SIZES, VOCAB)
    assert meter.sampled([]) == meter.scored([]) == meter.trained([]) == Work()


def test_work_adds_up_and_travels_in_a_row(prompts: list[EncodedPrompt], tmp_path: Path) -> None:
    meter = WorkMeter(SIZES, VOCAB)
    parts = [meter.sampled([rollout(prompts[0], 0, 4)]), meter.trained([rollout(prompts[1], 0, 2)])]
    total = parts[0] + parts[1]
    assert total.flops == parts[0].flops + parts[1].flops
    assert (total.generated_tokens, total.trained_tokens) == (4, prompts[1].num_tokens + 2)
    assert total - parts[0] == parts[1]

    row = result_row("m", "expert", {"text": Accuracy(0.5, 0.1, 4)}, 12, steps=3, work=total)
    assert work_of(row) == total
    assert (row["steps"], row["rollouts"], row["train_flops"]) == (3, 12, total.flops)
