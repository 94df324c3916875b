"""Qwen's video processors without torchvision: the three steps that call it are written in torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as frame_smart_resize
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as video_smart_resize


class VideoProcessorTorch(Qwen3VLVideoProcessor):
    """Qwen3-VL's video processor with the steps that call torchvision written in torch.

    Frames arrive in the size of :meth:`frame_size`: a long video is never held at full size.
    """

    #: What the files of a model name it, for tools that have torchvision.
    hub_class = "Qwen3VLVideoProcessor"

    def frame_size(self, num_frames: int, height: int, width: int, max_pixels: int | None) -> tuple[int, int]:
        """Height and width that the model takes of each frame; ``max_pixels`` lowers the limit on frames x height x
        width. ValueError for a video of one frame or 200 times as long as wide."""
        largest = min(self.size.longest_edge, max_pixels or self.size.longest_edge)
        size: tuple[int, int] = video_smart_resize(
            num_frames=num_frames,
            height=height,
            width=width,
            temporal_factor=self.temporal_patch_size,
            factor=self.patch_size * self.merge_size,
            min_pixels=min(self.size.shortest_edge, largest),
            max_pixels=largest,
        )
        return size

    def convert_to_rgb(self, video: torch.Tensor) -> torch.Tensor:
        """``[frames, channels, height, width]``; grey becomes three equal channels."""
        return video.expand(-1, 3, -1, -1) if video.shape[-3] == 1 else video

    def rescale_and_normalize(
        self,
        images: torch.Tensor,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: Any,
        image_std: Any,
    ) -> torch.Tensor:
        images = images.float()
        if do_rescale:
            images = images * rescale_factor
        if do_normalize:
            mean, std = (torch.tensor(x, dtype=torch.float32).view(-1, 1, 1) for x in (image_mean, image_std))
            images = (images - mean) / std
        return images

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"video_processor_type": self.hub_class}


class Qwen2VLVideoProcessorTorch(VideoProcessorTorch):
    """Qwen2.5-VL's video processor: its limits count the pixels of one frame, not of the whole video.

    transformers' ``Qwen2VLVideoProcessor`` cuts patches in the same way but cannot be imported without torchvision.
    """

    hub_class = "Qwen2VLVideoProcessor"
    size: Any = {"shortest_edge": 128 * 28 * 28, "longest_edge": 28 * 28 * 768}  # noqa: RUF012 (as transformers has it)
    image_mean = Qwen2VLImageProcessorPil.image_mean
    image_std = Qwen2VLImageProcessorPil.image_std
    patch_size = 14

    def __init__(self, **kwargs: Any) -> None:
        # Files of Qwen2.5-VL give the size as two numbers.
        size = dict(kwargs.pop("size", None) or self.size)
        smallest, largest = kwargs.pop("min_pixels", None), kwargs.pop("max_pixels", None)
        size["shortest_edge"] = smallest or size.pop("min_pixels", None) or size["shortest_edge"]
        size["longest_edge"] = largest or size.pop("max_pixels", None) or size["longest_edge"]
        super().__init__(size=size, **kwargs)

    def frame_size(self, num_frames: int, height: int, width: int, max_pixels: int | None) -> tuple[int, int]:
        if num_frames < self.temporal_patch_size:
            raise ValueError(f"a video needs {self.temporal_patch_size} frames, it has {num_frames}")
        largest = min(self.size.longest_edge, (max_pixels or self.size.longest_edge * num_frames) // num_frames)
        size: tuple[int, int] = frame_smart_resize(
            height,
            width,
            factor=self.patch_size * self.merge_size,
            min_pixels=min(self.size.shortest_edge, largest),
            max_pixels=largest,
        )
        return size


def resize_frame(frame_HWC: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bicubic with antialiasing, rounded to uint8, as torchvision resizes frames."""
    if frame_HWC.shape[:2] == size:
        return frame_HWC
    pixels = torch.from_numpy(frame_HWC).permute(2, 0, 1)[None].float()
    resized = nn.functional.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 255).round()
    return resized[0].permute(1, 2, 0).to(torch.uint8).numpy()
