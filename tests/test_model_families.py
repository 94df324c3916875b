"""Every supported family, packed, against plain transformers one sample at a time; and what a policy saves."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from copd_engine.config import ModelConfig
from copd_engine.models.cache import CachedSequence, DecodeCache, PagePool, PrefillCache, pages_of
from copd_engine.models.loading import load_model
from copd_engine.packing import pack
from copd_engine.testbed.model import untrained
from tests.families import FAMILIES, IMAGE, MERGE, VIDEO, VISION_FAMILIES, build, make_prompt, prompts_of, response
from tests.model_inputs import example, image, video
from tests.plain import plain_hidden, plain_logp, plain_model


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def policy(family, request):
    return build(family, tied=request.param)


def packed(policy, prompts, responses, **options):
    return pack(prompts, responses, (IMAGE, VIDEO) if policy.visual is not None else (), MERGE, **options)


def log_softmax(policy, hidden_ND):
    return torch.log_softmax((hidden_ND @ policy.lm_head_weight.T).double(), -1)


def check_equal(policy, prompts, responses, **options):
    """Hidden states, log-probs and all gradients of one packed row against the samples alone."""
    plain = plain_model(policy)
    assert plain.config._attn_implementation == "sdpa"
    hidden_ND = policy.hidden_states(packed(policy, prompts, responses, **options))
    logp_NV = log_softmax(policy, hidden_ND)
    pairs = list(zip(prompts, responses, strict=True))
    alone_ND = torch.cat([plain_hidden(plain, p, r) for p, r in pairs])
    assert 0.1 < float(alone_ND.detach().std()) < 10
    torch.testing.assert_close(hidden_ND, alone_ND, atol=1e-5, rtol=1e-5)
    alone_NV = torch.cat([plain_logp(plain, p, r) for p, r in pairs])
    torch.testing.assert_close(logp_NV, alone_NV, atol=1e-5, rtol=1e-5)

    direction_NV = torch.randn(logp_NV.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    policy.module.zero_grad()
    (logp_NV * direction_NV).sum().backward()
    (alone_NV * direction_NV).sum().backward()
    expected = {name: p.grad for name, p in plain.named_parameters()}
    own = {name: p.grad for name, p in policy.named_parameters().items()}
    assert own.keys() == expected.keys()
    whole = sum(float(g.square().sum()) for g in expected.values() if g is not None) ** 0.5
    for name, gradient in expected.items():
        if gradient is None:
            assert own[name] is None, name
            continue
        # A bias of keys has no gradient but rounding: it shifts all scores of a query alike.
        bound = 1e-4 * max(float(gradient.norm()), 1e-3 * whole)
        assert float((own[name] - gradient).norm()) < bound, name
    return own


def test_mixed_samples_in_one_row_equal_each_alone(policy):
    prompts = prompts_of(policy)
    gradients = check_equal(policy, prompts, [response(seed, 1 + 2 * seed) for seed in range(len(prompts))])
    assert all(g is not None for g in gradients.values())


def test_one_sample(policy):
    prompt = prompts_of(policy)[2]
    check_equal(policy, [prompt], [response(0, 6)])


def test_responses_of_one_token(policy):
    prompts = prompts_of(policy)
    check_equal(policy, prompts, [response(seed, 1) for seed in range(len(prompts))])


def test_a_group_shares_its_prompt(policy):
    prompts = [prompt for prompt in prompts_of(policy)[1:4] for _ in range(3)]
    check_equal(policy, prompts, [response(seed, 1 + seed) for seed in range(len(prompts))])


@pytest.mark.parametrize("multiple", [2, 64])
def test_rows_padded_to_a_multiple(policy, multiple):
    prompts = prompts_of(policy)
    tails = [response(seed, 4) for seed in range(1, len(prompts))]
    # One of two lengths that differ by 1 needs padding.
    batches = {n: packed(policy, prompts, [response(0, n), *tails], pad_to_multiple_of=multiple) for n in (4, 5)}
    num_tokens = next(n for n, batch in batches.items() if batch.num_padding)
    assert batches[num_tokens].num_tokens % multiple == 0
    responses = [response(0, num_tokens), *tails]
    check_equal(policy, prompts, responses, pad_to_multiple_of=multiple)


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_images_and_videos_in_one_prompt(family):
    policy = build(family)
    prompts = [make_prompt(policy, 7, images=((2, 2), (1, 3)), videos=((2, 2, 1), (1, 1, 2))), make_prompt(policy, 8)]
    check_equal(policy, prompts, [response(0, 5), response(1, 2)])


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_features_meet_their_own_tokens(family):
    """Swapping the pixels of two images of one size changes the hidden states behind the first of them."""
    policy = build(family)
    prompt = make_prompt(policy, 0, images=((2, 2), (2, 2)))
    swapped = make_prompt(policy, 0, images=((2, 2), (2, 2)))
    swapped.pixel_values[:] = prompt.pixel_values.roll(len(prompt.pixel_values) // 2, 0)
    with torch.no_grad():
        one, two = (policy.hidden_states(packed(policy, [p], [response(0, 3)])) for p in (prompt, swapped))
    assert float((one - two).abs().max()) > 0.05


def test_a_saved_model_gives_the_same_logits_in_plain_transformers(policy, family, tmp_path):
    policy.save(tmp_path)
    auto = AutoModelForImageTextToText if family in VISION_FAMILIES else AutoModelForCausalLM
    plain, report = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert type(plain) is type(policy.module)
    assert plain.config._attn_implementation == "sdpa"
    head, embedding = plain.get_output_embeddings().weight, plain.get_input_embeddings().weight
    assert (head is embedding) == (policy.lm_head_weight is policy.module.get_input_embeddings().weight)
    for prompt in prompts_of(policy):
        with torch.no_grad():
            own = log_softmax(policy, policy.hidden_states(packed(policy, [prompt], [response(0, 4)])))
            torch.testing.assert_close(own, plain_logp(plain.eval(), prompt, response(0, 4)), atol=1e-5, rtol=1e-5)


def test_decoding_token_by_token_equals_one_packed_row(policy):
    """A prefill of all prompts, then given tokens one at a time, against the hidden states of the whole row."""
    prompts = prompts_of(policy)
    repeats_P = torch.tensor([2, 1, 2, 1, 1])
    owners = torch.arange(5).repeat_interleave(repeats_P).tolist()
    responses_BN = torch.stack([response(seed, 5) for seed in range(7)])
    with torch.inference_mode():
        whole_ND = policy.hidden_states(packed(policy, [prompts[p] for p in owners], list(responses_BN)))
        batch = packed(policy, prompts, [torch.empty(0, dtype=torch.int64)] * 5)
        bounds = batch.cu_seqlens.tolist()
        pool = PagePool(1000)
        pages = [pool.take(pages_of(prompt.num_tokens)) for prompt in prompts]
        prefill = PrefillCache(pool, [(bounds[p], bounds[p + 1], pages[p]) for p in range(5)], policy.device)
        steps = [policy.hidden_states(batch, prefill).repeat_interleave(repeats_P, 0)]
        rows = [CachedSequence(pages[p], prompts[p].num_tokens, pool.take(1)) for p in owners]
        cache = DecodeCache(pool)
        cache.arrange(rows)
        order = torch.tensor([rows.index(row) for row in cache.rows])
        position_B = torch.tensor([prompts[p].next_position for p in owners])
        for n in range(4):
            cache.advance()
            step = policy.decode_step(responses_BN[order, n], position_B[order] + n, cache)
            steps.append(torch.empty_like(step).index_copy_(0, order, step))
    own_BND = torch.stack(steps, dim=1)
    torch.testing.assert_close(own_BND.flatten(0, 1), whole_ND, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_prompts_of_the_models_own_encoder(family, tmp_path):
    """A folder loaded whole: real images and videos through transformers' processors, and the model behind them."""
    build(family).save(tmp_path)
    untrained(0, hidden_size=32, num_layers=1)[1].save(tmp_path)
    policy, encoder = load_model(ModelConfig(path=str(tmp_path)))
    examples = [
        example("What is 1 + 1?"),
        example("<image> or <image>?", [image(16, 24), image(8, 8)]),
        example("Count: <video>", videos=[video(5, 16, 16)], fps=1.0),
        example("<video> and <image>", [image(24, 16)], [video(4, 8, 16)]),
    ]
    check_equal(policy, [encoder.encode(e) for e in examples], [response(seed, 4) for seed in range(4)])
