"""The loss of one micro-batch: what the config's objective is in terms of the fused kernel's arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from copd_kernels import linear_divergence, linear_logprob, linear_policy_loss

from copd_engine.config import DistillationConfig, ObjectiveConfig
from copd_engine.models.base import Policy
from copd_engine.objectives import LmHead, TrainSample, as_clipped_surrogate, importance_correction
from copd_engine.types import PackedBatch

#: The kernel's names of the divergences by ``distillation.signal``.
DIVERGENCES = {"full": "reverse_kl", "forward": "forward_kl", "jsd": "jsd"}


class OldPolicy(NamedTuple):
    """The policy before the step's first update, fp32 ``[N]`` on the CPU: log-probs of the tokens; under
    ``sampled_cv``, else None: (OPD-DELTA) and the exact KL(student || teacher) at each token's state."""

    logp_N: torch.Tensor
    delta_N: torch.Tensor | None = None
    teacher_kl_N: torch.Tensor | None = None

    def split(self, lengths: Sequence[int]) -> list[OldPolicy]:
        """That of each response."""
        columns = [[None] * len(lengths) if x is None else x.split(list(lengths)) for x in self]
        return [OldPolicy(*values) for values in zip(*columns, strict=True)]

    @staticmethod
    def cat(parts: Sequence[OldPolicy]) -> OldPolicy:
        """Of responses behind one another."""
        logp, *others = zip(*parts, strict=True)
        return OldPolicy(torch.cat(logp), *(None if column[0] is None else torch.cat(column) for column in others))


@dataclass(frozen=True)
class MicroBatch:
    """Samples in one packed row, the policy's hidden states ``[N, D]`` at their response rows, with gradient, and the
    policy before the step's first update. ``has_moved``: not the policy of now. ``scale`` of all loss weights."""

    samples: Sequence[TrainSample]
    batch: PackedBatch
    hidden_ND: torch.Tensor
    old: OldPolicy
    has_moved: bool = False
    scale: float = 1.0

    @property
    def lengths(self) -> list[int]:
        return [sample.rollout.num_tokens for sample in self.samples]

    def per_token(self, values_B: Sequence[float]) -> torch.Tensor:
        """One number of each sample at all of its tokens, fp32 ``[N]`` on the CPU."""
        return torch.tensor(values_B, dtype=torch.float32).repeat_interleave(torch.tensor(self.lengths))

    @property
    def weights(self) -> torch.Tensor:
        """Loss weights fp32 ``[N]``."""
        return self.per_token([sample.token_weight * self.scale for sample in self.samples])


class MicroBatchLoss(NamedTuple):
    """The loss, and its parts and measurements by name, fp32 ``[N]`` on the CPU, without gradient."""

    loss: torch.Tensor
    columns: dict[str, torch.Tensor]


class BatchLoss:
    """Loss of micro-batches of one policy.

    One call of the kernel compares the policy with one other head, so a micro-batch holds samples of one
    :meth:`head_of`. ``reference``: the base model, needed where ``objective.kl.weight`` is above 0.
    """

    def __init__(
        self,
        policy: Policy,
        objective: ObjectiveConfig,
        distillation: DistillationConfig,
        temperature: float,
        reference: Policy | None = None,
    ) -> None:
        if objective.kl.weight > 0 and reference is None:
            raise ValueError(f"objective.kl.weight = {objective.kl.weight} needs the reference policy")
        self.policy = policy
        self.objective = objective
        self.distillation = distillation
        self.temperature = temperature
        self.reference = reference if objective.kl.weight > 0 else None

    def head_of(self, sample: TrainSample) -> LmHead | Policy | None:
        """What the sample's loss compares the policy with over the whole vocabulary."""
        if sample.is_distilled:
            return None if sample.teacher is None else sample.teacher.head
        return self.reference if self.objective.kl.estimator == "full" else None

    @torch.no_grad()
    def logp(self, hidden_ND: torch.Tensor, target_N: torch.Tensor, policy: Policy | None = None) -> torch.Tensor:
        """Log-probs fp32 ``[N]`` on the CPU at the sampling temperature, of this policy or of another."""
        policy = policy or self.policy
        scores = linear_logprob(
            hidden_ND,
            policy.lm_head_weight,
            target_N,
            bias_V=policy.lm_head_bias,
            temperature=self.temperature,
        )
        return scores.logp_T.cpu()

    @torch.no_grad()
    def old_policy(self, samples: Sequence[TrainSample], batch: PackedBatch, hidden_ND: torch.Tensor) -> OldPolicy:
        """The policy as it is now."""
        if self.distillation.signal != "sampled_cv" or samples[0].teacher is None:
            return OldPolicy(self.logp(hidden_ND, batch.target_N))
        head = samples[0].teacher.head
        measured = linear_divergence(
            hidden_ND,
            self.policy.lm_head_weight,
            _teacher_hidden(samples, hidden_ND.device),
            head.weight_VD,
            batch.target_N,
            student_bias_V=self.policy.lm_head_bias,
            teacher_bias_V=head.bias_V,
            temperature=self.temperature,
            top_k=1,
        )
        assert measured.student_logp_T is not None
        assert measured.delta_T is not None
        # The kernel's delta is student less teacher.
        return OldPolicy(measured.student_logp_T.cpu(), -measured.delta_T.cpu(), measured.kl_student_teacher_T.cpu())

    def __call__(self, micro: MicroBatch) -> MicroBatchLoss:
        """The weighted sum over the tokens, and what it consists of."""
        mismatch_N = micro.old.logp_N - torch.cat([sample.rollout.sampler_logp_N for sample in micro.samples])
        if self.distillation.is_loss and micro.samples[0].teacher is not None:
            loss, columns = self._divergence(micro)
        else:
            loss, columns = self._surrogate(micro, mismatch_N)
        columns |= {"mismatch": mismatch_N.abs(), "mismatch_kl": torch.expm1(mismatch_N) - mismatch_N}
        return MicroBatchLoss(loss, {name: column_N.detach().float().cpu() for name, column_N in columns.items()})

    def _divergence(self, micro: MicroBatch) -> MicroBatchLoss:
        """beta times the exact divergence from the teacher."""
        device = micro.hidden_ND.device
        assert micro.samples[0].teacher is not None
        head = micro.samples[0].teacher.head
        weight_N = micro.weights * micro.per_token([sample.beta for sample in micro.samples])
        result = linear_policy_loss(
            micro.hidden_ND,
            self.policy.lm_head_weight,
            micro.batch.target_N,
            teacher_hidden_TD=_teacher_hidden(micro.samples, device),
            teacher_weight_VD=head.weight_VD,
            teacher_bias_V=head.bias_V,
            divergence=DIVERGENCES[self.distillation.signal],
            divergence_weight_T=weight_N.to(device),
            jsd_beta=self.distillation.jsd_beta,
            bias_V=self.policy.lm_head_bias,
            temperature=self.temperature,
        )
        measured = result.teacher
        assert measured is not None
        assert measured.delta_T is not None
        columns = {
            "loss": result.loss_T,
            "entropy": result.entropy_T,
            "delta": -measured.delta_T,
            "exact_reverse_kl": measured.kl_student_teacher_T,
            "exact_forward_kl": measured.kl_teacher_student_T,
        }
        if measured.jsd_T is not None:
            columns["exact_jsd"] = measured.jsd_T
        return MicroBatchLoss(result.loss, columns)

    def _surrogate(self, micro: MicroBatch, mismatch_N: torch.Tensor) -> MicroBatchLoss:
        """Per-token advantages in the surrogate, and GRPO's KL to the reference."""
        objective, old, hidden_ND, batch = self.objective, micro.old, micro.hidden_ND, micro.batch
        columns = _distances(micro)
        advantage_N = self._advantages(micro)
        correction_N = torch.ones_like(mismatch_N)
        if objective.importance_correction.mode != "none":
            correction_N, capped_N = importance_correction(mismatch_N, objective.importance_correction)
            columns |= {"correction": correction_N, "correction_capped": capped_N}
        arguments: dict[str, Any] = {}
        if self.reference is not None and not all(sample.is_distilled for sample in micro.samples):
            kl_weight_N = objective.kl.weight * micro.per_token([not s.is_distilled for s in micro.samples])
            with torch.no_grad():
                reference_hidden_ND = self.reference.hidden_states(batch)
            if objective.kl.estimator == "full":
                # An average over the vocabulary, not an estimate from the token: nothing to correct.
                arguments = {
                    "teacher_hidden_TD": reference_hidden_ND,
                    "teacher_weight_VD": self.reference.lm_head_weight,
                    "teacher_bias_V": self.reference.lm_head_bias,
                    "divergence_weight_T": kl_weight_N * micro.weights,
                }
            else:
                reference_logp_N = self.logp(reference_hidden_ND, batch.target_N, self.reference)
                if objective.kl.estimator == "k1":
                    columns["reference_kl"] = old.logp_N - reference_logp_N
                    advantage_N = advantage_N - kl_weight_N * columns["reference_kl"]
                else:
                    arguments = {
                        "kl_estimator": objective.kl.estimator,
                        "reference_logp_T": reference_logp_N,
                        "kl_weight_T": kl_weight_N * micro.weights * correction_N,
                    }
        logp_N = old.logp_N
        if micro.has_moved and not objective.has_paper_surrogate:
            logp_N = self.logp(hidden_ND, batch.target_N)
        surrogate = as_clipped_surrogate(logp_N, old.logp_N, micro.lengths, objective)
        arguments |= {
            "clip_low": objective.clip_low,
            "clip_high": objective.clip_high,
            "temperature": self.temperature,
            "bias_V": self.policy.lm_head_bias,
            "advantage_T": advantage_N,
            "old_logp_T": surrogate.old_logp_N,
            "loss_weight_T": micro.weights * correction_N * surrogate.factor_N,
        }
        for name, value in arguments.items():
            if isinstance(value, torch.Tensor):
                arguments[name] = value.to(hidden_ND.device)
        result = linear_policy_loss(
            hidden_ND,
            self.policy.lm_head_weight,
            batch.target_N,
            **arguments,
        )
        columns |= {
            "loss": result.loss_T,
            "entropy": result.entropy_T,
            "ratio": result.ratio_T if surrogate.ratio_N is None else surrogate.ratio_N,
            "clipped": result.clipped_T if surrogate.clipped_N is None else surrogate.clipped_N,
        }
        if result.teacher is not None:
            columns["reference_kl"] = result.teacher.kl_student_teacher_T
        elif "reference_logp_T" in arguments:
            columns["reference_kl"] = result.kl_T
        return MicroBatchLoss(result.loss, columns)

    @staticmethod
    def _advantages(micro: MicroBatch) -> torch.Tensor:
        """(GRPO-ADV) or (OPD-ADV); with the control variate beta (delta + KL), whose expectation at a state is 0."""
        old = micro.old
        if old.delta_N is not None and old.teacher_kl_N is not None:
            return micro.per_token([s.beta for s in micro.samples]) * (old.delta_N + old.teacher_kl_N)
        parts = old.logp_N.split(micro.lengths)
        return torch.cat([sample.advantages(old_n) for sample, old_n in zip(micro.samples, parts, strict=True)])


def _distances(micro: MicroBatch) -> dict[str, torch.Tensor]:
    """(OPD-DELTA) of distilled samples, 0 for the others; the exact KL where it is known."""
    old = micro.old
    if old.delta_N is not None and old.teacher_kl_N is not None:
        return {"delta": old.delta_N, "exact_reverse_kl": old.teacher_kl_N}
    parts = old.logp_N.split(micro.lengths)
    teacher = [
        old_n if s.teacher_logp_N is None else s.teacher_logp_N for s, old_n in zip(micro.samples, parts, strict=True)
    ]
    return {"delta": torch.cat(teacher) - old.logp_N}


def _teacher_hidden(samples: Sequence[TrainSample], device: torch.device) -> torch.Tensor:
    """In the order of the packed row: response by response."""
    return torch.cat([sample.teacher.hidden_ND for sample in samples if sample.teacher is not None]).to(device)
