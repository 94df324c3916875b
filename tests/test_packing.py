"""Packed rows against transformers' own forward of each sample alone."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from copd_kernels import linear_logprob, linear_policy_loss
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen3VLForConditionalGeneration

from copd_engine import batch_loss as batch_loss_module
from copd_engine.branch import Branch
from copd_engine.config import ObjectiveConfig, OptimConfig
from copd_engine.micro_batches import split_micro_batches
from copd_engine.models.base import Policy
from copd_engine.objectives import TrainSample
from copd_engine.packing import pack
from copd_engine.types import EncodedPrompt, Rollout, RolloutRequest
from tests.helpers import prompts_of_all_domains, response_of, tiny_model
from tests.model_inputs import example, image, video
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


# Images and videos in one prompt


def mixed_prompts(encoder) -> list[EncodedPrompt]:
    """An image inside of videos, videos inside of images, and one of each beside text."""
    small, tall = image(8, 8, 1), image(24, 8, 2)
    short, long = video(2, 8, 16, 3), video(6, 16, 8, 4)
    return [
        encoder.encode(example("<video> then <image> then <video>", [small], [short, long])),
        encoder.encode(example("<image><video><image> why?", [tall, small], [long])),
        encoder.encode(example("no pictures")),
        encoder.encode(example("only <image>", [tall])),
    ]


def test_media_stand_in_the_order_of_their_tokens(model):
    _, encoder = model
    prompts = mixed_prompts(encoder)
    batch = pack(prompts, [torch.tensor([1])] * 4, encoder.visual_token_ids, encoder.spatial_merge_size)
    first, second, _, last = prompts
    images, videos = first.pixel_values, first.pixel_values_videos
    ours = [videos[:8], images, videos[8:]]  # the short video has 1 x 2 x 4 patches
    images, videos = second.pixel_values, second.pixel_values_videos
    ours += [images[:12], videos, images[12:], last.pixel_values]  # the tall image has 6 x 2
    assert torch.equal(batch.pixel_values, torch.cat(ours))
    assert batch.grid_thw.tolist() == [[1, 2, 4], [1, 2, 2], [3, 4, 2], [1, 6, 2], [3, 4, 2], [1, 2, 2], [1, 6, 2]]
    is_visual_T = torch.isin(batch.input_ids_T, torch.tensor(encoder.visual_token_ids))
    assert torch.equal(batch.visual_rows_M, is_visual_T.nonzero().squeeze(1))
    assert [len(times) for times in batch.video_timestamps] == [1, 3, 3]
    assert batch.video_timestamps == first.video_timestamps + second.video_timestamps


def test_mixed_prompts_equal_each_sample_alone(model, plain):
    policy, encoder = model
    prompts = [prompt for prompt in mixed_prompts(encoder) for _ in range(2)]
    responses = [torch.arange(40, 40 + n) for n in (3, 1, 2, 6, 1, 1, 4, 5)]
    for pad in (1, 64):
        batch = pack(prompts, responses, encoder.visual_token_ids, encoder.spatial_merge_size, pad_to_multiple_of=pad)
        alone = torch.cat([plain_hidden(plain, p, r) for p, r in zip(prompts, responses, strict=True)])
        torch.testing.assert_close(policy.hidden_states(batch), alone, atol=1e-5, rtol=1e-5)


def test_kinds_that_do_not_match_their_tokens_are_refused(model):
    _, encoder = model
    prompt = mixed_prompts(encoder)[1]
    image_id, video_id = encoder.visual_token_ids
    ids_T = prompt.input_ids_T.clone()
    ids_T[(ids_T == image_id).nonzero()[0]] = video_id
    broken = replace(prompt, input_ids_T=ids_T)
    with pytest.raises(ValueError, match="has 3 image tokens but pixel inputs for 4"):
        pack([broken], [torch.tensor([1])], encoder.visual_token_ids, encoder.spatial_merge_size)


# What else a batch carries


def test_boundaries_groups_terms_and_padding(model):
    _, encoder = model
    prompts = prompts_of_all_domains(encoder, 1)
    sequence = [prompts[0], prompts[0], prompts[2], prompts[1]]
    responses = [torch.arange(n) for n in (4, 1, 6, 0)]
    batch = pack(
        sequence,
        responses,
        encoder.visual_token_ids,
        encoder.spatial_merge_size,
        group_ids=[7, 7, 3, 5],
        term_ids=[0, 0, 2, 0],
        num_terms=4,
        pad_to_multiple_of=128,
    )
    lengths = [prompts[0].num_tokens, prompts[2].num_tokens, prompts[1].num_tokens, 3, 0, 5, 0]
    assert batch.cu_seqlens.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.num_tokens % 128 == 0
    assert batch.num_padding == batch.num_tokens - sum(lengths) > 0
    assert batch.num_padding < 128
    assert batch.group_ids_B.tolist() == [7, 7, 3, 5]
    assert batch.term_ids_B.tolist() == [0, 0, 2, 0]
    assert batch.term_tokens.tolist() == [5, 0, 6, 0]  # the empty response has no token
    assert batch.response_mask_N.tolist() == [True] * 11 + [False]
    assert int(batch.rows_N.max()) < sum(lengths)
    assert batch.visual_rows_M is not None
    assert int(batch.visual_rows_M.max()) < sum(lengths)
    default = pack(sequence, responses, encoder.visual_token_ids, encoder.spatial_merge_size)
    assert default.group_ids_B.tolist() == default.prompt_of_B.tolist()
    assert default.num_padding == 0
    moved = batch.to(torch.device("meta"))
    assert moved.cu_seqlens.device.type == moved.pixel_values.device.type == "meta"
    assert moved.video_timestamps == batch.video_timestamps


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ({"group_ids": [1]}, "group_ids needs one id for each of 2 sequences, got 1"),
        ({"term_ids": [0, 0, 0]}, "term_ids needs one id for each of 2 sequences, got 3"),
        ({"term_ids": [0, 2], "num_terms": 2}, r"term_ids must lie in 0\.\.1, got \[0, 2\]"),
        ({"term_ids": [-1, 0]}, r"term_ids must lie in 0\.\.0, got \[-1, 0\]"),
    ],
)
def test_ids_that_do_not_fit_the_sequences(model, ids, message):
    prompt = prompts_of_all_domains(model[1], 1)[0]
    with pytest.raises(ValueError, match=message):
        pack([prompt, prompt], [torch.tensor([1])] * 2, **ids)


# Order and micro-batches


def loss_gradients(policy: Policy, encoder, samples, batches, pad_to_multiple_of: int = 1) -> dict[str, torch.Tensor]:
    """Gradients of all parameters from ``samples`` (prompt, response, advantage) in ``batches`` of indexes.

    Importance ratios of a first update must be exactly 1.
    """
    policy.module.zero_grad()
    for indexes in batches:
        batch = pack(
            [samples[i][0] for i in indexes],
            [samples[i][1] for i in indexes],
            encoder.visual_token_ids,
            encoder.spatial_merge_size,
            pad_to_multiple_of=pad_to_multiple_of,
        )
        hidden_ND = policy.hidden_states(batch)
        with torch.no_grad():
            old_logp_N = linear_logprob(hidden_ND, policy.lm_head_weight, batch.target_N).logp_T
        lengths = [len(samples[i][1]) for i in indexes]
        advantage_N = torch.tensor([samples[i][2] for i in indexes]).repeat_interleave(torch.tensor(lengths))
        weight_N = torch.tensor([1 / (n * len(samples)) for n in lengths]).repeat_interleave(torch.tensor(lengths))
        result = linear_policy_loss(
            hidden_ND,
            policy.lm_head_weight,
            batch.target_N,
            advantage_T=advantage_N,
            old_logp_T=old_logp_N,
            loss_weight_T=weight_N,
        )
        assert torch.equal(result.ratio_T, torch.ones_like(result.ratio_T))
        result.loss.backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters().items()}


def largest_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Of all parameters, against their own norm or, for tiny ones, a millionth of the whole gradient's."""
    whole = torch.stack([g.norm() for g in expected.values()]).norm()
    return max(float((found[n] - g).norm() / g.norm().clamp(min=1e-6 * float(whole))) for n, g in expected.items())


@pytest.fixture(scope="module")
def samples(model) -> list[tuple[EncodedPrompt, torch.Tensor, float]]:
    """Eleven responses to prompts of text, images, videos and both, with their advantages."""
    _, encoder = model
    prompts = [*mixed_prompts(encoder), *prompts_of_all_domains(encoder, 1)]
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number, count in enumerate((2, 3, 1, 1, 1, 2, 1)):
        for _ in range(count):
            response = torch.randint(10, 300, (int(torch.randint(1, 9, (), generator=generator)),), generator=generator)
            rows.append((prompts[number], response, float(torch.randn((), generator=generator))))
    return rows


@pytest.fixture(scope="module")
def expected(model, samples) -> dict[str, torch.Tensor]:
    return loss_gradients(*model, samples, [list(range(len(samples)))])


@settings(max_examples=12)
@given(order=st.permutations(range(11)), cuts=st.sets(st.integers(1, 10)), pad=st.sampled_from([1, 1, 8]))
def test_order_and_micro_batches_change_no_gradient(model, samples, expected, order, cuts, pad):
    assert len(samples) == 11
    bounds = [0, *sorted(cuts), 11]
    batches = [order[a:b] for a, b in itertools.pairwise(bounds)]
    assert largest_error(loss_gradients(*model, samples, batches, pad), expected) < 1e-5


@pytest.mark.parametrize("budget", [1, 40, 90, 200, 100_000])
def test_planned_micro_batches_change_no_gradient(model, samples, expected, budget):
    batches = split_micro_batches([p for p, _, _ in samples], [len(r) for _, r, _ in samples], budget)
    assert sorted(i for batch in batches for i in batch) == list(range(11))
    assert (len(batches) == 11) == (budget == 1)
    assert largest_error(loss_gradients(*model, samples, batches), expected) < 1e-5


@pytest.mark.parametrize("budget", [1, 60, 200, 100_000])
@pytest.mark.parametrize("pad", [1, 16])
def test_ratios_of_a_branchs_first_update_are_exactly_1(model, samples, monkeypatch, budget, pad):
    policy, encoder = model
    branch = Branch(
        "b",
        policy.clone(),
        encoder,
        OptimConfig(max_tokens_per_micro_batch=budget, pad_to_multiple_of=pad),
        ObjectiveConfig(),
        temperature=0.7,
    )
    ratios = []

    def keep(*args, **kwargs):
        result = linear_policy_loss(*args, **kwargs)
        ratios.append(result.ratio_T)
        return result

    monkeypatch.setattr(batch_loss_module, "linear_policy_loss", keep)
    metrics = branch.update(
        [
            TrainSample(
                Rollout(RolloutRequest(prompt, i, i), ids_N, torch.zeros(len(ids_N)), "stop", 0),
                "grpo",
                1 / (len(samples) * len(ids_N)),
                advantage,
            )
            for i, (prompt, ids_N, advantage) in enumerate(samples)
        ]
    )
    assert sum(len(ratio_T) for ratio_T in ratios) == metrics["num_tokens"] == sum(len(ids) for _, ids, _ in samples)
    assert all(torch.equal(ratio_T, torch.ones_like(ratio_T)) for ratio_T in ratios)
    assert metrics["num_packed_tokens"] % pad == 0
    assert branch.version == 1
