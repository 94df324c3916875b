"""Prompts of text-only models: a tokenizer with a chat template."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from copd_engine.models.base import PromptEncoder
from copd_engine.types import EncodedPrompt, Example, UserError


class TextPromptEncoder(PromptEncoder):
    """A tokenizer with a chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_token_id: int | None) -> None:
        if tokenizer.chat_template is None:
            raise UserError("the tokenizer has no chat template (chat_template.jinja or tokenizer_config.json)")
        if end_token_id is None:
            raise UserError("the tokenizer has no end token (eos_token in tokenizer_config.json)")
        self.tokenizer = tokenizer
        self.end_token_id = end_token_id
        pad = tokenizer.pad_token_id
        self.suppressed_token_ids = () if pad is None or pad == end_token_id else (pad,)

    def encode(self, example: Example) -> EncodedPrompt:
        if example.images or example.videos:
            raise UserError(f"prompt {example.uid!r} has images or videos, the model is text-only")
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": example.prompt}], tokenize=False, add_generation_prompt=True
        )
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
