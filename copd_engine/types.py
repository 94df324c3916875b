"""The nouns of one training step, and the legend of tensor dimensions.

Dimension suffixes used across the project::

    P prompts   G rollouts per prompt (group)   B sequences   T packed tokens
    N response tokens (rows of the loss)   D hidden size   V vocabulary   K top-k

A rollout travels as: :class:`Example` (a row of data) -> :class:`EncodedPrompt` (token ids already
expanded for images and videos) -> :class:`Rollout` (what the policy answered) -> packed rows (``packing.py``).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import torch
    from PIL import Image


class UserError(ValueError):
    """A mistake in the user's input: config, data, checkpoint or command line.

    The message says what was wrong, where, and what would be right. The CLI prints it in one line
    and exits with code 2; no traceback.
    """


def suggest(word: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the nearest known word; a list of all where none is near and they are few."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    if near:
        return f" (did you mean {near[0]!r}?)"
    return f" (known: {', '.join(names)})" if len(names) <= 20 else ""


@dataclass(frozen=True)
class Clip:
    """The part of a video file from ``start`` to ``end``, in seconds from its first frame."""

    path: Path
    start: float
    end: float


if TYPE_CHECKING:
    ImageInput = Image.Image | Path | bytes
    VideoInput = np.ndarray | Path | Clip | tuple[ImageInput, ...]


@dataclass(frozen=True)
class Example:
    """One prompt with its verifiable answer.

    ``prompt`` is the last user turn without chat template; ``messages``, where the data gives a whole conversation, are
    its turns ``{"role": ..., "content": text}``, of which that is the last. Each image of ``images`` stands for one
    ``<image>`` marker of the turns, in order; videos likewise with ``<video>``. Media without markers stand in front of
    the prompt.

    An image is a PIL image, a path or an encoded file's bytes. A video is uint8 ``[frames, height, width, 3]`` at
    ``fps``, a path, a part of a video file, or a tuple of images as frames at ``fps``. Paths and bytes are decoded when
    the prompt is encoded and not kept. ``where`` says where the row stands (``data.jsonl:7``), for error lines.
    """

    uid: str
    prompt: str
    answer: str
    verifier: str
    images: tuple[ImageInput, ...] = ()
    videos: tuple[VideoInput, ...] = ()
    fps: float = 2.0
    metadata: dict[str, Any] = field(default_factory=dict)
    messages: tuple[dict[str, str], ...] = ()
    where: str = ""

    @property
    def turns(self) -> tuple[dict[str, str], ...]:
        """The conversation as the chat template takes it."""
        return self.messages or ({"role": "user", "content": self.prompt},)

    @property
    def name(self) -> str:
        """How an error line calls it: the uid, and its file and line where known."""
        return f"prompt {self.uid!r}" + (f" ({self.where})" if self.where and self.where != self.uid else "")


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as the model sees it, computed once and shared by its group of rollouts.

    ``input_ids_T`` int64, media placeholders already expanded; ``position_ids_3T`` int64, the M-RoPE rows
    (three equal rows for text-only models); ``next_position`` is the position of the first response token.
    ``pixel_values`` fp32 ``[patches, patch_dim]`` and ``image_grid_thw`` int64 ``[images, 3]``, or None; videos
    likewise. ``video_timestamps``: per video the time of each temporal patch in seconds.
    """

    example: Example
    input_ids_T: torch.Tensor
    position_ids_3T: torch.Tensor
    next_position: int
    pixel_values: torch.Tensor | None = None
    image_grid_thw: torch.Tensor | None = None
    pixel_values_videos: torch.Tensor | None = None
    video_grid_thw: torch.Tensor | None = None
    video_timestamps: tuple[tuple[float, ...], ...] = ()

    @property
    def num_tokens(self) -> int:
        return int(self.input_ids_T.shape[0])


@dataclass(frozen=True)
class RolloutRequest:
    """One response to sample: the prompt, and a seed of its own that fixes its random stream."""

    prompt: EncodedPrompt
    seed: int
    group: int


@dataclass(frozen=True)
class Rollout:
    """One sampled response.

    ``response_ids_N`` int64 holds the end token when the model emitted one (``finish_reason == "stop"``),
    none when the length limit cut it (``"length"``). ``sampler_logp_N`` fp32: log-prob of each sampled token under
    the sampling policy at the sampling temperature. ``weight_version`` is the policy's version while sampling, the
    oldest one where it changed; ``version_spans`` then says ``(version, start, end)`` of each span of tokens, and is
    empty where one version sampled all.
    """

    request: RolloutRequest
    response_ids_N: torch.Tensor
    sampler_logp_N: torch.Tensor
    finish_reason: str
    weight_version: int
    text: str = ""
    reward: float = 0.0
    version_spans: tuple[tuple[int, int, int], ...] = ()

    @property
    def num_tokens(self) -> int:
        return int(self.response_ids_N.shape[0])

    def with_reward(self, reward: float) -> Rollout:
        return replace(self, reward=reward)


@dataclass(frozen=True)
class PackedBatch:
    """Sequences of mixed lengths and modalities in one row of T tokens, each prompt once.

    First stand the P different prompts, then the responses of all B sequences without their last token, whose hidden
    state predicts nothing, then padding rows, if any, that belong to no sequence: nobody attends to them and no loss
    reads them. ``input_ids_T``, ``position_ids_3T`` (M-RoPE positions of each sample alone); ``prompt_lengths_P`` > 0;
    ``response_lengths_B`` >= 0, rows of each response; ``prompt_of_B``, the prompt each continues; all int64.
    ``cu_seqlens`` int32 ``[P + B + 1]``: where each prompt, then each response begins, and where the last one ends.

    ``rows_N``: rows whose hidden state predicts a response token (the first one is predicted by the prompt's last
    row, which the whole group shares); ``target_N`` the token predicted, -1 where there is none, which
    ``response_mask_N`` bool leaves out; ``sequence_N`` its sequence, 0..B-1. ``group_ids_B``: the group of each
    sequence; ``term_ids_B``: its loss term; ``term_tokens`` int64: response tokens of each term.

    ``pixel_values`` fp32 ``[patches, patch_dim]`` and ``grid_thw`` int64 ``[media, 3]``: images and videos of all
    prompts in the order of their tokens; ``visual_rows_M`` their tokens' rows. ``video_timestamps``: of each video, in
    that order, the seconds of its temporal patches.
    """

    input_ids_T: torch.Tensor
    position_ids_3T: torch.Tensor
    cu_seqlens: torch.Tensor
    prompt_lengths_P: torch.Tensor
    response_lengths_B: torch.Tensor
    prompt_of_B: torch.Tensor
    rows_N: torch.Tensor
    target_N: torch.Tensor
    sequence_N: torch.Tensor
    response_mask_N: torch.Tensor
    group_ids_B: torch.Tensor
    term_ids_B: torch.Tensor
    term_tokens: torch.Tensor
    pixel_values: torch.Tensor | None = None
    grid_thw: torch.Tensor | None = None
    visual_rows_M: torch.Tensor | None = None
    video_timestamps: tuple[tuple[float, ...], ...] = ()

    @property
    def num_tokens(self) -> int:
        """T: what a forward computes, padding rows included."""
        return int(self.input_ids_T.shape[0])

    @property
    def num_sequences(self) -> int:
        return int(self.prompt_of_B.shape[0])

    @property
    def num_padding(self) -> int:
        return self.num_tokens - int(self.cu_seqlens[-1])

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch on ``device``."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: x.to(device) for name, x in values.items() if hasattr(x, "to")})
