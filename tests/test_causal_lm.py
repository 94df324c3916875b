"""Text-only models and their prompts against transformers' own classes."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from copd_engine.config import ModelConfig
from copd_engine.models.causal_lm import CausalLMPolicy, TextPromptEncoder
from copd_engine.models.loading import load_model
from copd_engine.packing import pack
from copd_engine.rollout.base import Sampling
from copd_engine.rollout.embedded import EmbeddedEngine
from copd_engine.testbed.model import build_tokenizer
from copd_engine.types import RolloutRequest, UserError
from tests.model_inputs import SIZES, example, image, packed_logp, text_prompt_encoder
from tests.plain import plain_logp, plain_model, plain_token_logp


@pytest.fixture(scope="module", params=["llama", "llama, tied", "qwen3"])
def text_model(request):
    torch.manual_seed(0)
    if request.param == "qwen3":
        module = Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=True))
    else:
        module = LlamaForCausalLM(
            LlamaConfig(**SIZES, tie_word_embeddings="tied" in request.param, attention_bias=True)
        )
    return CausalLMPolicy(module), text_prompt_encoder()


QUESTIONS = ("1+1=", "a long question about cats and dogs", "?")


def test_text_models_packed_equal_each_sample_alone(text_model):
    policy, encoder = text_model
    prompts = [encoder.encode(example(q)) for q in QUESTIONS for _ in range(2)]
    responses = [torch.arange(10 + i, 11 + 3 * i) for i in range(len(prompts))]
    batch = pack(prompts, responses)
    hidden_ND = policy.hidden_states(batch)
    plain = plain_model(policy)
    logp_NV = torch.log_softmax((hidden_ND @ policy.lm_head_weight.T).double(), -1)
    alone = [plain_logp(plain, p, r) for p, r in zip(prompts, responses, strict=True)]
    torch.testing.assert_close(logp_NV, torch.cat(alone), atol=1e-5, rtol=1e-5)
    # Gradients too.
    direction = torch.randn(logp_NV.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    policy.module.zero_grad()
    (logp_NV * direction).sum().backward()
    (torch.cat(alone) * direction).sum().backward()
    expected = dict(plain.named_parameters())
    whole = sum(float(p.grad.square().sum()) for p in expected.values()) ** 0.5
    for name, parameter in policy.named_parameters().items():
        error = float((parameter.grad - expected[name].grad).norm())
        assert error < 1e-4 * max(float(expected[name].grad.norm()), 1e-2 * whole), name


def test_text_models_sample_what_a_plain_forward_says(text_model):
    policy, encoder = text_model
    requests = [
        RolloutRequest(encoder.encode(example(q)), 10 * i + n, i) for i, q in enumerate(QUESTIONS) for n in range(3)
    ]
    rollouts = EmbeddedEngine({"e": policy}, encoder).generate("e", requests, Sampling(0.9, 7))
    plain = plain_model(policy)
    for rollout in rollouts:
        expected = plain_token_logp(plain, rollout, 0.9).detach()
        torch.testing.assert_close(rollout.sampler_logp_N.double(), expected, atol=1e-5, rtol=1e-5)


def test_text_models_save_and_load(text_model, tmp_path):
    policy, encoder = text_model
    policy.save(tmp_path)
    encoder.save(tmp_path)
    again, again_encoder = load_model(ModelConfig(path=str(tmp_path)))
    assert isinstance(again, CausalLMPolicy)
    prompt = again_encoder.encode(example("1+1="))
    response = torch.tensor([20, 30, encoder.end_token_id])
    plain = type(policy.module).from_pretrained(tmp_path)
    torch.testing.assert_close(
        packed_logp(again, encoder, prompt, response), plain_logp(plain, prompt, response), atol=1e-5, rtol=1e-5
    )


def test_text_prompts_follow_the_chat_template():
    encoder = text_prompt_encoder()
    prompt = encoder.encode(example("What is 1+1?"))
    text = encoder.tokenizer.decode(prompt.input_ids_T)
    assert text == "<|im_start|>user\nWhat is 1+1?<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.position_ids_3T.tolist() == [list(range(prompt.num_tokens))] * 3
    assert prompt.next_position == prompt.num_tokens
    assert encoder.suppressed_token_ids == (encoder.tokenizer.pad_token_id,)


def test_text_prompts_that_cannot_be_encoded():
    with pytest.raises(UserError, match="'row-7' has images or videos, the model is text-only"):
        text_prompt_encoder().encode(example("x", [image()]))
    tokenizer = build_tokenizer()
    with pytest.raises(UserError, match="no end token"):
        TextPromptEncoder(tokenizer, None)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        TextPromptEncoder(tokenizer, 2)
