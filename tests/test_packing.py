"""Packed rows against transformers' own forward of each sample alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen3VLForConditionalGeneration

from copd_engine.models.base import Policy
from copd_engine.packing import pack, split_by_tokens
from copd_engine.types import EncodedPrompt, Example
from tests.helpers import prompts_of_all_domains, response_of, tiny_model
from tests.plain import plain_inputs


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def plain(model, tmp_path_factory) -> Qwen3VLForConditionalGeneration:
    """The same weights in an untouched transformers model with its own attention."""
    folder = tmp_path_factory.mktemp("plain")
    model[0].save(folder)
    return Qwen3VLForConditionalGeneration.from_pretrained(folder, attn_implementation="sdpa").float().eval()


def plain_hidden(plain, prompt: EncodedPrompt, response: torch.Tensor) -> torch.Tensor:
    """Hidden states that predict the response's tokens, one sample, transformers computes everything."""
    output = plain.model(**plain_inputs(plain, prompt, response))
    return output.last_hidden_state[0, prompt.num_tokens - 1 : -1]


def mixed_batch(encoder) -> tuple[list[EncodedPrompt], list[torch.Tensor]]:
    """Text, image, video; groups of three, interleaved; responses of different lengths, one of a single token."""
    prompts, responses = [], []
    for prompt in prompts_of_all_domains(encoder):
        full = response_of(encoder, prompt)
        prompts += [prompt, prompt, prompt]
        responses += [full, full.flip(0)[:5], full[:1]]
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0)).tolist()
    return [prompts[i] for i in order], [responses[i] for i in order]


def packed(policy: Policy, encoder, prompts, responses):
    batch = pack(prompts, responses, encoder.visual_token_ids, encoder.spatial_merge_size)
    return batch, policy.hidden_states(batch)


def test_packed_hidden_states_equal_each_sample_alone(model, plain):
    policy, encoder = model
    prompts, responses = mixed_batch(encoder)
    batch, hidden_ND = packed(policy, encoder, prompts, responses)
    alone = [plain_hidden(plain, p, r) for p, r in zip(prompts, responses, strict=True)]
    assert torch.equal(batch.target_N, torch.cat(responses))
    assert batch.sequence_N.tolist() == [i for i, r in enumerate(responses) for _ in r]
    torch.testing.assert_close(hidden_ND, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_packed_gradients_equal_the_sum_of_each_sample_alone(model, plain):
    policy, encoder = model
    prompts, responses = mixed_batch(encoder)
    _, hidden_ND = packed(policy, encoder, prompts, responses)
    direction = torch.randn(hidden_ND.shape, generator=torch.Generator().manual_seed(1))
    policy.module.zero_grad()
    (hidden_ND * direction).sum().backward()
    plain.zero_grad()
    alone = torch.cat([plain_hidden(plain, p, r) for p, r in zip(prompts, responses, strict=True)])
    (alone * direction).sum().backward()
    expected = dict(plain.named_parameters())
    for name, parameter in policy.named_parameters().items():
        error = (parameter.grad - expected[name].grad).norm() / expected[name].grad.norm().clamp(min=1e-6)
        assert error < 1e-4, f"{name}: relative error {error:.1e}"


def test_each_prompt_stands_once_and_nothing_is_padded(model):
    _, encoder = model
    prompts, responses = mixed_batch(encoder)
    batch = pack(prompts, responses, encoder.visual_token_ids, encoder.spatial_merge_size)
    different = {id(p): p for p in prompts}.values()
    assert batch.num_tokens == sum(p.num_tokens for p in different) + sum(len(r) - 1 for r in responses)
    assert batch.grid_thw.shape[0] == sum(p.pixel_values is not None or p.video_grid_thw is not None for p in different)


def test_order_of_samples_does_not_change_hidden_states(model):
    policy, encoder = model
    prompts, responses = mixed_batch(encoder)
    _, forward_ND = packed(policy, encoder, prompts, responses)
    _, backward_ND = packed(policy, encoder, prompts[::-1], responses[::-1])
    lengths = [len(r) for r in responses]
    there = forward_ND.split(lengths)
    back = backward_ND.split(lengths[::-1])[::-1]
    torch.testing.assert_close(torch.cat(there), torch.cat(back), atol=1e-5, rtol=1e-5)


def test_prefill_rows_predict_the_first_token(model, plain):
    policy, encoder = model
    prompts = prompts_of_all_domains(encoder)
    empty = torch.empty(0, dtype=torch.int64)
    batch, hidden_PD = packed(policy, encoder, prompts, [empty] * len(prompts))
    one = torch.tensor([encoder.end_token_id])
    expected = torch.cat([plain_hidden(plain, p, one) for p in prompts])
    assert batch.target_N.tolist() == [-1] * len(prompts)
    torch.testing.assert_close(hidden_PD, expected, atol=1e-5, rtol=1e-5)


def test_pixel_inputs_that_do_not_match_the_placeholders_are_refused(model):
    _, encoder = model
    image = prompts_of_all_domains(encoder, 1)[1]
    broken = EncodedPrompt(
        example=image.example,
        input_ids_T=image.input_ids_T[image.input_ids_T != encoder.visual_token_ids[0]],
        position_ids_3T=image.position_ids_3T[:, 4:],
        next_position=image.next_position,
        pixel_values=image.pixel_values,
        image_grid_thw=image.image_grid_thw,
    )
    with pytest.raises(ValueError, match="0 image and video tokens but pixel inputs for 4"):
        pack([broken], [torch.tensor([1])], encoder.visual_token_ids, encoder.spatial_merge_size)


def test_pack_needs_as_many_responses_as_prompts():
    with pytest.raises(ValueError, match="as many responses as prompts"):
        pack([], [])


def text_prompt(length: int) -> EncodedPrompt:
    positions = torch.arange(length).expand(3, -1)
    return EncodedPrompt(Example("p", "p", "a", "exact"), torch.zeros(length, dtype=torch.int64), positions, length)


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 9), st.lists(st.integers(1, 7), min_size=1, max_size=4)), min_size=1),
    budget=st.integers(1, 40),
)
def test_micro_batches_hold_every_sample_once_within_the_budget(lengths, budget):
    prompts, responses = [], []
    for prompt_tokens, group in lengths:
        prompt = text_prompt(prompt_tokens)
        prompts += [prompt] * len(group)
        responses += group
    batches = split_by_tokens(prompts, responses, budget)
    assert [i for batch in batches for i in batch] == list(range(len(prompts)))
    for batch in batches:
        tokens = sum({id(prompts[i]): prompts[i].num_tokens for i in batch}.values()) + sum(responses[i] for i in batch)
        assert tokens <= budget or len(batch) == 1
