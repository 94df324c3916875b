"""Encoded prompts from a stream; under ``on_error: skip`` another one for each that cannot be encoded."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, overload

from copd_engine.config import DataConfig
from copd_engine.data import Stream
from copd_engine.models.base import PromptEncoder
from copd_engine.types import EncodedPrompt, Example, UserError

logger = logging.getLogger(__name__)

#: More skipped prompts than this share of those drawn stop the run, from so many drawn or the second skipped one on.
MAX_SKIPPED, MIN_DRAWN = 0.01, 100
#: Pixel inputs of held-out prompts of one domain that stay in memory.
MAX_KEPT_BYTES = 2**29


class PromptSource:
    """Draws prompts of ``stream`` and encodes them; one of more than ``max_tokens`` tokens is an error.

    Under ``on_error: skip`` of its source a prompt that cannot be encoded (damaged media, too long) is counted in
    ``num_skipped`` of ``num_drawn`` and the next one takes its place; more than 1 % skipped are an error.
    """

    def __init__(self, stream: Stream, encoder: PromptEncoder, max_tokens: int) -> None:
        self.stream, self.encoder, self.max_tokens = stream, encoder, max_tokens
        self.num_drawn = self.num_skipped = 0

    def take(self, n: int) -> list[EncodedPrompt]:
        """The next ``n`` prompts, encoded. UserError under ``raise`` for the first one that cannot be, under ``skip``
        for too many of them."""
        prompts: list[EncodedPrompt] = []
        while len(prompts) < n:
            for example, on_error in self.stream.draw(n - len(prompts)):
                self.num_drawn += 1
                try:
                    prompts.append(encode_prompt(self.encoder, example, self.max_tokens))
                except UserError as error:
                    if on_error == "raise":
                        raise
                    self._skip(error)
        return prompts

    def _skip(self, error: UserError) -> None:
        self.num_skipped += 1
        logger.warning("prompt left out: %s", error)
        enough = self.num_drawn >= MIN_DRAWN or self.num_skipped > 1
        if enough and self.num_skipped > MAX_SKIPPED * self.num_drawn:
            raise UserError(
                f"{self.num_skipped} of {self.num_drawn} prompts could not be encoded, more than 1 %; the last: {error}"
            )

    def state_dict(self) -> dict[str, Any]:
        """The stream's state, and the counts."""
        return self.stream.state_dict() | {"num_drawn": self.num_drawn, "num_skipped": self.num_skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`, or from a stream's alone. UserError for a state of other data."""
        self.stream.load_state_dict(state)
        self.num_drawn, self.num_skipped = int(state.get("num_drawn", 0)), int(state.get("num_skipped", 0))


class HeldOutPrompts(Sequence[EncodedPrompt]):
    """The first ``count`` examples that can be encoded, for evaluation again and again.

    All are encoded once here, so that damage shows before training. Up to ``max_bytes`` of pixel inputs are kept; what
    is beyond is encoded anew whenever it is asked for. ``on_error`` of ``data`` is that of :class:`PromptSource`; of a
    mixture, all sources must say skip.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        data: DataConfig,
        encoder: PromptEncoder,
        max_tokens: int,
        count: int,
        max_bytes: int = MAX_KEPT_BYTES,
    ) -> None:
        self._encoder, self._max_tokens = encoder, max_tokens
        self._examples: list[Example] = []
        self._kept: list[EncodedPrompt | None] = []
        skip = all(source.on_error == "skip" for source in data.sources or (data,))
        problems: list[UserError] = []
        for index in range(len(examples)):
            if len(self._examples) == count:
                break
            try:
                prompt = encode_prompt(encoder, examples[index], max_tokens)
            except UserError as error:
                if not skip:
                    raise
                problems.append(error)
                if len(problems) > 1 and len(problems) > MAX_SKIPPED * min(count, len(examples)):
                    raise UserError(
                        f"{len(problems)} of the first {index + 1} held-out prompts could not be encoded, "
                        f"more than 1 % of those asked for; the last: {error}"
                    ) from None
                logger.warning("held-out prompt left out: %s", error)
                continue
            size = _media_bytes(prompt)
            keep = size <= max_bytes
            max_bytes -= size if keep else 0
            self._examples.append(prompt.example)
            self._kept.append(prompt if keep else None)
        if not self._examples:
            raise UserError("no held-out prompt could be encoded" + (f": {problems[0]}" if problems else ""))

    def __len__(self) -> int:
        return len(self._examples)

    @overload
    def __getitem__(self, index: int) -> EncodedPrompt: ...
    @overload
    def __getitem__(self, index: slice) -> list[EncodedPrompt]: ...
    def __getitem__(self, index: int | slice) -> EncodedPrompt | list[EncodedPrompt]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._kept[index] or encode_prompt(self._encoder, self._examples[index], self._max_tokens)

    def __iter__(self) -> Iterator[EncodedPrompt]:
        return (self[index] for index in range(len(self)))


def in_chunks(prompts: Iterable[EncodedPrompt], max_bytes: int = MAX_KEPT_BYTES) -> Iterator[list[EncodedPrompt]]:
    """The prompts in order, in lists of at most ``max_bytes`` of pixel inputs, or of one prompt above that."""
    chunk: list[EncodedPrompt] = []
    used = 0
    for prompt in prompts:
        size = _media_bytes(prompt)
        if chunk and used + size > max_bytes:
            yield chunk
            chunk, used = [], 0
        chunk.append(prompt)
        used += size
    if chunk:
        yield chunk


def without_pixels(prompt: EncodedPrompt) -> EncodedPrompt:
    """The same prompt for what only reads its text and its example."""
    return replace(prompt, pixel_values=None, image_grid_thw=None, pixel_values_videos=None, video_grid_thw=None)


def _media_bytes(prompt: EncodedPrompt) -> int:
    pixels = (prompt.pixel_values, prompt.pixel_values_videos)
    return sum(x.numel() * x.element_size() for x in pixels if x is not None)


def encode_prompt(encoder: PromptEncoder, example: Example, max_tokens: int) -> EncodedPrompt:
    """Encode a prompt; UserError for one of more than ``max_tokens`` tokens."""
    prompt = encoder.encode(example)
    if prompt.num_tokens > max_tokens:
        raise UserError(f"{example.name} has {prompt.num_tokens} tokens, rollout.max_prompt_tokens is {max_tokens}")
    return prompt
