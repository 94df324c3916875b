"""Text-only decoder models (Qwen3, Qwen3-MoE, Qwen2, Llama, SmolLM2, Mistral) through transformers' own modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from copd_engine.models.base import Policy
from copd_engine.models.text_prompts import TextPromptEncoder
from copd_engine.types import PackedBatch

__all__ = ["CausalLMPolicy", "TextPromptEncoder"]


class CausalLMPolicy(Policy):
    """An ``AutoModelForCausalLM`` over packed rows."""

    @property
    def backbone(self) -> nn.Module:
        return self.module.base_model

    def _embed(self, batch: PackedBatch) -> tuple[torch.Tensor, dict[str, Any]]:
        return self.module.get_input_embeddings()(batch.input_ids_T)[None], {}

    def _backbone_positions(self, position_ids_3BT: torch.Tensor) -> torch.Tensor:
        return position_ids_3BT[0]
