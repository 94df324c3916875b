"""What every rollout engine must do, whatever samples inside: one suite for all of them.

A test module subclasses :class:`RolloutSuite` and has a fixture ``subject``. The truth is transformers' own forward of
what was sampled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from transformers import PreTrainedModel

from copd_engine.models.base import Policy, PromptEncoder
from copd_engine.rollout.base import RolloutEngine, Sampling
from copd_engine.types import EncodedPrompt, Rollout, RolloutRequest
from tests.plain import plain_logp, plain_model, plain_token_logp


@dataclass
class Subject:
    """An engine and the policies that it samples for; ``prompts``: text, image and video in turn."""

    engine: RolloutEngine
    policies: Mapping[str, Policy]
    encoder: PromptEncoder
    prompts: Sequence[EncodedPrompt]
    versions: dict[str, int] = field(default_factory=dict)
    tolerance: float = 1e-4  # of a log-prob in fp32

    def change(self, expert: str, seed: int, scale: float = 0.02) -> int:
        """Another set of weights for ``expert``, all modalities' among them, in place and synced; its version."""
        generator = torch.Generator().manual_seed(seed)
        parameters = self.policies[expert].named_parameters()
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.add_((scale * torch.randn(parameter.shape, generator=generator)).to(parameter))
        self.versions[expert] = self.versions.get(expert, 0) + 1
        self.engine.sync(expert, parameters, self.versions[expert])
        return self.versions[expert]

    def plain(self, expert: str) -> PreTrainedModel:
        """transformers' model of an expert as it is now, in fp32 on the CPU."""
        return plain_model(self.policies[expert]).cpu().float()

    def requests(self, group_size: int = 2) -> list[RolloutRequest]:
        return [
            RolloutRequest(prompt, seed=1000 * group + member, group=group)
            for group, prompt in enumerate(self.prompts)
            for member in range(group_size)
        ]

    def check(self, expert: str, rollouts: Sequence[Rollout], temperature: float = 1.0) -> float:
        """Log-probs and version against the policy as it is now; returns the largest difference."""
        plain = self.plain(expert)
        worst = 0.0
        for rollout in rollouts:
            assert rollout.weight_version == self.versions[expert]
            expected = plain_token_logp(plain, rollout, temperature or 1.0).detach()
            worst = max(worst, float((rollout.sampler_logp_N.double() - expected).abs().max()))
        assert worst < self.tolerance
        return worst


def ids(rollouts: Sequence[Rollout]) -> list[list[int]]:
    return [rollout.response_ids_N.tolist() for rollout in rollouts]


class RolloutSuite:
    @pytest.mark.parametrize("temperature", [1.0, 0.6])
    def test_log_probs_of_text_image_and_video_equal_transformers(self, subject: Subject, temperature: float) -> None:
        asked = subject.requests()
        rollouts = subject.engine.generate("a", asked, Sampling(temperature, 20))
        assert all(rollout.request is request for rollout, request in zip(rollouts, asked, strict=True))
        assert len({rollout.num_tokens for rollout in rollouts}) > 2
        subject.check("a", rollouts, temperature)

    def test_temperature_0_takes_the_most_likely_token(self, subject: Subject) -> None:
        rollouts = subject.engine.generate("a", subject.requests(1), Sampling(0.0, 20))
        subject.check("a", rollouts, 0.0)
        plain = subject.plain("a")
        for rollout in rollouts:
            logp_NV = plain_logp(plain, rollout.request.prompt, rollout.response_ids_N).detach()
            logp_NV[:, list(subject.encoder.suppressed_token_ids)] = float("-inf")
            assert rollout.response_ids_N.tolist() == logp_NV.argmax(-1).tolist()

    def test_the_end_token_is_kept_and_the_finish_reason_is_right(self, subject: Subject) -> None:
        end = subject.encoder.end_token_id
        reasons = set()
        for length in (4, 40):
            for rollout in subject.engine.generate("a", subject.requests(), Sampling(1.0, length)):
                tokens = rollout.response_ids_N.tolist()
                assert end not in tokens[:-1]
                assert len(rollout.sampler_logp_N) == len(tokens) <= length
                assert rollout.finish_reason == ("stop" if tokens[-1] == end else "length")
                assert len(tokens) == length or rollout.finish_reason == "stop"
                assert rollout.text == subject.encoder.decode(tokens)
                reasons.add(rollout.finish_reason)
        assert reasons == {"stop", "length"}

    def test_a_request_draws_the_same_whatever_else_is_in_the_batch(self, subject: Subject) -> None:
        asked = subject.requests(3)
        together = subject.engine.generate("a", asked, Sampling(1.0, 20))
        assert len({tuple(tokens) for tokens in ids(together[:3])}) > 1  # members of a group differ
        backwards = subject.engine.generate("a", asked[::-1], Sampling(1.0, 20))
        assert ids(backwards[::-1]) == ids(together)
        for request, rollout in list(zip(asked, together, strict=True))[::4]:
            assert ids(subject.engine.generate("a", [request], Sampling(1.0, 20))) == ids([rollout])

    def test_groups_come_whole_and_all_of_them(self, subject: Subject) -> None:
        asked = subject.requests(3)
        expected = ids(subject.engine.generate("a", asked, Sampling(1.0, 20)))
        groups = list(subject.engine.generate_groups("a", asked, Sampling(1.0, 20)))
        assert len(groups) == len(subject.prompts)
        for group in groups:
            number = group[0].request.group
            assert [rollout.request for rollout in group] == asked[3 * number : 3 * number + 3]
            assert ids(group) == expected[3 * number : 3 * number + 3]

    def test_each_sync_is_seen_by_every_modality(self, subject: Subject) -> None:
        for seed in (1, 2, 3):
            before = subject.engine.generate("a", subject.requests(1), Sampling(1.0, 20))
            version = subject.change("a", seed)
            after = subject.engine.generate("a", subject.requests(1), Sampling(1.0, 20))
            assert {rollout.weight_version for rollout in after} == {version}
            subject.check("a", after)
            pairs = zip(before, after, strict=True)
            assert all(abs(float(a.sampler_logp_N[0] - b.sampler_logp_N[0])) > 1e-6 for a, b in pairs)

    def test_experts_keep_their_own_weights(self, subject: Subject) -> None:
        first = subject.engine.generate("a", subject.requests(), Sampling(1.0, 20))
        other = subject.engine.generate("b", subject.requests(), Sampling(1.0, 20))
        again = subject.engine.generate("a", subject.requests(), Sampling(1.0, 20))
        subject.check("a", first)
        subject.check("b", other)
        subject.check("a", again)
        assert ids(first) == ids(again) != ids(other)

    def test_experts_in_one_call(self, subject: Subject) -> None:
        asked = subject.requests()
        expected = {name: ids(subject.engine.generate(name, asked, Sampling(1.0, 20))) for name in "ab"}
        found: dict[str, dict[int, list[Rollout]]] = {"a": {}, "b": {}}
        for name, group in subject.engine.generate_mixed({"a": asked, "b": asked}, Sampling(1.0, 20)):
            found[name][group[0].request.group] = group
        for name, groups in found.items():
            rollouts = [rollout for number in sorted(groups) for rollout in groups[number]]
            subject.check(name, rollouts)
            assert ids(rollouts) == expected[name]

    def test_it_samples_on_after_sleep(self, subject: Subject) -> None:
        before = subject.engine.generate("a", subject.requests(), Sampling(1.0, 20))
        subject.engine.sleep()
        subject.engine.wake()
        after = subject.engine.generate("a", subject.requests(), Sampling(1.0, 20))
        assert ids(after) == ids(before)
        subject.check("a", after)
        subject.engine.sleep()  # sampling wakes it
        assert ids(subject.engine.generate("a", subject.requests(), Sampling(1.0, 20))) == ids(before)

    def test_an_unknown_expert_is_an_error(self, subject: Subject) -> None:
        with pytest.raises(ValueError, match=r"no expert 'c'.*known: a, b"):
            subject.engine.generate("c", subject.requests(1), Sampling(1.0, 4))

    def test_no_requests_give_no_rollouts(self, subject: Subject) -> None:
        assert subject.engine.generate("a", [], Sampling(1.0, 4)) == []

    def test_suppressed_ids_are_never_sampled_and_log_probs_are_of_the_whole_vocabulary(self, subject: Subject) -> None:
        """Last: it leaves expert b with weights that are drawn to them."""
        suppressed = list(subject.encoder.suppressed_token_ids)
        policy = subject.policies["b"]
        drawn_to = [subject.encoder.tokenizer.convert_tokens_to_ids(str(digit)) for digit in range(10)]
        head = policy.lm_head_weight
        with torch.no_grad():
            # As likely as a digit and more, wherever one is likely; a frozen head does not travel with the adapters.
            if head.requires_grad:
                for number, token in enumerate(suppressed):
                    head[token] = 1.2 * head[drawn_to[number]]
        subject.change("b", 9, scale=0.0)
        for temperature in (0.0, 1.0):
            rollouts = subject.engine.generate("b", subject.requests(), Sampling(temperature, 12))
            for rollout in rollouts:
                assert not set(rollout.response_ids_N.tolist()) & set(suppressed)
            subject.check("b", rollouts, temperature)
        if head.requires_grad:
            plain = subject.plain("b")
            masses = [
                float(plain_logp(plain, r.request.prompt, r.response_ids_N).detach()[:, suppressed].exp().sum(-1).max())
                for r in rollouts
            ]
            assert max(masses) > 0.5
