"""What the engine needs of a model: hidden states of packed rows, a decode step, an output head, a tokenizer."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from copd_engine.models.attention import NAME as ATTENTION
from copd_engine.models.attention import DecodeLayout, PackedLayout
from copd_engine.models.cache import DecodeCache, PrefillCache
from copd_engine.types import EncodedPrompt, Example, PackedBatch


class PromptEncoder(ABC):
    """Text and media to token ids and back; shared by all branches."""

    end_token_id: int
    #: ids that must never be sampled: placeholders that the model would take for images, and padding
    suppressed_token_ids: tuple[int, ...]
    #: placeholder ids of image and video tokens
    visual_token_ids: tuple[int, ...] = ()
    spatial_merge_size: int = 1

    @abstractmethod
    def encode(self, example: Example) -> EncodedPrompt:
        """Chat template, tokens, media; UserError for a prompt that cannot be encoded."""

    @abstractmethod
    def decode(self, token_ids: Sequence[int]) -> str:
        """Text without special tokens."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Tokenizer and processor files in Hugging Face format."""


class Policy(ABC):
    """One branch's model. Wraps a transformers model whose attention is replaced by the packed one."""

    def __init__(self, module: PreTrainedModel) -> None:
        self.module = module
        self.module.set_attn_implementation(ATTENTION)
        self.module.eval()  # no dropout: ratios must be exactly 1 on the first update

    @property
    @abstractmethod
    def backbone(self) -> nn.Module:
        """The decoder stack that returns final, normalised hidden states."""

    @abstractmethod
    def _embed(self, batch: PackedBatch) -> tuple[torch.Tensor, dict[str, Any]]:
        """Input embeddings ``[1, T, D]`` of a packed row and further keyword arguments of the backbone."""

    @abstractmethod
    def _backbone_positions(self, position_ids_3BT: torch.Tensor) -> torch.Tensor:
        """Position ids in the form the backbone takes."""

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def lm_head_weight(self) -> torch.Tensor:
        """``[V, D]``, the embedding itself where the head is tied."""
        return self.module.get_output_embeddings().weight

    @property
    def lm_head_bias(self) -> torch.Tensor | None:
        return getattr(self.module.get_output_embeddings(), "bias", None)

    def hidden_states(self, batch: PackedBatch, cache: PrefillCache | None = None) -> torch.Tensor:
        """Hidden states ``[N, D]`` at the rows that predict response tokens (``batch.rows_N``)."""
        inputs_embeds_1TD, extra = self._embed(batch)
        output = self.backbone(
            inputs_embeds=inputs_embeds_1TD,
            position_ids=self._backbone_positions(batch.position_ids_3T[:, None, :]),
            past_key_values=cache,
            use_cache=False,
            layout=PackedLayout.of(batch),
            **extra,
        )
        return output.last_hidden_state[0].index_select(0, batch.rows_N)

    def decode_step(self, token_ids_B: torch.Tensor, position_B: torch.Tensor, cache: DecodeCache) -> torch.Tensor:
        """Hidden states ``[B, D]`` after one more token per sequence; grows the cache by a column."""
        output = self.backbone(
            inputs_embeds=self.module.get_input_embeddings()(token_ids_B[:, None]),
            position_ids=self._backbone_positions(position_B[None, :, None].expand(3, -1, 1)),
            past_key_values=cache,
            use_cache=False,
            layout=DecodeLayout(cache.step_mask),
        )
        cache.advance()
        return output.last_hidden_state[:, 0]

    def clone(self) -> Policy:
        """An independent copy with its own parameters."""
        return type(self)(copy.deepcopy(self.module))

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by their Hugging Face names; a tied head appears once."""
        return dict(self.module.named_parameters())

    def save(self, folder: Path) -> None:
        """Weights and config in Hugging Face format (safetensors)."""
        self.module.save_pretrained(folder)
