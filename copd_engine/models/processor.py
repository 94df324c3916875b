"""Prompts with images and videos: chat template, tokens, pixels and positions, without torchvision and without weights.

Tokens and pixels come from transformers' own processors. The image processor has a PIL form there; the video
processors call torchvision in three places, which are written in torch here. Positions come from the model's own
``get_rope_index``, which is arithmetic over the config.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    Qwen2_5_VLModel,
    Qwen3VLModel,
)
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.video_utils import VideoMetadata

from copd_engine.config import MediaConfig
from copd_engine.media import Video, open_image, open_video
from copd_engine.models.base import PromptEncoder
from copd_engine.models.folder import find_folder, read_config
from copd_engine.models.smollm2 import find_gguf, smollm2_folder
from copd_engine.models.text_prompts import TextPromptEncoder, check_tokenizer, render
from copd_engine.models.video_processor import Qwen2VLVideoProcessorTorch, VideoProcessorTorch, resize_frame
from copd_engine.types import EncodedPrompt, Example, UserError

IMAGE_MARKER, VIDEO_MARKER = "<image>", "<video>"


class _Qwen3VLProcessor(Qwen3VLProcessor):
    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        """The parent accepts torchvision's classes alone."""
        return type(argument)


class _Qwen25VLProcessor(Qwen2_5_VLProcessor):
    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        """The parent accepts torchvision's classes alone."""
        return type(argument)


class _Qwen3VLPositions(Qwen3VLModel):
    def __init__(self, config: PreTrainedConfig) -> None:
        """No weights: ``get_rope_index`` reads the config alone."""
        nn.Module.__init__(self)
        self.config = config


class _Qwen25VLPositions(Qwen2_5_VLModel):
    def __init__(self, config: PreTrainedConfig) -> None:
        """No weights: ``get_rope_index`` reads the config alone."""
        nn.Module.__init__(self)
        self.config = config


class VisionPromptEncoder(PromptEncoder):
    """Chat template and processors of a vision-language model of Qwen's.

    ``config`` is the model's (its weights are not needed), ``media`` the limits on images and videos. UserError for a
    tokenizer without chat template or end token, a template without a generation prompt, or token ids that the
    embedding has no row for.
    """

    processor_class: type
    video_processor_class: type[VideoProcessorTorch]
    positions_class: type

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: Qwen2VLImageProcessorPil,
        video_processor: VideoProcessorTorch,
        config: PreTrainedConfig,
        media: MediaConfig | None = None,
    ) -> None:
        check_tokenizer(tokenizer, tokenizer.eos_token_id, config.get_text_config().vocab_size)
        self.tokenizer = tokenizer
        self.media = media or MediaConfig()
        self.processor = self.processor_class(
            image_processor, tokenizer, video_processor, chat_template=tokenizer.chat_template
        )
        self._rope_index = self.positions_class(config).get_rope_index
        self._image_size = _image_size(image_processor, self.media)
        self.end_token_id = tokenizer.eos_token_id
        self.visual_token_ids = (config.image_token_id, config.video_token_id)
        self.spatial_merge_size = config.vision_config.spatial_merge_size
        special = {*self.visual_token_ids, config.vision_start_token_id, config.vision_end_token_id}
        self.suppressed_token_ids = tuple(sorted((special | {tokenizer.pad_token_id}) - {self.end_token_id, None}))

    @classmethod
    def from_folder(
        cls, folder: Path, config: PreTrainedConfig, media: MediaConfig | None = None
    ) -> VisionPromptEncoder:
        """From a folder in Hugging Face format. The settings of videos stand in a file of their own, in the processor's
        or in that of images (Qwen2.5-VL); without any, the class's defaults hold."""
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
        settings, _ = cls.video_processor_class.get_video_processor_dict(folder, local_files_only=True)
        known = cls.video_processor_class.valid_kwargs.__annotations__
        video_processor = cls.video_processor_class(
            **{key: value for key, value in settings.items() if key in known or key in ("min_pixels", "max_pixels")}
        )
        return cls(_tokenizer(folder), image_processor, video_processor, config, media)

    @abstractmethod
    def _metadata(self, video: Video) -> VideoMetadata:
        """Times of the frames as the model's processor reads them."""

    def _chat_text(self, text: str) -> str:
        return text

    def encode(self, example: Example) -> EncodedPrompt:
        turns = self._turns(example)
        text = self._chat_text(render(self.tokenizer, turns, example))
        if not example.images and not example.videos:
            return _text_prompt(example, self.tokenizer(text, return_tensors="pt")["input_ids"][0])
        images = [open_image(image, f"{_where(example)}: images") for image in example.images]
        try:
            videos = [self._video(video, example) for video in example.videos]
            inputs = self.processor(
                text=[text],
                images=images or None,
                videos=[torch.from_numpy(video.frames).permute(0, 3, 1, 2) for video in videos] or None,
                images_kwargs={"size": self._image_size},
                videos_kwargs={
                    "video_metadata": [self._metadata(video) for video in videos] or None,
                    "do_sample_frames": False,
                    "do_resize": False,  # done as they were decoded
                    "cap_pixels_per_frame": False,
                },
                return_tensors="pt",
            )
        except UserError:
            raise
        except ValueError as error:  # a video of one frame, an image 200 times as long as wide
            raise UserError(f"{example.name} cannot be encoded: {error}") from None
        timing = {key: inputs[key] for key in ("second_per_grid_ts",) if key in inputs}
        position_ids_31T, delta = self._rope_index(
            inputs["input_ids"],
            mm_token_type_ids=inputs["mm_token_type_ids"],
            image_grid_thw=inputs.get("image_grid_thw"),
            video_grid_thw=inputs.get("video_grid_thw"),
            **timing,
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
            video_timestamps=tuple(self._patch_times(video) for video in videos),
        )

    def _turns(self, example: Example) -> list[dict[str, Any]]:
        """The conversation for the chat template, media as parts; UserError where markers and files do not fit."""
        turns = [dict(turn) for turn in example.turns]
        for token in self.tokenizer.convert_ids_to_tokens(self.visual_token_ids):
            if any(token in turn["content"] for turn in turns):
                raise UserError(
                    f"{example.name} contains {token}, which the model would take for pixels: "
                    f"write {IMAGE_MARKER} or {VIDEO_MARKER} for a file"
                )
        front = ""
        for marker, media in ((IMAGE_MARKER, example.images), (VIDEO_MARKER, example.videos)):
            count = sum(turn["content"].count(marker) for turn in turns)
            if count == 0:
                front += marker * len(media)
            elif count != len(media):
                raise UserError(f"{example.name} has {count} {marker} markers for {len(media)} file(s)")
        turns[-1]["content"] = front + turns[-1]["content"]
        return [turn | {"content": _parts(turn["content"])} for turn in turns]

    def _video(self, video: Any, example: Example) -> Video:
        processor = self.processor.video_processor

        def resize(frame: np.ndarray, num_frames: int) -> np.ndarray:
            size = processor.frame_size(num_frames, frame.shape[0], frame.shape[1], self.media.video_max_pixels)
            return resize_frame(frame, size)

        return open_video(video, example.fps, self.media, f"{_where(example)}: videos", resize)

    def _patch_times(self, video: Video) -> tuple[float, ...]:
        """The middle of each temporal patch's frames in seconds; the last frame fills up the last patch."""
        step = self.processor.video_processor.temporal_patch_size
        times = [*video.times, *[video.times[-1]] * (-len(video.times) % step)]
        return tuple((times[i] + times[i + step - 1]) / 2 for i in range(0, len(times), step))

    def decode(self, token_ids: Sequence[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)

    def save(self, folder: Path) -> None:
        """The model's own files, without this run's limits on media."""
        self.tokenizer.save_pretrained(folder)
        self.processor.image_processor.save_pretrained(folder)
        video = self.processor.video_processor.to_dict()
        (folder / "video_preprocessor_config.json").write_text(json.dumps(video, indent=2, sort_keys=True) + "\n")


class Qwen3VLPromptEncoder(VisionPromptEncoder):
    """Qwen3-VL, dense and mixture of experts: the time of every temporal patch stands in the text."""

    processor_class = _Qwen3VLProcessor
    video_processor_class = VideoProcessorTorch
    positions_class = _Qwen3VLPositions

    def _metadata(self, video: Video) -> VideoMetadata:
        # The processor divides numbers of frames by fps: seconds at one frame a second are the true times.
        times = list(video.times)
        return VideoMetadata(total_num_frames=len(times), fps=1.0, frames_indices=times)

    def _chat_text(self, text: str) -> str:
        """The hub's template wraps a video in vision tokens, and the processor wraps each of its frames again.

        Training and the model's reference code replace the outer pair, too; transformers 5 keeps it.
        """
        start, video, end = (
            self.processor.vision_start_token,
            self.processor.video_token,
            self.processor.vision_end_token,
        )
        return text.replace(f"{start}{video}{end}", video)


class Qwen2_5_VLPromptEncoder(VisionPromptEncoder):  # noqa: N801 (transformers' own spelling)
    """Qwen2.5-VL: time stands in the temporal positions (``second_per_grid_ts``), ``tokens_per_second`` apart."""

    processor_class = _Qwen25VLProcessor
    video_processor_class = Qwen2VLVideoProcessorTorch
    positions_class = _Qwen25VLPositions

    def _metadata(self, video: Video) -> VideoMetadata:
        count = len(video.times)
        return VideoMetadata(total_num_frames=count, fps=video.fps, frames_indices=list(range(count)))


#: By ``model_type`` of config.json.
VISION_ENCODERS: dict[str, type[VisionPromptEncoder]] = {
    "qwen3_vl": Qwen3VLPromptEncoder,
    "qwen3_vl_moe": Qwen3VLPromptEncoder,
    "qwen2_5_vl": Qwen2_5_VLPromptEncoder,
}


def folder_encoder(folder: Path, config: PreTrainedConfig, media: MediaConfig | None = None) -> PromptEncoder:
    """The prompt encoder of a folder in Hugging Face format whose model has this ``config``. OSError, ValueError or
    UserError for a folder without tokenizer or processor files, or with files that do not fit."""
    if config.model_type in VISION_ENCODERS:
        return VISION_ENCODERS[config.model_type].from_folder(folder, config, media)
    tokenizer = _tokenizer(folder)
    return TextPromptEncoder(tokenizer, tokenizer.eos_token_id, config.get_text_config().vocab_size)


def load_encoder(path: str, media: MediaConfig | None = None) -> PromptEncoder:
    """The prompt encoder of ``model.path``; its weights are neither read nor fetched.

    UserError for a model that cannot be read.
    """
    folder = smollm2_folder() if path == "smollm2" else find_folder(path, with_weights=False)
    try:
        if list(folder.glob("*.gguf")):
            file = find_gguf(folder)
            tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
            return TextPromptEncoder(tokenizer, tokenizer.eos_token_id)
        read_config(folder, path)
        return folder_encoder(folder, AutoConfig.from_pretrained(folder), media)
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"model.path = {path!r}: the processor cannot be read: {error}") from error


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    template = folder / "chat_template.json"  # where processors kept it before transformers 5
    if tokenizer.chat_template is None and template.is_file():
        tokenizer.chat_template = json.loads(template.read_text(encoding="utf-8"))["chat_template"]
    return tokenizer


def _text_prompt(example: Example, input_ids_T: torch.Tensor) -> EncodedPrompt:
    """What the processor and ``get_rope_index`` give for text alone, in a third of the time."""
    num_tokens = len(input_ids_T)
    return EncodedPrompt(
        example=example,
        input_ids_T=input_ids_T,
        position_ids_3T=torch.arange(num_tokens).repeat(3, 1),
        next_position=num_tokens,
    )


def _where(example: Example) -> str:
    return example.where or f"prompt {example.uid!r}"


def _image_size(processor: Qwen2VLImageProcessorPil, media: MediaConfig) -> dict[str, int]:
    """The processor's limits in pixels, lowered or raised by ``media``."""
    smallest = media.image_min_pixels or processor.size.shortest_edge
    largest = media.image_max_pixels or max(processor.size.longest_edge, smallest)
    if media.image_min_pixels is not None and smallest > largest:
        raise UserError(f"media.image_min_pixels = {smallest}: must be at most image_max_pixels = {largest}")
    return {"shortest_edge": min(smallest, largest), "longest_edge": largest}


def _parts(text: str) -> str | list[dict[str, str]]:
    """A turn's content for the chat template; text without markers as it is."""
    parts: list[dict[str, str]] = []
    rest = text
    while rest:
        at, marker = min((rest.find(m), m) if m in rest else (len(rest), "") for m in (IMAGE_MARKER, VIDEO_MARKER))
        if at:
            parts.append({"type": "text", "text": rest[:at]})
        if marker:
            parts.append({"type": marker.strip("<>")})
        rest = rest[at + len(marker) :]
    return text if all(part["type"] == "text" for part in parts) else parts
