"""Qwen3-VL through transformers' own modules: packed rows, vision features once per prompt."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Qwen3VLForConditionalGeneration

from copd_engine.models.base import Policy
from copd_engine.models.processor import Qwen3VLPromptEncoder, VideoProcessorTorch
from copd_engine.types import PackedBatch

__all__ = ["Qwen3VLPolicy", "Qwen3VLPromptEncoder", "VideoProcessorTorch"]


class Qwen3VLPolicy(Policy):
    """A ``Qwen3VLForConditionalGeneration`` over packed rows."""

    module: Qwen3VLForConditionalGeneration

    @property
    def backbone(self) -> nn.Module:
        return self.module.model.language_model

    def _embed(self, batch: PackedBatch) -> tuple[torch.Tensor, dict[str, Any]]:
        embeds_TD = self.module.get_input_embeddings()(batch.input_ids_T)
        if batch.pixel_values is None or batch.visual_rows_M is None:
            return embeds_TD[None], {}
        visual = self.module.model.visual
        # Images and videos in one call: the tower packs by grid and cannot tell them apart.
        features = visual(batch.pixel_values.to(visual.dtype), grid_thw=batch.grid_thw, return_dict=True)
        rows_M = batch.visual_rows_M
        embeds_TD = embeds_TD.index_copy(0, rows_M, features.pooler_output.to(embeds_TD.dtype))
        is_visual_1T = torch.zeros(1, batch.num_tokens, dtype=torch.bool, device=embeds_TD.device)
        is_visual_1T[0, rows_M] = True
        return embeds_TD[None], {
            "visual_pos_masks": is_visual_1T,
            "deepstack_visual_embeds": features.deepstack_features,
        }

    def _backbone_positions(self, position_ids_3BT: torch.Tensor) -> torch.Tensor:
        return position_ids_3BT
