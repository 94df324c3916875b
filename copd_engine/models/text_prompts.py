"""Prompts of text-only models, and what every prompt needs of a tokenizer: a chat template and a fitting vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from copd_engine.models.base import PromptEncoder
from copd_engine.types import EncodedPrompt, Example, UserError


class TextPromptEncoder(PromptEncoder):
    """A tokenizer with a chat template. ``vocab_size``: rows of the model's embedding, None where it is not known.

    UserError as in :func:`check_tokenizer`.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, end_token_id: int | None, vocab_size: int | None = None
    ) -> None:
        self.end_token_id = check_tokenizer(tokenizer, end_token_id, vocab_size)
        self.tokenizer = tokenizer
        pad = tokenizer.pad_token_id
        self.suppressed_token_ids = () if pad is None or pad == end_token_id else (pad,)

    def encode(self, example: Example) -> EncodedPrompt:
        if example.images or example.videos:
            raise UserError(f"{example.name} has images or videos, the model is text-only")
        text = render(self.tokenizer, [dict(turn) for turn in example.turns], example)
        input_ids_T = torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        num_tokens = len(input_ids_T)
        return EncodedPrompt(
            example=example,
            input_ids_T=input_ids_T,
            position_ids_3T=torch.arange(num_tokens).expand(3, -1),
            next_position=num_tokens,
        )

    def decode(self, token_ids: Sequence[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)

    def save(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, end_token_id: int | None, vocab_size: int | None) -> int:
    """The end token's id. UserError for a tokenizer without chat template or end token, with ids beyond the
    ``vocab_size`` rows of the embedding, or whose template opens no answer."""
    if tokenizer.chat_template is None:
        raise UserError("the tokenizer has no chat template (chat_template.jinja or tokenizer_config.json)")
    if end_token_id is None:
        raise UserError("the tokenizer has no end token (eos_token in tokenizer_config.json)")
    last = max(tokenizer.get_vocab().values())
    if vocab_size is not None and last >= vocab_size:
        token = tokenizer.convert_ids_to_tokens(last)
        raise UserError(
            f"the tokenizer's vocabulary exceeds the embedding: {token!r} has id {last}, the embedding has "
            f"{vocab_size} rows (resize it, or take the tokenizer that belongs to the model)"
        )
    turns = [{"role": "user", "content": "a"}]
    with_prompt, without = (_apply(tokenizer, turns, prompt, "the chat template") for prompt in (True, False))
    if with_prompt == without:
        raise UserError(
            "the chat template has no generation prompt: add_generation_prompt changes nothing, so the model would "
            "not know that its answer begins (chat_template.jinja or tokenizer_config.json)"
        )
    return end_token_id


def render(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, Any]], example: Example) -> str:
    """The conversation as text that ends where the answer begins. UserError for an empty prompt, or one that the
    template refuses."""
    if not turns[-1]["content"] or (isinstance(turns[-1]["content"], str) and not turns[-1]["content"].strip()):
        raise UserError(f"{example.name} is empty")
    return _apply(tokenizer, turns, True, f"{example.name}: the chat template")


def _apply(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, Any]], generation_prompt: bool, what: str) -> str:
    try:
        text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation_prompt)
    except (TemplateError, TypeError, ValueError) as error:
        raise UserError(f"{what} refuses the conversation: {' '.join(str(error).split())}") from None
    return text
