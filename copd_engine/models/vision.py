"""What the adapters of vision-language models share: the vision tower runs once over all images and videos of a row."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from copd_engine.models.attention import VISION_FLASH_NAME
from copd_engine.models.base import Policy
from copd_engine.models.flash import Backend
from copd_engine.models.vision_attention import NAME as VISION_NAME
from copd_engine.types import PackedBatch


class VisionPolicy(Policy):
    """A model of Qwen's vision-language families over packed rows.

    ``dummy_vision``: on a row without images or videos the tower runs on a blank image of one token, and 0 times its
    output enters the embeddings. Sharded training needs it: ranks that skip the tower would not join the collectives of
    those that run it. None: in a distributed run of more than one process.
    """

    dummy_vision: bool | None = None

    @property
    def visual(self) -> PreTrainedModel:
        return self.module.model.visual

    @property
    def backbone(self) -> nn.Module:
        return self.module.model.language_model

    def _attention_names(self, attention: Backend) -> dict[str, str]:
        names = super()._attention_names(attention)
        vision = VISION_FLASH_NAME if attention == "flash" else VISION_NAME
        return names | {"text_config": names[""], "vision_config": vision}

    def _embed(self, batch: PackedBatch) -> tuple[torch.Tensor, dict[str, Any]]:
        embeds_TD = self.module.get_input_embeddings()(batch.input_ids_T)
        if batch.pixel_values is None or batch.grid_thw is None or batch.visual_rows_M is None:
            if self._runs_dummy():
                embeds_TD = embeds_TD + self._dummy(embeds_TD)
            return embeds_TD[None], {}
        # Images and videos in one call: the tower packs by grid and cannot tell them apart.
        features = self._features(batch.pixel_values, batch.grid_thw)
        embeds_TD = embeds_TD.index_copy(0, batch.visual_rows_M, features.pooler_output.to(embeds_TD.dtype))
        return embeds_TD[None], self._decoder_inputs(batch, batch.visual_rows_M, features)

    def _features(self, pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> Any:
        return self.visual(pixel_values.to(self.visual.dtype), grid_thw=grid_thw, return_dict=True)

    def _decoder_inputs(self, batch: PackedBatch, visual_rows_M: torch.Tensor, features: Any) -> dict[str, Any]:
        """What else the decoder takes of the tower's ``features``."""
        return {}

    def _outputs(self, features: Any) -> list[torch.Tensor]:
        """All outputs of the tower that reach the loss."""
        return [features.pooler_output]

    def _runs_dummy(self) -> bool:
        if self.dummy_vision is not None:
            return self.dummy_vision
        distributed = torch.distributed
        return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1

    def _dummy(self, embeds_TD: torch.Tensor) -> torch.Tensor:
        """0, with a gradient path to every parameter of the tower."""
        config = self.module.config.vision_config
        merge = config.spatial_merge_size
        patch_dim = config.in_channels * config.temporal_patch_size * config.patch_size**2
        blank = torch.zeros(merge**2, patch_dim, device=embeds_TD.device)
        features = self._features(blank, torch.tensor([[1, merge, merge]], device=embeds_TD.device))
        total = torch.stack([output.sum() for output in self._outputs(features)]).sum()
        return (0.0 * total).to(embeds_TD.dtype)

    def _backbone_positions(self, position_ids_3BT: torch.Tensor) -> torch.Tensor:
        return position_ids_3BT
