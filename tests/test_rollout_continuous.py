"""The embedded engine's batch: what is drawn does not depend on places, pages, order or preemption."""

from __future__ import annotations

import pytest
import torch

from copd_engine.config import LoraConfig
from copd_engine.models import cache as cache_module
from copd_engine.models.cache import PagePool, pages_of
from copd_engine.models.decode_layout import PAGE
from copd_engine.models.lora import add_adapters
from copd_engine.rollout import scheduler as scheduler_module
from copd_engine.rollout.base import Sampling
from copd_engine.rollout.embedded import EmbeddedEngine
from copd_engine.types import RolloutRequest, UserError
from tests.helpers import prompts_of_all_domains, tiny_model
from tests.plain import plain_inputs, plain_model, plain_token_logp
from tests.test_cache import poisoned  # noqa: F401
from tests.test_rollout import assert_same, biased, requests

LENGTH = 40
SAMPLING = Sampling(1.0, LENGTH)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def prompts(model):
    """Text, image, video in turn, two each."""
    return prompts_of_all_domains(model[1])


@pytest.fixture(scope="module")
def ending(model):
    """A policy whose responses take from a few tokens to the limit."""
    policy, encoder = model
    return biased(policy, {encoder.end_token_id: 2.5})


@pytest.fixture(scope="module")
def expected(model, ending, prompts):
    """Everyone at once, in a cache that holds all."""
    engine = EmbeddedEngine({"e": ending}, model[1], max_running=100)
    rollouts = engine.generate("e", requests(prompts), SAMPLING)
    assert len({rollout.num_tokens for rollout in rollouts}) > 8
    assert {rollout.finish_reason for rollout in rollouts} == {"stop", "length"}
    assert engine.stats()["num_preempted"] == 0
    return rollouts


def smallest_cache(prompts, num_tokens: int = LENGTH) -> int:
    """Tokens that the longest prompt and its response need."""
    return PAGE * (pages_of(max(prompt.num_tokens for prompt in prompts)) + pages_of(num_tokens - 1))


@pytest.mark.parametrize("max_running", [1, 3, 24])
@pytest.mark.parametrize("extra_pages", [0, 3, 12])
def test_draws_whatever_the_places_and_pages_over_poisoned_memory(
    model,
    ending,
    prompts,
    expected,
    max_running,
    extra_pages,
    poisoned,  # noqa: F811
):
    limit = smallest_cache(prompts) + extra_pages * PAGE
    engine = EmbeddedEngine({"e": ending}, model[1], max_running, limit)
    asked = [rollout.request for rollout in expected]
    assert_same(expected, engine.generate("e", asked, SAMPLING))
    stats = engine.stats()
    assert (stats["num_preempted"] > 0) == ((max_running, extra_pages) in {(3, 0), (24, 0), (24, 3)})
    assert smallest_cache(prompts) / 2 < stats["cached_tokens"] <= limit
    token_bytes = 2 * 2 * 16 * 4  # layers, keys and values, a head of 16, fp32
    assert stats["cache_bytes"] <= limit * token_bytes
    order = torch.randperm(len(asked), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = engine.generate("e", [asked[i] for i in order], SAMPLING)
    assert_same([expected[i] for i in order], shuffled)


def test_a_preempted_sequence_goes_on_as_transformers_would(model, ending, prompts):
    """Recomputed with its images and videos: log-probs of all its tokens are those of a plain forward."""
    _, encoder = model
    engine = EmbeddedEngine({"e": ending}, encoder, 24, smallest_cache(prompts))
    rollouts = engine.generate("e", requests(prompts), Sampling(1.4, LENGTH))
    stats = engine.stats()
    assert stats["num_preempted"] > 5
    once = sum(prompt.num_tokens for prompt in prompts)
    assert stats["num_prefill_tokens"] > 2 * once
    plain = plain_model(ending)
    for rollout in rollouts:
        truth = plain_token_logp(plain, rollout, 1.4).detach()
        torch.testing.assert_close(rollout.sampler_logp_N.double(), truth, atol=1e-5, rtol=1e-5)


def test_greedy_tokens_are_those_of_transformers_generate(model, ending, prompts):
    _, encoder = model
    engine = EmbeddedEngine({"e": ending}, encoder, 4, smallest_cache(prompts) + PAGE)
    asked = [RolloutRequest(prompt, 0, group) for group, prompt in enumerate(prompts)]
    plain = plain_model(ending)
    plain.config.text_config.eos_token_id = plain.generation_config.eos_token_id = encoder.end_token_id
    for rollout in engine.generate("e", asked, Sampling(0.0, LENGTH)):
        prompt = rollout.request.prompt
        inputs = plain_inputs(plain, prompt, torch.empty(0, dtype=torch.int64))
        generated = plain.generate(
            **{name: value for name, value in inputs.items() if value is not None},
            do_sample=False,
            max_new_tokens=LENGTH,
            suppress_tokens=list(encoder.suppressed_token_ids),
            pad_token_id=encoder.tokenizer.pad_token_id,
        )
        assert rollout.response_ids_N.tolist() == generated[0, prompt.num_tokens :].tolist()
        truth = plain_token_logp(plain, rollout).detach()
        torch.testing.assert_close(rollout.sampler_logp_N.double(), truth, atol=1e-5, rtol=1e-5)


def test_prefills_are_bounded(monkeypatch, model, ending, prompts, expected):
    policy, encoder = model
    sizes = []
    hidden_states = type(policy).hidden_states

    def recorded(self, batch, cache=None):
        sizes.append(batch.num_tokens)
        return hidden_states(self, batch, cache)

    monkeypatch.setattr(type(policy), "hidden_states", recorded)
    monkeypatch.setattr(scheduler_module, "PREFILL_TOKENS", 50)
    engine = EmbeddedEngine({"e": ending}, encoder, 24)
    assert_same(expected, engine.generate("e", [rollout.request for rollout in expected], SAMPLING))
    lengths = [prompt.num_tokens for prompt in prompts]
    assert sum(sizes) == sum(lengths)  # each prompt once, for a group of four
    assert max(sizes) == max(50, *lengths)
    assert len(sizes) > 3


def test_groups_come_as_they_finish(model, ending, prompts, expected):
    engine = EmbeddedEngine({"e": ending}, model[1], 8)
    asked = [rollout.request for rollout in expected]
    seen: list[int] = []
    unfinished_at_first = None
    for group in engine.generate_groups("e", asked, SAMPLING):
        number = group[0].request.group
        assert_same(expected[4 * number : 4 * number + 4], group)
        if not seen:
            unfinished_at_first = len(asked) - engine.stats()["num_rollouts"]
            with pytest.raises(RuntimeError, match="sync while it samples for 'e'"):
                engine.sync("e", ending.named_parameters(), 1)
            with pytest.raises(RuntimeError, match="sleep while it samples for 'e'"):
                engine.sleep()
            with pytest.raises(RuntimeError, match="a call for 'e' while it samples for 'e'"):
                engine.generate("e", asked, SAMPLING)
            # What the consumer does is not in inference mode.
            assert not torch.is_inference_mode_enabled()
        seen.append(number)
    assert sorted(seen) == list(range(6))
    assert seen != sorted(seen) or unfinished_at_first > 8
    assert unfinished_at_first > 0


def test_a_caller_may_stop_before_the_end(model, ending, prompts, expected):
    engine = EmbeddedEngine({"e": ending}, model[1], 8)
    asked = [rollout.request for rollout in expected]
    groups = engine.generate_groups("e", asked, SAMPLING)
    next(groups)
    groups.close()
    engine.sync("e", ending.named_parameters(), 0)
    assert_same(expected, engine.generate("e", asked, SAMPLING))


def test_experts_of_one_call_keep_apart(model, ending, prompts):
    policy, encoder = model
    engine = EmbeddedEngine({"a": ending, "b": policy}, encoder, 3)
    asked = requests(prompts[:2])
    alone = {name: engine.generate(name, asked, SAMPLING) for name in "ab"}
    found: dict[str, list] = {"a": [], "b": []}
    for name, group in engine.generate_mixed({"a": asked, "b": asked}, SAMPLING):
        found[name] += group
    for name, rollouts in found.items():
        assert_same(alone[name], sorted(rollouts, key=lambda rollout: rollout.request.seed))
    with pytest.raises(ValueError, match="no expert 'c'"):
        engine.generate_mixed({"a": asked, "c": asked}, SAMPLING)


def test_what_does_not_fit_alone_is_an_error_before_anything_is_sampled(model, ending, prompts, expected):
    _, encoder = model
    fits = smallest_cache(prompts)
    asked = [rollout.request for rollout in expected]
    assert_same(expected, EmbeddedEngine({"e": ending}, encoder, 24, fits).generate("e", asked, SAMPLING))
    engine = EmbeddedEngine({"e": ending}, encoder, 24, fits - 1)
    longest = max(prompts, key=lambda prompt: prompt.num_tokens)
    message = (
        rf"rollout.max_cached_tokens = {fits - 1}: prompt '{longest.example.uid}'.* has {longest.num_tokens} tokens, "
        rf"and {LENGTH} may follow: that needs {fits}, in pages of {PAGE}. Set at least that"
    )
    for call in (engine.generate, engine.generate_groups):
        with pytest.raises(UserError, match=message):
            call("e", asked, SAMPLING)
    # The prompt alone may fill the cache: a single token is never fed back.
    only = EmbeddedEngine({"e": ending}, encoder, 24, smallest_cache(prompts, 1))
    assert len(only.generate("e", asked, Sampling(1.0, 1))) == len(asked)


def test_sleep_frees_the_cache_and_stats_start_anew(model, ending, prompts, expected):
    engine = EmbeddedEngine({"e": ending}, model[1], 24)
    asked = [rollout.request for rollout in expected]
    engine.generate("e", asked, SAMPLING)
    stats = engine.stats()
    num_tokens = sum(rollout.num_tokens for rollout in expected)
    assert (stats["num_rollouts"], stats["num_tokens"]) == (len(asked), num_tokens)
    assert (stats["num_prefills"], stats["num_prefill_tokens"]) == (1, sum(p.num_tokens for p in prompts))
    # First tokens come out of the prefill; the longest response takes a step for each of the others.
    assert (stats["num_decode_steps"], stats["num_running"]) == (LENGTH - 1, num_tokens - len(asked))
    assert stats["occupancy"] == pytest.approx((num_tokens - len(asked)) / (LENGTH - 1) / 24)
    assert stats["cache_bytes"] == engine._pool.bytes > 0
    assert set(engine.stats().values()) == {0}
    engine.sleep()
    assert engine._pool.bytes == 0
    engine.wake()
    assert_same(expected, engine.generate("e", asked, SAMPLING))
    engine.close()
    assert engine._pool.bytes == 0


def test_the_cache_grows_with_the_sequences(model, prompts):
    """Long limits cost nothing until a response is long."""
    policy, encoder = model
    at_once = biased(policy, {encoder.end_token_id: 100.0})
    engine = EmbeddedEngine({"e": at_once}, encoder, 24, 1 << 20)
    engine.generate("e", requests(prompts), Sampling(1.0, 100_000))
    assert engine.stats()["cached_tokens"] == sum(PAGE * pages_of(p.num_tokens) for p in prompts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_and_bf16_models(prompts, dtype):
    policy, encoder = tiny_model()
    policy.module.to(dtype)
    add_adapters(policy.module, policy.backbone, LoraConfig(rank=4))
    with torch.no_grad():
        for name, parameter in policy.named_parameters().items():
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    engine = EmbeddedEngine({"e": policy}, encoder, 8, smallest_cache(prompts, 20) + 4 * PAGE)
    rollouts = engine.generate("e", requests(prompts, 2), Sampling(1.0, 20))
    assert engine.stats()["num_preempted"] > 0
    assert engine._pool.layers[0].dtype == dtype
    plain = plain_model(policy)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    for rollout in rollouts:
        truth = plain_token_logp(plain, rollout).detach()
        torch.testing.assert_close(rollout.sampler_logp_N.double(), truth, atol=tolerance, rtol=tolerance)


def test_growing_copies_what_is_there(poisoned):  # noqa: F811
    pages = torch.arange(6.0).view(3, 1, 1, 2)
    grown = cache_module._grown(pages, 5)
    assert torch.equal(grown[:3], pages)
    assert bool(torch.isnan(grown[3:]).all())
    assert PagePool(5).num_pages == 0
