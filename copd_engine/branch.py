"""One expert in training: its policy, its optimizer, its weight version, and one parameter update."""

from __future__ import annotations

import math
from collections import ChainMap, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from copd_kernels import linear_logprob, linear_policy_loss

from copd_engine.config import ObjectiveConfig, OptimConfig
from copd_engine.master_weights import MasterWeights
from copd_engine.micro_batches import CostModel, split_micro_batches
from copd_engine.models.base import Policy, PromptEncoder
from copd_engine.objectives import TrainSample
from copd_engine.packing import pack
from copd_engine.types import PackedBatch, Rollout


@dataclass
class _Totals:
    """Running sums over the tokens of one step."""

    loss: float = 0.0
    num_tokens: int = 0
    num_packed_tokens: int = 0
    entropy: float = 0.0
    clipped: float = 0.0
    ratio: float = 0.0
    mismatch: float = 0.0
    mismatch_max: float = 0.0
    terms: dict[str, dict[str, float]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(float)))


class Branch:
    """A policy that is trained.

    ``parameters`` are the trainable ones in the model's dtype, ``masters`` what the optimizer steps: the same in fp32.
    ``version`` counts the parameter updates, ``num_skipped`` those left out for a NaN or infinite loss or gradient.
    """

    def __init__(
        self,
        name: str,
        policy: Policy,
        encoder: PromptEncoder,
        optim: OptimConfig,
        objective: ObjectiveConfig,
        temperature: float,
        beta: float = 1.0,
    ) -> None:
        self.name = name
        self.policy = policy
        self.beta = beta
        self.version = 0
        self.num_skipped = 0
        self.num_skipped_in_a_row = 0
        self._encoder = encoder
        self._optim = optim
        self._objective = objective
        self._temperature = temperature
        self._cost = CostModel.of(**policy.sizes)
        self.parameters = policy.named_parameters()
        self.masters = MasterWeights(self.parameters)
        self.optimizer = torch.optim.AdamW(
            self.masters.tensors.values(),
            lr=optim.lr,
            betas=optim.betas,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            fused=True,
        )

    def pack(self, rollouts: Sequence[Rollout], terms: Sequence[int] = (), num_terms: int = 1) -> PackedBatch:
        """The rollouts in one row, on the policy's device; ``terms``: the loss term of each, by number."""
        return pack(
            [rollout.request.prompt for rollout in rollouts],
            [rollout.response_ids_N for rollout in rollouts],
            self._encoder.visual_token_ids,
            self._encoder.spatial_merge_size,
            group_ids=[rollout.request.group for rollout in rollouts],
            term_ids=terms or None,
            num_terms=num_terms,
            pad_to_multiple_of=self._optim.pad_to_multiple_of,
        ).to(self.policy.device)

    def full_parameters(self) -> Mapping[str, torch.Tensor]:
        """All weights of the plain model by name, as training has them: fp32 masters, adapters folded in, detached."""
        full = self.policy.full_parameters(torch.float32)
        return ChainMap({name: m.detach() for name, m in self.masters.tensors.items() if name in full}, full)  # type: ignore[arg-type]

    @torch.no_grad()
    def score(self, rollouts: Sequence[Rollout]) -> list[torch.Tensor]:
        """Log-probs fp32 ``[N]`` on the CPU of each rollout's tokens under this branch, at the sampling temperature."""
        scores: dict[int, torch.Tensor] = {}
        for indexes in self.micro_batches(rollouts):
            batch = self.pack([rollouts[i] for i in indexes])
            logp_N = self._logp(self.policy.hidden_states(batch), batch.target_N).cpu()
            scores.update(zip(indexes, logp_N.split([rollouts[i].num_tokens for i in indexes]), strict=True))
        return [scores[i] for i in range(len(rollouts))]

    def update(self, samples: Sequence[TrainSample]) -> dict[str, Any]:
        """One step's parameter updates from ``samples``; returns metrics.

        The samples are split by whole groups into ``updates_per_step`` optimizer updates. Old log-probs are those of
        the parameters before the first update: taken from the update's own forward where nothing has changed yet
        (ratio exactly 1), from a scoring pass before it otherwise. An update with a NaN or infinite loss or gradient
        is left out and counted.
        """
        parts = _split_groups(samples, self._objective.updates_per_step)
        later = [sample for part in parts[1:] for sample in part]
        old_logp = dict(zip(map(id, later), self.score([s.rollout for s in later]), strict=True)) if later else {}
        totals, grad_norms, skipped = _Totals(), [], False
        for part in parts:
            # Weights sum to 1 per term over the step; each update must weigh as much as a whole step.
            scale = float(len(parts))
            loss = sum(
                self._accumulate([part[i] for i in indexes], old_logp, scale, totals) for indexes in self._batches(part)
            )
            grad_norm = float(
                torch.nn.utils.clip_grad_norm_(self.masters.tensors.values(), self._optim.max_grad_norm, foreach=True)
            )
            if math.isfinite(loss) and math.isfinite(grad_norm):
                self.optimizer.step()
                self.masters.round_into_model()
                self.version += 1
                self.num_skipped_in_a_row = 0
                totals.loss += loss / scale
                grad_norms.append(grad_norm)
            else:
                skipped = True
                self.num_skipped += 1
                self.num_skipped_in_a_row += 1
            self.optimizer.zero_grad(set_to_none=True)
        return self._metrics(totals, grad_norms, skipped)

    def _accumulate(
        self, samples: Sequence[TrainSample], old_logp: dict[int, torch.Tensor], scale: float, totals: _Totals
    ) -> float:
        """Forward and backward of one micro-batch; adds to the gradients and to ``totals``; returns the loss."""
        names = list(dict.fromkeys(sample.term for sample in samples))
        batch = self.pack([s.rollout for s in samples], [names.index(s.term) for s in samples], len(names))
        lengths = [sample.rollout.num_tokens for sample in samples]
        hidden_ND = self.policy.hidden_states(batch)
        if id(samples[0]) in old_logp:
            old_logp_N = torch.cat([old_logp[id(sample)] for sample in samples])
        else:
            with torch.no_grad():
                old_logp_N = self._logp(hidden_ND, batch.target_N).cpu()
        advantage_N = torch.cat(
            [sample.advantages(old) for sample, old in zip(samples, old_logp_N.split(lengths), strict=True)]
        )
        weight_N = torch.tensor([sample.token_weight * scale for sample in samples])
        weight_N = weight_N.repeat_interleave(torch.tensor(lengths))
        result = linear_policy_loss(
            hidden_ND,
            self.policy.lm_head_weight,
            batch.target_N,
            advantage_T=advantage_N.to(hidden_ND.device),
            old_logp_T=old_logp_N.to(hidden_ND.device),
            loss_weight_T=weight_N.to(hidden_ND.device),
            clip_low=self._objective.clip_low,
            clip_high=self._objective.clip_high,
            bias_V=self.policy.lm_head_bias,
            temperature=self._temperature,
        )
        result.loss.backward()
        loss = float(result.loss.detach())
        mismatch_N = (torch.cat([sample.rollout.sampler_logp_N for sample in samples]) - old_logp_N).abs()
        totals.num_tokens += len(weight_N)
        totals.num_packed_tokens += batch.num_tokens
        totals.entropy += float(result.entropy_T.sum())
        totals.clipped += float(result.clipped_T.sum())
        totals.ratio += float(result.ratio_T.sum())
        totals.mismatch += float(mismatch_N.sum())
        totals.mismatch_max = max(totals.mismatch_max, float(mismatch_N.max()))
        self._add_terms(samples, names, batch, result.loss_T.cpu() / scale, old_logp_N, totals)
        return loss

    @staticmethod
    def _add_terms(
        samples: Sequence[TrainSample],
        names: Sequence[str],
        batch: PackedBatch,
        loss_N: torch.Tensor,
        old_logp_N: torch.Tensor,
        totals: _Totals,
    ) -> None:
        """Sums over the tokens of each loss term, which are never mixed."""
        term_ids_B = batch.term_ids_B.cpu()
        term_ids_N = term_ids_B[batch.sequence_N.cpu()]
        old = old_logp_N.split([sample.rollout.num_tokens for sample in samples])
        # GRPO's samples have no teacher, hence no difference to one.
        teacher = [o if s.teacher_logp_N is None else s.teacher_logp_N for s, o in zip(samples, old, strict=True)]
        delta_N = torch.cat(teacher) - old_logp_N
        sums = torch.zeros(2, len(names), dtype=torch.float64)
        sums.index_add_(1, term_ids_N, torch.stack([loss_N, delta_N]).double())
        num_responses = torch.bincount(term_ids_B, minlength=len(names))
        for number, name in enumerate(names):
            term = totals.terms[name]
            term["loss"] += float(sums[0, number])
            term["delta_sum"] += float(sums[1, number])
            term["num_tokens"] += int(batch.term_tokens[number])
            term["num_responses"] += int(num_responses[number])

    def _logp(self, hidden_ND: torch.Tensor, target_N: torch.Tensor) -> torch.Tensor:
        return linear_logprob(
            hidden_ND,
            self.policy.lm_head_weight,
            target_N,
            bias_V=self.policy.lm_head_bias,
            temperature=self._temperature,
        ).logp_T

    def micro_batches(self, rollouts: Sequence[Rollout]) -> list[list[int]]:
        """Indexes of rollouts that one forward takes."""
        return split_micro_batches(
            [rollout.request.prompt for rollout in rollouts],
            [rollout.num_tokens for rollout in rollouts],
            self._optim.max_tokens_per_micro_batch,
            self._cost,
        )

    def _batches(self, samples: Sequence[TrainSample]) -> list[list[int]]:
        return self.micro_batches([sample.rollout for sample in samples])

    def _metrics(self, totals: _Totals, grad_norms: list[float], skipped: bool) -> dict[str, Any]:
        tokens = totals.num_tokens
        terms: dict[str, dict[str, float]] = {}
        for name, sums in totals.terms.items():
            terms[name] = {key: sums[key] for key in ("loss", "num_tokens", "num_responses")}
            if name.startswith("opd:"):
                # The mean of -delta over the student's own tokens estimates KL(student || teacher).
                terms[name]["delta_mean"] = sums["delta_sum"] / sums["num_tokens"]
                terms[name]["reverse_kl"] = -terms[name]["delta_mean"]
        return {
            "version": self.version,
            "loss": totals.loss if grad_norms else None,
            "grad_norm": sum(grad_norms) / len(grad_norms) if grad_norms else None,
            "lr": self._optim.lr,
            "skipped": skipped,
            "num_skipped": self.num_skipped,
            "num_tokens": tokens,
            "num_packed_tokens": totals.num_packed_tokens,
            "entropy": totals.entropy / tokens if tokens else None,
            "clip_fraction": totals.clipped / tokens if tokens else None,
            "ratio_mean": totals.ratio / tokens if tokens else None,
            "mismatch_mean": totals.mismatch / tokens if tokens else None,
            "mismatch_max": totals.mismatch_max if tokens else None,
            "terms": terms,
        }


def _split_groups(samples: Sequence[TrainSample], parts: int) -> list[list[TrainSample]]:
    """Whole groups dealt in turn over ``parts`` updates, so that each sees every term."""
    groups: dict[tuple[str, int], list[TrainSample]] = {}
    for sample in samples:
        groups.setdefault((sample.term, sample.rollout.request.group), []).append(sample)
    split: list[list[TrainSample]] = [[] for _ in range(parts)]
    for index, group in enumerate(groups.values()):
        split[index % parts] += group
    return [part for part in split if part]
