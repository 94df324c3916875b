"""Qwen3-VL, dense and mixture of experts, through transformers' own modules."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLMoeForConditionalGeneration

from copd_engine.models.processor import Qwen3VLPromptEncoder, VideoProcessorTorch
from copd_engine.models.vision import VisionPolicy
from copd_engine.types import PackedBatch

__all__ = ["Qwen3VLPolicy", "Qwen3VLPromptEncoder", "VideoProcessorTorch"]


class Qwen3VLPolicy(VisionPolicy):
    """A ``Qwen3VLForConditionalGeneration`` or ``Qwen3VLMoeForConditionalGeneration`` over packed rows.

    Features of several depths of the vision tower enter the first decoder layers (DeepStack, arXiv 2406.04334).
    """

    module: Qwen3VLForConditionalGeneration | Qwen3VLMoeForConditionalGeneration

    def _decoder_inputs(self, batch: PackedBatch, visual_rows_M: torch.Tensor, features: Any) -> dict[str, Any]:
        is_visual_1T = torch.zeros(1, batch.num_tokens, dtype=torch.bool, device=visual_rows_M.device)
        is_visual_1T[0, visual_rows_M] = True
        return {"visual_pos_masks": is_visual_1T, "deepstack_visual_embeds": features.deepstack_features}

    def _outputs(self, features: Any) -> list[torch.Tensor]:
        return [features.pooler_output, *features.deepstack_features]
