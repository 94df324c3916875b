"""Text-only decoder models (Llama, SmolLM2, Qwen3 ...) through transformers' own modules."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from copd_engine.models.base import Policy, PromptEncoder
from copd_engine.types import EncodedPrompt, Example, PackedBatch, UserError


class CausalLMPolicy(Policy):
    """An ``AutoModelForCausalLM`` over packed rows."""

    @property
    def backbone(self) -> nn.Module:
        return self.module.base_model

    def _embed(self, batch: PackedBatch) -> tuple[torch.Tensor, dict[str, Any]]:
        return self.module.get_input_embeddings()(batch.input_ids_T)[None], {}

    def _backbone_positions(self, position_ids_3BT: torch.Tensor) -> torch.Tensor:
        return position_ids_3BT[0]


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
