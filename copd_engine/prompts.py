"""Encoded prompts from a stream; under ``on_error: skip`` another one for each that cannot be encoded."""

from __future__ import annotations

import logging
from typing import Any

from copd_engine.data import Stream
from copd_engine.models.base import PromptEncoder
from copd_engine.types import EncodedPrompt, Example, UserError

logger = logging.getLogger(__name__)

#: More skipped prompts than this share of those drawn stop the run, from so many drawn or the second skipped one on.
MAX_SKIPPED, MIN_DRAWN = 0.01, 100


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


def encode_prompt(encoder: PromptEncoder, example: Example, max_tokens: int) -> EncodedPrompt:
    """Encode a prompt; UserError for one of more than ``max_tokens`` tokens."""
    prompt = encoder.encode(example)
    if prompt.num_tokens > max_tokens:
        raise UserError(f"{example.name} has {prompt.num_tokens} tokens, rollout.max_prompt_tokens is {max_tokens}")
    return prompt
