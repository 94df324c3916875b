"""The embedded engine against plain forwards of what it sampled."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from copd_engine.rollout.base import Sampling
from copd_engine.rollout.embedded import EmbeddedEngine
from copd_engine.testbed.model import SPECIAL
from copd_engine.types import Rollout, RolloutRequest
from tests.helpers import prompts_of_all_domains, tiny_model
from tests.plain import plain_logp, plain_model, plain_token_logp


def biased(policy, towards: dict[int, float]):
    """A copy whose output head has a bias, which a plain forward of the copy sees too."""
    copy = policy.clone()
    head = copy.module.get_output_embeddings()
    bias = torch.zeros(head.weight.shape[0])
    for token, value in towards.items():
        bias[token] = value
    head.bias = nn.Parameter(bias)
    return copy


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def prompts(model):
    """Text, image, video in turn, two each."""
    return prompts_of_all_domains(model[1])


@pytest.fixture(scope="module")
def ending(model):
    """A policy that ends a response after some tokens, not always within ten."""
    policy, encoder = model
    return biased(policy, {encoder.end_token_id: 3.5})


def requests(prompts, group_size: int = 4) -> list[RolloutRequest]:
    return [
        RolloutRequest(prompt, seed=1000 * group + member, group=group)
        for group, prompt in enumerate(prompts)
        for member in range(group_size)
    ]


def assert_same(left: Sequence[Rollout], right: Sequence[Rollout]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.request is b.request
        assert a.response_ids_N.tolist() == b.response_ids_N.tolist()
        assert (a.finish_reason, a.text) == (b.finish_reason, b.text)
        torch.testing.assert_close(a.sampler_logp_N, b.sampler_logp_N, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_equal_a_plain_forward_for_text_image_and_video_in_one_call(model, ending, prompts, temperature):
    _, encoder = model
    asked = requests(prompts)
    rollouts = EmbeddedEngine({"e": ending}, encoder).generate("e", asked, Sampling(temperature, 10))
    plain = plain_model(ending)
    assert len({r.num_tokens for r in rollouts}) > 3
    for request, rollout in zip(asked, rollouts, strict=True):
        assert rollout.request is request
        expected = plain_token_logp(plain, rollout, temperature).detach()
        torch.testing.assert_close(rollout.sampler_logp_N.double(), expected, atol=1e-5, rtol=1e-5)


def test_the_end_token_is_kept_and_the_finish_reason_is_right(model, ending, prompts):
    _, encoder = model
    rollouts = EmbeddedEngine({"e": ending}, encoder).generate("e", requests(prompts, 8), Sampling(1.0, 10))
    end = encoder.end_token_id
    reasons = {"stop": 0, "length": 0}
    for rollout in rollouts:
        ids = rollout.response_ids_N.tolist()
        reasons[rollout.finish_reason] += 1
        assert end not in ids[:-1]
        assert len(rollout.sampler_logp_N) == len(ids) <= 10
        if rollout.finish_reason == "stop":
            assert ids[-1] == end
        else:
            assert len(ids) == 10
            assert ids[-1] != end
        assert rollout.text == encoder.decode(ids)
        assert not any(special in rollout.text for special in SPECIAL)
    assert min(reasons.values()) > 5


def test_an_end_token_at_the_length_limit_is_a_stop(model, prompts):
    policy, encoder = model
    engine = EmbeddedEngine({"e": biased(policy, {encoder.end_token_id: 100.0})}, encoder)
    for rollout in engine.generate("e", requests(prompts), Sampling(1.0, 1)):
        assert rollout.response_ids_N.tolist() == [encoder.end_token_id]
        assert (rollout.finish_reason, rollout.text) == ("stop", "")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_vision_and_padding_ids_are_never_sampled(model, prompts, temperature):
    policy, encoder = model
    vision = [encoder.tokenizer.convert_tokens_to_ids(t) for t in SPECIAL if "vision" in t or "pad" in t]
    assert len(vision) == 4
    assert set(encoder.suppressed_token_ids) == {*vision, encoder.tokenizer.pad_token_id}
    drawn_to_them = biased(policy, dict.fromkeys(encoder.suppressed_token_ids, 20.0))
    rollouts = EmbeddedEngine({"e": drawn_to_them}, encoder).generate("e", requests(prompts), Sampling(temperature, 6))
    plain = plain_model(drawn_to_them)
    for rollout in rollouts:
        assert not set(rollout.response_ids_N.tolist()) & set(encoder.suppressed_token_ids)
        # The log-prob is still the policy's own, over all of the vocabulary, as the trainer computes it.
        assert float(rollout.sampler_logp_N.max()) < -5
        expected = plain_token_logp(plain, rollout, temperature or 1.0).detach()
        torch.testing.assert_close(rollout.sampler_logp_N.double(), expected, atol=1e-4, rtol=1e-5)


def test_a_request_draws_the_same_whatever_else_is_in_the_batch(model, ending, prompts):
    """One by one; in reverse; shuffled; in turns of 5: sequences that end make the cache shrink at other steps."""
    _, encoder = model
    asked = requests(prompts)
    sampling = Sampling(1.0, 10)
    engine = EmbeddedEngine({"e": ending}, encoder)
    together = engine.generate("e", asked, sampling)
    alone = [engine.generate("e", [request], sampling)[0] for request in asked]
    assert len({r.num_tokens for r in together}) > 3
    assert_same(together, alone)
    assert_same(together, engine.generate("e", asked[::-1], sampling)[::-1])
    order = torch.randperm(len(asked), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = engine.generate("e", [asked[i] for i in order], sampling)
    assert_same([together[i] for i in order], shuffled)
    for limit in (1, 5, 24, 100):
        assert_same(together, EmbeddedEngine({"e": ending}, encoder, max_running=limit).generate("e", asked, sampling))


def test_longer_limits_extend_a_response(model, ending, prompts):
    """The n-th token depends on the seed and n alone, not on how many are allowed."""
    _, encoder = model
    engine = EmbeddedEngine({"e": ending}, encoder)
    short, long = (engine.generate("e", requests(prompts), Sampling(1.0, n)) for n in (4, 10))
    for a, b in zip(short, long, strict=True):
        assert a.response_ids_N.tolist() == b.response_ids_N.tolist()[:4]


def test_one_prompt_in_several_groups(model, ending, prompts):
    _, encoder = model
    text, image = prompts[:2]
    asked = [RolloutRequest(p, seed=i, group=i) for i, p in enumerate([text, image, text, image, text])]
    engine = EmbeddedEngine({"e": ending}, encoder)
    together = engine.generate("e", asked, Sampling(1.0, 8))
    assert_same(together, [engine.generate("e", [request], Sampling(1.0, 8))[0] for request in asked])


def test_seeds(model, prompts):
    policy, encoder = model
    engine = EmbeddedEngine({"e": policy}, encoder)
    asked = [RolloutRequest(prompts[0], seed, 0) for seed in (1, 2, 1, 3, 2**62 + 5)]
    first, second, again, third, large = (
        r.response_ids_N.tolist() for r in engine.generate("e", asked, Sampling(1, 8))
    )
    assert first == again
    assert len({tuple(ids) for ids in (first, second, third, large)}) == 4
    torch.manual_seed(123)  # the global generator plays no part
    state = torch.get_rng_state()
    assert engine.generate("e", asked[:1], Sampling(1, 8))[0].response_ids_N.tolist() == first
    assert torch.equal(torch.get_rng_state(), state)


def chi_square(counts_V: torch.Tensor, p_V: torch.Tensor) -> tuple[float, int]:
    """Pearson's statistic and degrees of freedom; tokens expected fewer than 5 times share one cell."""
    expected_V = p_V * counts_V.sum()
    rare_V = expected_V < 5
    observed = torch.cat([counts_V[~rare_V], counts_V[rare_V].sum()[None]])
    expected = torch.cat([expected_V[~rare_V], expected_V[rare_V].sum()[None]]).clamp(min=1e-3)
    return float(((observed - expected) ** 2 / expected).sum()), len(expected) - 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_softmax_at_the_temperature(model, prompts, temperature):
    policy, encoder = model
    generator = torch.Generator().manual_seed(0)
    # An untrained model is nearly uniform: give it favourites.
    policy = biased(policy, dict(enumerate((2 * torch.randn(384, generator=generator)).tolist())))
    prompt = prompts[1]
    asked = [RolloutRequest(prompt, seed, 0) for seed in range(6000)]
    rollouts = EmbeddedEngine({"e": policy}, encoder, max_running=2000).generate("e", asked, Sampling(temperature, 1))
    counts_V = torch.bincount(torch.cat([r.response_ids_N for r in rollouts]), minlength=384).double()
    plain = plain_model(policy)

    def distribution(at: float) -> torch.Tensor:
        p_V = plain_logp(plain, prompt, torch.tensor([0]), at)[0].detach().exp()
        p_V[list(encoder.suppressed_token_ids)] = 0
        return p_V / p_V.sum()

    statistic, freedom = chi_square(counts_V, distribution(temperature))
    assert freedom > 5
    assert abs(statistic - freedom) < 4 * (2 * freedom) ** 0.5
    # The same bound finds a wrong temperature.
    statistic, freedom = chi_square(counts_V, distribution(1.3 * temperature))
    assert statistic - freedom > 6 * (2 * freedom) ** 0.5


def test_temperature_0_takes_the_most_likely_token(model, prompts):
    policy, encoder = model
    plain = plain_model(policy)
    asked = [RolloutRequest(prompt, seed, group) for group, prompt in enumerate(prompts) for seed in (1, 2)]
    rollouts = EmbeddedEngine({"e": policy}, encoder).generate("e", asked, Sampling(0.0, 6))
    for rollout in rollouts:
        logp_NV = plain_logp(plain, rollout.request.prompt, rollout.response_ids_N).detach()
        allowed_NV = logp_NV.index_fill(1, torch.tensor(encoder.suppressed_token_ids), float("-inf"))
        assert rollout.response_ids_N.tolist() == allowed_NV.argmax(1).tolist()
        expected = logp_NV.gather(1, rollout.response_ids_N[:, None]).squeeze(1)
        torch.testing.assert_close(rollout.sampler_logp_N.double(), expected, atol=1e-5, rtol=1e-5)


def test_versions_are_stamped_per_expert(model, prompts):
    policy, encoder = model
    experts = {"a": policy.clone(), "b": policy.clone()}
    engine = EmbeddedEngine(experts, encoder)
    asked = requests(prompts[:1], 2)
    assert [r.weight_version for r in engine.generate("a", asked, Sampling(1, 2))] == [0, 0]
    engine.sync("a", experts["a"].named_parameters(), 7)
    assert [r.weight_version for r in engine.generate("a", asked, Sampling(1, 2))] == [7, 7]
    assert [r.weight_version for r in engine.generate("b", asked, Sampling(1, 2))] == [0, 0]


def test_changed_weights_are_seen_at_once(model, prompts):
    policy, encoder = model
    expert = policy.clone()
    engine = EmbeddedEngine({"e": expert}, encoder)
    asked = requests(prompts)
    before = engine.generate("e", asked, Sampling(1, 6))
    with torch.no_grad():
        for parameter in expert.named_parameters().values():
            parameter *= 1.1
    engine.sync("e", expert.named_parameters(), 1)
    after = engine.generate("e", asked, Sampling(1, 6))
    assert [r.response_ids_N.tolist() for r in before] != [r.response_ids_N.tolist() for r in after]
    plain = plain_model(expert)
    for rollout in after:
        expected = plain_token_logp(plain, rollout).detach()
        torch.testing.assert_close(rollout.sampler_logp_N.double(), expected, atol=1e-5, rtol=1e-5)


def test_sync_refuses_what_it_would_not_sample_with(model):
    policy, encoder = model
    engine = EmbeddedEngine({"e": policy}, encoder)
    own = policy.named_parameters()
    name = next(iter(own))
    with pytest.raises(ValueError, match="is not theirs"):
        engine.sync("e", own | {name: own[name].detach().clone()}, 1)
    with pytest.raises(ValueError, match="is not theirs"):
        engine.sync("e", policy.clone().named_parameters(), 1)
    with pytest.raises(ValueError, match=r"'no\.such\.name' is not theirs"):
        engine.sync("e", {"no.such.name": own[name]}, 1)


def test_unknown_experts(model, prompts):
    policy, encoder = model
    engine = EmbeddedEngine({"e": policy, "d": policy}, encoder)
    with pytest.raises(ValueError, match=r"no expert 'x' in this engine \(known: d, e\)"):
        engine.generate("x", requests(prompts), Sampling(1, 2))
    with pytest.raises(ValueError, match="no expert 'x'"):
        engine.sync("x", policy.named_parameters(), 1)
    engine.close()
    with pytest.raises(ValueError, match="no expert 'e'"):
        engine.generate("e", requests(prompts), Sampling(1, 2))


def test_no_requests_no_rollouts(model):
    policy, encoder = model
    assert EmbeddedEngine({"e": policy}, encoder).generate("e", [], Sampling(1, 2)) == []


def test_rollouts_may_be_used_in_autograd(model, prompts):
    policy, encoder = model
    rollout = EmbeddedEngine({"e": policy}, encoder).generate("e", requests(prompts[:1], 1), Sampling(1, 4))[0]
    assert not rollout.response_ids_N.is_inference()
    assert not rollout.sampler_logp_N.is_inference()
