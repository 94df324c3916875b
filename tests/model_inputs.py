"""What the tests of the models share: the testbed's model, examples, and the log-probabilities of a packed sample."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from copd_engine.models.causal_lm import TextPromptEncoder
from copd_engine.packing import pack
from copd_engine.testbed.model import build_tokenizer
from copd_engine.types import EncodedPrompt, Example
from tests.helpers import tiny_model

SIZES = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.2,
}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def text_prompt_encoder() -> TextPromptEncoder:
    tokenizer = build_tokenizer()
    return TextPromptEncoder(tokenizer, tokenizer.eos_token_id)


def image(height: int = 16, width: int = 16, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def video(frames: int = 4, height: int = 16, width: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), np.uint8)


def example(prompt: str, images=(), videos=(), fps: float = 2.0) -> Example:
    return Example("row-7", prompt, "1", "exact", images=tuple(images), videos=tuple(videos), fps=fps)


def packed_logp(policy, encoder, prompt: EncodedPrompt, response: torch.Tensor) -> torch.Tensor:
    batch = pack([prompt], [response], encoder.visual_token_ids, encoder.spatial_merge_size)
    logits_NV = torch.nn.functional.linear(policy.hidden_states(batch), policy.lm_head_weight, policy.lm_head_bias)
    return torch.log_softmax(logits_NV.double(), -1)
