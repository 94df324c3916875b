"""The packing benchmark's samples and models: lengths of reasoning rollouts, prompts of text, images and videos, and a
forward and backward of the same samples packed and padded."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import (
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from copd_engine.micro_batches import Workload
from copd_engine.models.base import Policy
from copd_engine.models.causal_lm import CausalLMPolicy
from copd_engine.models.qwen3_vl import Qwen3VLPolicy
from copd_engine.packing import pack
from copd_engine.types import EncodedPrompt, Example

KINDS = ("text", "image", "video")
MERGE, PATCH, TEMPORAL = 2, 14, 2
PATCH_DIM = 3 * TEMPORAL * PATCH**2
VISION_START, VISION_END, IMAGE, VIDEO, FIRST_WORD = 1, 2, 3, 4, 8
VOCAB_SIZE = 1024
AT_LIMIT = 0.05


@dataclass(frozen=True)
class Lengths:
    """Response lengths: log-normal with this median and sigma, cut at ``limit``, and 5 % of them at the limit, as where
    a reasoning model runs into ``max_new_tokens``. Text of prompts: log-normal around ``prompt_median``."""

    median: int
    sigma: float
    limit: int
    prompt_median: int = 150

    def responses(self, generator: np.random.Generator, count: int) -> np.ndarray:
        lengths = np.clip(generator.lognormal(np.log(self.median), self.sigma, count), 1, self.limit).astype(np.int64)
        lengths[generator.random(count) < AT_LIMIT] = self.limit
        return lengths

    def texts(self, generator: np.random.Generator, count: int) -> np.ndarray:
        longest = 8 * self.prompt_median
        return np.clip(generator.lognormal(np.log(self.prompt_median), 0.7, count), 4, longest).astype(np.int64)


#: Responses of thousands of tokens, as of a reasoning model at the paper's limit of 16,384 new tokens.
ROLLOUTS = Lengths(median=2500, sigma=0.9, limit=16_384)
#: What a small model on a CPU takes in seconds: the same form at a sixteenth of the limit.
SHORT = Lengths(median=220, sigma=0.9, limit=1024, prompt_median=48)


def media(kind: str, generator: np.random.Generator) -> list[tuple[int, int, int]]:
    """Frames (temporal patches), height and width in tokens of a prompt's image or video."""
    if kind == "text":
        return []
    height, width = generator.integers(8, 25, 2).tolist()
    if kind == "image":
        return [(1, height, width)]
    return [(int(generator.integers(4, 17)), height // 2, width // 2)]


def workload(lengths: Lengths, num_prompts: int, group: int, seed: int = 0) -> Workload:
    """Prompts of text, image and video in turn, ``group`` responses each."""
    generator = np.random.default_rng(seed)
    tokens = lengths.texts(generator, num_prompts)
    patches, pairs = np.zeros_like(tokens), np.zeros_like(tokens)
    for p in range(num_prompts):
        for frames, height, width in media(KINDS[p % 3], generator):
            per_frame = height * width * MERGE**2
            patches[p] += frames * per_frame
            pairs[p] += frames * per_frame**2
            tokens[p] += frames * (height * width + 2)
    responses = lengths.responses(generator, num_prompts * group)
    return Workload(np.repeat(np.arange(num_prompts), group), tokens, responses - 1, patches, pairs)


@dataclass(frozen=True)
class Sample:
    prompt: EncodedPrompt
    response_N: torch.Tensor


@dataclass(frozen=True)
class Model:
    """A small real model, packed (``policy``) and as plain transformers computes it (``plain``), with equal weights."""

    policy: Policy
    plain: PreTrainedModel
    kinds: tuple[str, ...]

    @property
    def has_vision(self) -> bool:
        return len(self.kinds) > 1


def build_model(name: str, hidden: int, layers: int) -> Model:
    """``text``: Qwen3; ``mixed``: Qwen3-VL with a vision tower of half the width. fp32, random weights."""
    text: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 32,
        "num_key_value_heads": max(1, hidden // 64),
        "head_dim": 32,
        "max_position_embeddings": 65_536,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(0)
    if name == "text":
        module: PreTrainedModel = Qwen3ForCausalLM(Qwen3Config(**text))
    else:
        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
        module = Qwen3VLForConditionalGeneration(
            Qwen3VLConfig(
                text_config={**text, "rope_parameters": rope},
                vision_config={
                    "depth": 4,
                    "hidden_size": hidden // 2,
                    "intermediate_size": 2 * hidden,
                    "num_heads": max(1, hidden // 64),
                    "patch_size": PATCH,
                    "spatial_merge_size": MERGE,
                    "temporal_patch_size": TEMPORAL,
                    "out_hidden_size": hidden,
                    "num_position_embeddings": 256,
                    "deepstack_visual_indexes": [1, 2],
                },
                image_token_id=IMAGE,
                video_token_id=VIDEO,
                vision_start_token_id=VISION_START,
                vision_end_token_id=VISION_END,
                tie_word_embeddings=True,
            )
        )
    plain = copy.deepcopy(module.float()).eval()
    plain.set_attn_implementation("sdpa")
    policy = CausalLMPolicy(module) if name == "text" else Qwen3VLPolicy(module)
    return Model(policy, plain, KINDS if name == "mixed" else ("text",))


def samples(model: Model, lengths: Lengths, num_prompts: int, group: int, seed: int) -> list[Sample]:
    """``num_prompts * group`` samples; a group shares its prompt."""
    generator = np.random.default_rng(seed)
    found = []
    for p, num_text in enumerate(lengths.texts(generator, num_prompts).tolist()):
        prompt = _prompt(model, media(model.kinds[p % len(model.kinds)], generator), num_text, generator)
        found += [
            Sample(prompt, torch.from_numpy(generator.integers(FIRST_WORD, VOCAB_SIZE, length)))
            for length in lengths.responses(generator, group).tolist()
        ]
    return found


def _prompt(
    model: Model, blocks: list[tuple[int, int, int]], num_text: int, generator: np.random.Generator
) -> EncodedPrompt:
    ids: list[int] = []
    pixels: dict[str, Any] = {}
    for frames, height, width in blocks:
        is_video = frames > 1
        for _ in range(frames):
            ids += [VISION_START, *[VIDEO if is_video else IMAGE] * (height * width), VISION_END]
        values = torch.from_numpy(generator.standard_normal((frames * height * width * MERGE**2, PATCH_DIM))).float()
        grid_thw = torch.tensor([[frames, height * MERGE, width * MERGE]])
        names = ("pixel_values_videos", "video_grid_thw") if is_video else ("pixel_values", "image_grid_thw")
        pixels |= dict(zip(names, (values, grid_thw), strict=True))
    input_ids_T = torch.tensor([*ids, *generator.integers(FIRST_WORD, VOCAB_SIZE, num_text).tolist()])
    position_ids_3T, next_position = torch.arange(len(input_ids_T)).expand(3, -1), len(input_ids_T)
    if model.has_vision:
        position_ids_31T, delta = model.plain.model.get_rope_index(
            input_ids_T[None],
            mm_token_type_ids=_kinds(input_ids_T[None]),
            image_grid_thw=pixels.get("image_grid_thw"),
            video_grid_thw=pixels.get("video_grid_thw"),
        )
        position_ids_3T, next_position = position_ids_31T[:, 0], len(input_ids_T) + int(delta)
    example = Example("bench", "bench", "", "exact")
    return EncodedPrompt(example, input_ids_T, position_ids_3T, next_position, **pixels)


def _kinds(ids: torch.Tensor) -> torch.Tensor:
    """0 text, 1 image, 2 video."""
    return (ids == IMAGE).int() + 2 * (ids == VIDEO).int()


def with_own_prompts(rows: Sequence[Sample]) -> list[Sample]:
    """Every sample behind a copy of its prompt, which packing cannot share."""
    return [Sample(copy.copy(row.prompt), row.response_N) for row in rows]


def padded_efficiency(rows: Sequence[Sample]) -> float:
    """Tokens of the samples over those of one batch padded to the longest."""
    lengths = [row.prompt.num_tokens + len(row.response_N) for row in rows]
    return sum(lengths) / (len(lengths) * max(lengths))


def packed_step(model: Model, rows: Sequence[Sample]) -> Callable[[], float]:
    """One forward and backward of all samples in a packed row; returns the loss. Packing is part of the step."""

    def step() -> float:
        batch = pack([row.prompt for row in rows], [row.response_N for row in rows], (IMAGE, VIDEO), MERGE)
        return _backward(model.policy.hidden_states(batch), model.policy.module)

    return step


def padded_step(model: Model, rows: Sequence[Sample]) -> Callable[[], float]:
    """The same by plain transformers: one batch, padded on the right, with an attention mask."""

    def step() -> float:
        sequences = [torch.cat([row.prompt.input_ids_T, row.response_N]) for row in rows]
        ids_BL = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
        lengths_B1 = torch.tensor([[len(ids)] for ids in sequences])
        columns_L = torch.arange(ids_BL.shape[1])
        inputs = {"input_ids": ids_BL, "attention_mask": (columns_L < lengths_B1).long(), "use_cache": False}
        if model.has_vision:
            inputs["mm_token_type_ids"] = _kinds(ids_BL)
            for name in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"):
                values = [getattr(row.prompt, name) for row in rows if getattr(row.prompt, name) is not None]
                inputs[name] = torch.cat(values) if values else None
        # The rows that predict a response token, as the packed step takes them.
        prompts_B1 = torch.tensor([[row.prompt.num_tokens] for row in rows])
        predicts_BL = (columns_L >= prompts_B1 - 1) & (columns_L < lengths_B1 - 1)
        return _backward(model.plain.model(**inputs).last_hidden_state[predicts_BL], model.plain)

    return step


def _backward(hidden_ND: torch.Tensor, module: torch.nn.Module) -> float:
    """A loss whose gradient is that of any other to the eye of the clock: it reaches every row that predicts."""
    loss = (hidden_ND * torch.linspace(-1, 1, hidden_ND.shape[1])).square().mean()
    loss.backward()
    module.zero_grad(set_to_none=True)
    return float(loss.detach())
