"""Prompt encoders: chat template, tokens and media through transformers' own processors, without torchvision."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.video_utils import VideoMetadata

from copd_engine.models.base import PromptEncoder
from copd_engine.types import EncodedPrompt, Example, UserError

IMAGE_MARKER, VIDEO_MARKER = "<image>", "<video>"


class VideoProcessorTorch(Qwen3VLVideoProcessor):
    """Qwen3-VL's video processor with the three steps that call torchvision written in torch."""

    def convert_to_rgb(self, video: torch.Tensor) -> torch.Tensor:
        """``[frames, channels, height, width]``; grey becomes three equal channels."""
        return video.expand(-1, 3, -1, -1) if video.shape[-3] == 1 else video

    def resize(
        self,
        videos: torch.Tensor,
        size: Any,
        resample: Any,
        factor: int,
        temporal_factor: int,
        cap_pixels_per_frame: bool | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """``[batch, frames, channels, height, width]`` to the size the parent class would choose."""
        from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize

        frames, (height, width) = videos.shape[1], videos.shape[-2:]
        new_height, new_width = smart_resize(
            num_frames=frames,
            height=height,
            width=width,
            temporal_factor=temporal_factor,
            factor=factor,
            min_pixels=size.shortest_edge,
            max_pixels=size.longest_edge,
        )
        if (new_height, new_width) == (height, width):
            return videos
        flat = videos.flatten(0, 1).float()
        flat = nn.functional.interpolate(flat, (new_height, new_width), mode="bicubic", antialias=True).clamp(0, 255)
        return flat.round().to(videos.dtype).unflatten(0, videos.shape[:2])

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


class _Processor(Qwen3VLProcessor):
    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        """The parent accepts torchvision's classes alone."""
        return type(argument)


class Qwen3VLPromptEncoder(PromptEncoder):
    """Qwen3-VL's chat template and processors; images by PIL, videos as decoded frames."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        image_processor: Qwen2VLImageProcessorPil,
        video_processor: VideoProcessorTorch,
        module: Qwen3VLForConditionalGeneration,
    ) -> None:
        self.tokenizer = tokenizer
        if tokenizer.chat_template is None:
            raise UserError("the tokenizer has no chat template (chat_template.jinja or tokenizer_config.json)")
        self.processor = _Processor(image_processor, tokenizer, video_processor, chat_template=tokenizer.chat_template)
        config = module.config
        self._rope_index = module.model.get_rope_index
        self.end_token_id = tokenizer.eos_token_id
        self.visual_token_ids = (config.image_token_id, config.video_token_id)
        self.spatial_merge_size = config.vision_config.spatial_merge_size
        special = {*self.visual_token_ids, config.vision_start_token_id, config.vision_end_token_id}
        self.suppressed_token_ids = tuple(sorted((special | {tokenizer.pad_token_id}) - {self.end_token_id, None}))

    @classmethod
    def from_folder(cls, folder: Path, module: Qwen3VLForConditionalGeneration) -> Qwen3VLPromptEncoder:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
        # The video settings stand in a file of their own; without it the class's defaults hold.
        settings = folder / "video_preprocessor_config.json"
        video = json.loads(settings.read_text()) if settings.is_file() else {}
        video_processor = VideoProcessorTorch(**{k: v for k, v in video.items() if not k.endswith("_type")})
        return cls(tokenizer, image_processor, video_processor, module)

    def encode(self, example: Example) -> EncodedPrompt:
        for token in self.tokenizer.convert_ids_to_tokens(self.visual_token_ids):
            if token in example.prompt:
                raise UserError(
                    f"prompt {example.uid!r} contains {token}, which the model would take for pixels: "
                    f"write {IMAGE_MARKER} or {VIDEO_MARKER} for a file"
                )
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": _content(example)}], tokenize=False, add_generation_prompt=True
        )
        try:
            inputs = self.processor(
                text=[text],
                images=list(example.images) or None,
                videos=[torch.from_numpy(video).permute(0, 3, 1, 2) for video in example.videos] or None,
                video_metadata=[_metadata(video, example.fps) for video in example.videos] or None,
                do_sample_frames=False,
                cap_pixels_per_frame=False,
                return_tensors="pt",
            )
        except ValueError as error:  # a video of one frame, an image 200 times as long as wide
            raise UserError(f"prompt {example.uid!r} cannot be encoded: {error}") from None
        position_ids_31T, delta = self._rope_index(
            inputs["input_ids"],
            mm_token_type_ids=inputs["mm_token_type_ids"],
            image_grid_thw=inputs.get("image_grid_thw"),
            video_grid_thw=inputs.get("video_grid_thw"),
        )
        return EncodedPrompt(
            example=example,
            input_ids_T=inputs["input_ids"][0],
            position_ids_3T=position_ids_31T[:, 0],
            next_position=inputs["input_ids"].shape[1] + int(delta),
            pixel_values=inputs.get("pixel_values"),
            image_grid_thw=inputs.get("image_grid_thw"),
            pixel_values_videos=inputs.get("pixel_values_videos"),
            video_grid_thw=inputs.get("video_grid_thw"),
        )

    def decode(self, token_ids: Sequence[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)

    def save(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)
        self.processor.image_processor.save_pretrained(folder)
        video = self.processor.video_processor.to_dict()
        (folder / "video_preprocessor_config.json").write_text(json.dumps(video, indent=2, sort_keys=True) + "\n")


def _content(example: Example) -> list[dict[str, str]]:
    """The prompt's parts for the chat template: markers become media, missing markers stand in front."""
    missing = [
        marker * max(0, len(media) - example.prompt.count(marker))
        for marker, media in ((IMAGE_MARKER, example.images), (VIDEO_MARKER, example.videos))
    ]
    text = "".join(missing) + example.prompt
    for marker, media in ((IMAGE_MARKER, example.images), (VIDEO_MARKER, example.videos)):
        if text.count(marker) != len(media):
            raise UserError(
                f"prompt {example.uid!r} has {text.count(marker)} {marker} markers for {len(media)} file(s)"
            )
    parts: list[dict[str, str]] = []
    while text:
        at, marker = min((text.find(m), m) if m in text else (len(text), "") for m in (IMAGE_MARKER, VIDEO_MARKER))
        if at:
            parts.append({"type": "text", "text": text[:at]})
        if marker:
            parts.append({"type": marker.strip("<>")})
        text = text[at + len(marker) :]
    return parts


def _metadata(video: Any, fps: float) -> VideoMetadata:
    frames = len(video)
    return VideoMetadata(total_num_frames=frames, fps=fps, frames_indices=list(range(frames)), duration=frames / fps)
