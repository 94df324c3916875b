"""The attention of packed samples: plain without a layout, and refused where its numbers would be wrong."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from copd_engine.models.attention import varlen_attention
from copd_engine.models.causal_lm import CausalLMPolicy
from tests import model_inputs
from tests.helpers import prompts_of_all_domains
from tests.model_inputs import SIZES, example, packed_logp, text_prompt_encoder

model = model_inputs.model


def qkv(batch: int = 1, tokens: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, heads, tokens, 4, generator=generator) for heads in (2, 1, 1)]


def test_attention_without_layout_is_plain_and_not_causal():
    query, key, value = qkv(2)
    out, weights = varlen_attention(torch.nn.Module(), query, key, value, None)
    scores = (query @ key.transpose(-1, -2) / 2).softmax(-1) @ value  # one key head serves both query heads
    torch.testing.assert_close(out, scores.transpose(1, 2))
    assert weights is None


def test_attention_refuses_what_it_would_get_wrong(model):
    policy, encoder = model
    prompts = prompts_of_all_domains(encoder, 1)
    layout_of = policy.module.model.language_model  # a real layout, caught on its way
    caught = {}
    handle = layout_of.register_forward_pre_hook(lambda _, args, kwargs: caught.update(kwargs), with_kwargs=True)
    packed_logp(policy, encoder, prompts[0], torch.tensor([1, 2]))
    handle.remove()
    with pytest.raises(ValueError, match="takes one row, got a batch of 2"):
        varlen_attention(torch.nn.Module(), *qkv(2), None, layout=caught["layout"])
    with pytest.raises(ValueError, match="takes a layout, not an attention_mask"):
        varlen_attention(torch.nn.Module(), *qkv(), torch.ones(1, 1, 3, 3))
    with pytest.raises(ValueError, match="does not support softcap"):
        varlen_attention(torch.nn.Module(), *qkv(), None, softcap=50.0)
    # transformers would run the decoder without a causal mask: wrong numbers, no error.
    with pytest.raises(ValueError, match="needs a layout in a decoder"):
        policy.module(input_ids=prompts[0].input_ids_T[None])


def test_sliding_windows_are_refused():
    config = Qwen3Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=0)
    policy = CausalLMPolicy(Qwen3ForCausalLM(config))
    text_encoder = text_prompt_encoder()
    with pytest.raises(ValueError, match="does not support sliding_window"):
        packed_logp(policy, text_encoder, text_encoder.encode(example("hello")), torch.tensor([1, 2]))
