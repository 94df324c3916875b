"""The embedded engine: samples with the trainer's own modules, so a weight sync moves nothing.

A prompt is prefilled once for all its requests in one packed forward; its keys and values are repeated for the group.
Each request draws from a random stream of its own (one uniform number per token, inverse of the cumulative
distribution), so its tokens do not depend on what else is in the batch, up to rounding of the logits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from copd_engine.models.base import Policy, PromptEncoder
from copd_engine.models.cache import DecodeCache, PrefillCache
from copd_engine.packing import pack
from copd_engine.rollout.base import RolloutEngine, Sampling
from copd_engine.types import EncodedPrompt, Rollout, RolloutRequest


class EmbeddedEngine(RolloutEngine):
    """Implements :class:`copd_engine.rollout.base.RolloutEngine` over the trainer's policies.

    ``max_sequences``: how many sequences decode side by side; more requests are served in turns.
    """

    def __init__(self, policies: Mapping[str, Policy], encoder: PromptEncoder, max_sequences: int = 512) -> None:
        self._policies = dict(policies)
        self._encoder = encoder
        self._max_sequences = max_sequences
        self._versions = dict.fromkeys(policies, 0)

    def sync(self, expert: str, named_tensors: Mapping[str, torch.Tensor], version: int) -> None:
        """The tensors must be the policy's own storage; raises ValueError for copies, which would never be used."""
        own = self._policy(expert).named_parameters()
        for name, tensor in named_tensors.items():
            if name not in own or own[name].data_ptr() != tensor.data_ptr():
                raise ValueError(
                    f"embedded engine: {expert!r} samples with the trainer's modules; {name!r} is not theirs"
                )
        self._versions[expert] = version

    def generate(self, expert: str, requests: Sequence[RolloutRequest], sampling: Sampling) -> list[Rollout]:
        policy = self._policy(expert)
        rollouts: list[Rollout] = []
        # Requests of one prompt stand together, whatever their groups, so a turn prefills each prompt once.
        first: dict[int, int] = {}
        for i, request in enumerate(requests):
            first.setdefault(id(request.prompt), i)
        order = sorted(range(len(requests)), key=lambda i: first[id(requests[i].prompt)])
        for start in range(0, len(order), self._max_sequences):
            turn = [requests[i] for i in order[start : start + self._max_sequences]]
            rollouts += self._generate_turn(policy, turn, sampling, self._versions[expert])
        by_request = dict(zip(order, rollouts, strict=True))
        return [by_request[i] for i in range(len(requests))]

    def close(self) -> None:
        self._policies.clear()

    def _policy(self, expert: str) -> Policy:
        if expert not in self._policies:
            raise ValueError(f"no expert {expert!r} in this engine (known: {', '.join(sorted(self._policies))})")
        return self._policies[expert]

    def _generate_turn(
        self, policy: Policy, requests: Sequence[RolloutRequest], sampling: Sampling, version: int
    ) -> list[Rollout]:
        prompts: list[EncodedPrompt] = []
        repeats: list[int] = []
        for request in requests:
            if not prompts or prompts[-1] is not request.prompt:
                prompts.append(request.prompt)
                repeats.append(0)
            repeats[-1] += 1
        token_ids_BN, logp_BN, num_tokens_B = self._sample(policy, prompts, torch.tensor(repeats), requests, sampling)
        rollouts = []
        for request, ids_N, logp_N, num in zip(requests, token_ids_BN, logp_BN, num_tokens_B.tolist(), strict=True):
            response_ids_N = ids_N[:num].clone()  # out of inference mode: autograd may keep a copy
            stopped = num > 0 and int(response_ids_N[-1]) == self._encoder.end_token_id
            rollouts.append(
                Rollout(
                    request=request,
                    response_ids_N=response_ids_N,
                    sampler_logp_N=logp_N[:num].clone(),
                    finish_reason="stop" if stopped else "length",
                    weight_version=version,
                    text=self._encoder.decode(response_ids_N.tolist()),
                )
            )
        return rollouts

    @torch.inference_mode()
    def _sample(
        self,
        policy: Policy,
        prompts: Sequence[EncodedPrompt],
        repeats_P: torch.Tensor,
        requests: Sequence[RolloutRequest],
        sampling: Sampling,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token ids int64 ``[B, max_new_tokens]``, their log-probs fp32, and how many of each row are real ``[B]``."""
        encoder = self._encoder
        empty = torch.empty(0, dtype=torch.int64)
        batch = pack(prompts, [empty] * len(prompts), encoder.visual_token_ids, encoder.spatial_merge_size)
        device = policy.device
        batch, repeats_P = batch.to(device), repeats_P.to(device)
        prefill = PrefillCache()
        hidden_BD = policy.hidden_states(batch, prefill).repeat_interleave(repeats_P, 0)
        cache = DecodeCache(prefill, batch.prompt_lengths_P, repeats_P, sampling.max_new_tokens)
        uniform_BN = _uniforms([request.seed for request in requests], sampling.max_new_tokens).to(device)
        position_P = torch.tensor([prompt.next_position for prompt in prompts], device=device)
        position_B = position_P.repeat_interleave(repeats_P)

        size = (len(requests), sampling.max_new_tokens)
        token_ids_BN = torch.zeros(size, dtype=torch.int64, device=device)
        logp_BN = torch.zeros(size, device=device)
        num_tokens_B = torch.full(size[:1], sampling.max_new_tokens, device=device)
        row_B = torch.arange(len(requests), device=device)  # request of each sequence still in the batch
        active_B = torch.ones(len(requests), dtype=torch.bool, device=device)
        for step in range(sampling.max_new_tokens):
            token_B, token_logp_B = self._draw(policy, hidden_BD, uniform_BN[row_B, step], sampling.temperature)
            token_ids_BN[row_B[active_B], step] = token_B[active_B]
            logp_BN[row_B[active_B], step] = token_logp_B[active_B]
            ended_B = active_B & (token_B == encoder.end_token_id)
            num_tokens_B[row_B[ended_B]] = step + 1
            active_B &= ~ended_B
            num_active = int(active_B.sum())
            if num_active == 0 or step + 1 == sampling.max_new_tokens:
                break
            if num_active <= 0.75 * len(active_B):  # a copy of the cache pays off only when it drops enough
                kept = active_B.nonzero().squeeze(1)
                cache.keep(kept)
                token_B, row_B, position_B, active_B = token_B[kept], row_B[kept], position_B[kept], active_B[kept]
            hidden_BD = policy.decode_step(token_B, position_B, cache)
            position_B = position_B + 1
        return token_ids_BN.cpu(), logp_BN.cpu(), num_tokens_B.cpu()

    def _draw(
        self, policy: Policy, hidden_BD: torch.Tensor, uniform_B: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Next tokens and their log-probs under the policy at the sampling temperature.

        Suppressed ids are left out of the draw; the log-prob is the policy's own over the whole vocabulary, as the
        trainer computes it.
        """
        logits_BV = torch.nn.functional.linear(hidden_BD, policy.lm_head_weight, policy.lm_head_bias).float()
        logp_BV = torch.log_softmax(logits_BV / (temperature or 1.0), dim=-1)
        suppressed = torch.tensor(self._encoder.suppressed_token_ids, dtype=torch.int64, device=logp_BV.device)
        allowed_BV = logp_BV.index_fill(1, suppressed, float("-inf"))
        if temperature == 0:
            token_B = allowed_BV.argmax(-1)
        else:
            cumulative_BV = allowed_BV.double().exp_().cumsum_(-1)
            threshold_B1 = uniform_B[:, None] * cumulative_BV[:, -1:]
            token_B = torch.searchsorted(cumulative_BV, threshold_B1, right=True).squeeze(1)
            token_B = token_B.clamp_(max=logits_BV.shape[1] - 1)
        return token_B, logp_BV.gather(1, token_B[:, None]).squeeze(1)


def _uniforms(seeds: Sequence[int], count: int) -> torch.Tensor:
    """Uniform numbers in [0, 1), fp64 ``[len(seeds), count]``, one stream per seed."""
    generator = torch.Generator()
    return torch.stack(
        [torch.rand(count, generator=generator.manual_seed(seed), dtype=torch.float64) for seed in seeds]
    )
