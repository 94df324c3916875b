"""Tiny models of every supported family with random weights, and prompts of every modality for them.

Prompts are built by hand, from random tokens and random pixels: what is tested with them is the model, not a processor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from copd_engine.models.base import Policy
from copd_engine.models.causal_lm import CausalLMPolicy
from copd_engine.models.qwen2_5_vl import Qwen2_5_VLPolicy
from copd_engine.models.qwen3_vl import Qwen3VLPolicy
from copd_engine.types import EncodedPrompt, Example

VOCAB, PATCH, MERGE, TEMPORAL = 384, 4, 2, 2
VISION_START, VISION_END, IMAGE, VIDEO = 3, 4, 5, 6
FIRST_WORD = 7  # ids from here on are text
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
TOWER: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": PATCH,
    "spatial_merge_size": MERGE,
    "temporal_patch_size": TEMPORAL,
    "out_hidden_size": 32,
    "initializer_range": 0.2,
}
SPECIAL = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}


def _qwen3_vl(tied: bool, moe: bool = False) -> PreTrainedModel:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    text = {**SIZES, "head_dim": 16, "rope_parameters": rope, "tie_word_embeddings": tied} | (EXPERTS if moe else {})
    tower = {**TOWER, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    config_class = Qwen3VLMoeConfig if moe else Qwen3VLConfig
    model_class = Qwen3VLMoeForConditionalGeneration if moe else Qwen3VLForConditionalGeneration
    return model_class(config_class(text_config=text, vision_config=tower, tie_word_embeddings=tied, **SPECIAL))


def _qwen2_5_vl(tied: bool) -> PreTrainedModel:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    text = {**SIZES, "rope_parameters": rope, "tie_word_embeddings": tied}
    # Windows of 2 x 2 tokens; the second layer sees whole frames.
    tower = {**TOWER, "window_size": 2 * MERGE * PATCH, "fullatt_block_indexes": [1], "tokens_per_second": 2}
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=tower, tie_word_embeddings=tied, **SPECIAL)
    )


def _text(model_class: Any, config_class: Any, **settings: Any) -> Callable[[bool], PreTrainedModel]:
    return lambda tied: model_class(config_class(**SIZES, tie_word_embeddings=tied, **settings))


BUILDERS: dict[str, tuple[Callable[[bool], PreTrainedModel], type[Policy]]] = {
    "qwen3_vl": (_qwen3_vl, Qwen3VLPolicy),
    "qwen3_vl_moe": (lambda tied: _qwen3_vl(tied, moe=True), Qwen3VLPolicy),
    "qwen2_5_vl": (_qwen2_5_vl, Qwen2_5_VLPolicy),
    "qwen3": (_text(Qwen3ForCausalLM, Qwen3Config, head_dim=16), CausalLMPolicy),
    "qwen3_moe": (_text(Qwen3MoeForCausalLM, Qwen3MoeConfig, head_dim=16, **EXPERTS), CausalLMPolicy),
    "qwen2": (_text(Qwen2ForCausalLM, Qwen2Config), CausalLMPolicy),
    "llama": (_text(LlamaForCausalLM, LlamaConfig, head_dim=16), CausalLMPolicy),
    "mistral": (_text(MistralForCausalLM, MistralConfig, head_dim=16, sliding_window=None), CausalLMPolicy),
}
FAMILIES = tuple(BUILDERS)
VISION_FAMILIES = tuple(name for name in FAMILIES if "_vl" in name)


def build(family: str, tied: bool = False, seed: int = 0) -> Policy:
    """A policy of three decoder layers, fp32, random weights. Biases and norms are moved off 0 and 1 too."""
    builder, policy_class = BUILDERS[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = builder(tied)
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.ndim == 1:
                    parameter += 0.1 * torch.randn_like(parameter)
    return policy_class(module)


def make_prompt(
    policy: Policy,
    seed: int,
    images: tuple[tuple[int, int], ...] = (),
    videos: tuple[tuple[int, int, int], ...] = (),
    num_words: int = 5,
) -> EncodedPrompt:
    """Words, then the images, words, the videos, and words.

    ``images``: height and width in tokens; ``videos``: temporal patches, height and width, half a second per frame.
    """
    generator = torch.Generator().manual_seed(seed)

    def words(count: int) -> list[int]:
        return torch.randint(FIRST_WORD, VOCAB, (count,), generator=generator).tolist()

    frame_blocks = policy.module.config.model_type != "qwen2_5_vl"  # one block of tokens per frame pair, or per video
    ids = words(num_words)
    for height, width in images:
        ids += [VISION_START, *[IMAGE] * (height * width), VISION_END, *words(1)]
    for time, height, width in videos:
        blocks = [height * width] * time if frame_blocks else [time * height * width]
        for block in blocks:
            ids += [*words(1), VISION_START, *[VIDEO] * block, VISION_END]
    ids += words(2)
    input_ids_T = torch.tensor(ids)
    image_grid = [(1, MERGE * height, MERGE * width) for height, width in images]
    video_grid = [(time, MERGE * height, MERGE * width) for time, height, width in videos]
    timestamps = tuple(tuple(float(t) for t in range(time)) for time, _, _ in videos)

    def pixels(grids: list[tuple[int, int, int]]) -> torch.Tensor | None:
        rows = sum(t * h * w for t, h, w in grids)
        return torch.randn(rows, 3 * TEMPORAL * PATCH**2, generator=generator) if rows else None

    position_ids_3T, next_position = torch.arange(len(ids)).expand(3, -1), len(ids)
    if images or videos:
        # Each sample alone, by transformers' own function.
        seconds = {} if frame_blocks else {"second_per_grid_ts": torch.ones(len(videos))}
        position_ids_31T, delta = policy.module.model.get_rope_index(
            input_ids_T[None],
            mm_token_type_ids=((input_ids_T == IMAGE).int() + 2 * (input_ids_T == VIDEO).int())[None],
            image_grid_thw=torch.tensor(image_grid) if image_grid else None,
            video_grid_thw=torch.tensor(video_grid) if video_grid else None,
            **seconds,
        )
        position_ids_3T, next_position = position_ids_31T[:, 0], len(ids) + int(delta)
    return EncodedPrompt(
        example=Example(f"prompt-{seed}", "", "", "exact"),
        input_ids_T=input_ids_T,
        position_ids_3T=position_ids_3T,
        next_position=next_position,
        pixel_values=pixels(image_grid),
        image_grid_thw=torch.tensor(image_grid) if image_grid else None,
        pixel_values_videos=pixels(video_grid),
        video_grid_thw=torch.tensor(video_grid) if video_grid else None,
        video_timestamps=timestamps,
    )


def prompts_of(policy: Policy) -> list[EncodedPrompt]:
    """Text, one image, two images of different sizes, a video, text; five texts for a text-only model."""
    if policy.visual is None:
        return [make_prompt(policy, seed, num_words=3 + seed) for seed in range(5)]
    return [
        make_prompt(policy, 0),
        make_prompt(policy, 1, images=((2, 3),)),
        make_prompt(policy, 2, images=((1, 1), (3, 2))),
        make_prompt(policy, 3, videos=((3, 2, 3),)),
        make_prompt(policy, 4, num_words=9),
    ]


def response(seed: int, num_tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(FIRST_WORD, VOCAB, (num_tokens,), generator=generator)
