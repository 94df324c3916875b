"""From rewards and teacher scores to per-token advantages and loss weights.

Each loss term has its own normalisation, as in (SURROGATE). Nothing is whitened or averaged across terms (arXiv
2604.27083). ``docs/objectives.md`` has every equation and its source.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from copd_kernels import group_advantages

from copd_engine.config import ImportanceCorrectionConfig, ObjectiveConfig
from copd_engine.types import Rollout


@dataclass(frozen=True, eq=False)
class LmHead:
    """A teacher's output head at the start of the step: ``weight_VD``, ``bias_V`` or None."""

    weight_VD: torch.Tensor
    bias_V: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class TeacherStates:
    """A teacher's hidden states ``[N, D]`` on the CPU at the rows that predict a response's tokens, and its head."""

    hidden_ND: torch.Tensor
    head: LmHead


@dataclass(frozen=True)
class TrainSample:
    """One response with all that its loss needs.

    ``token_weight``: loss weight of each of its tokens. GRPO: ``advantage`` is one number for all tokens.
    Distillation, with weight ``beta``: ``teacher_logp_N`` fp32 holds the teacher's log-probs where the signal is the
    sampled one, ``teacher`` its distributions where it is taken over the vocabulary.
    """

    rollout: Rollout
    term: str
    token_weight: float
    advantage: float = 0.0
    teacher_logp_N: torch.Tensor | None = None
    beta: float = 0.0
    teacher: TeacherStates | None = None

    @property
    def is_distilled(self) -> bool:
        return self.teacher_logp_N is not None or self.teacher is not None

    def advantages(self, old_logp_N: torch.Tensor) -> torch.Tensor:
        """Per-token advantages fp32 ``[N]``: (GRPO-ADV) copied, or (OPD-ADV) beta * (OPD-DELTA)."""
        if self.teacher_logp_N is None:
            return torch.full_like(old_logp_N, self.advantage)
        return self.beta * (self.teacher_logp_N - old_logp_N)


def grpo_advantages(
    rollouts: Sequence[Rollout], std_mode: str = "population", eps: float = 1e-6
) -> tuple[list[float], int, int]:
    """(GRPO-ADV) of each rollout, the number of groups without variance, and the number of groups.

    Rollouts of one group must stand together.
    """
    rewards_B = torch.tensor([rollout.reward for rollout in rollouts], dtype=torch.float32)
    groups = [rollout.request.group for rollout in rollouts]
    group_ids_B = torch.tensor(_dense(groups), dtype=torch.int64)
    advantages_B, no_variance_B = group_advantages(rewards_B, group_ids_B, mode=std_mode, eps=eps)
    num_groups = len(set(groups))
    flat_groups = len(set(group_ids_B[no_variance_B].tolist()))
    return advantages_B.tolist(), flat_groups, num_groups


def groups_with_variance(rollouts: Sequence[Rollout]) -> set[int]:
    """Groups whose rewards are not all equal: the others have advantage 0."""
    rewards: dict[int, set[float]] = {}
    # In fp32, as the advantages are computed.
    for rollout, reward in zip(rollouts, torch.tensor([r.reward for r in rollouts]).tolist(), strict=True):
        rewards.setdefault(rollout.request.group, set()).add(reward)
    return {group for group, values in rewards.items() if len(values) > 1}


def token_weight(
    term_weight: float,
    num_responses: int,
    num_tokens: int,
    aggregation: str = "sequence_mean",
    total_tokens: int = 0,
    max_tokens: int = 0,
) -> float:
    """Loss weight of each token of a response of ``num_tokens``.

    ``sequence_mean``: mean over the response, then over the term's ``num_responses`` (the paper's); ``token_mean``:
    mean over the ``total_tokens`` of all of them; ``constant``: over ``num_responses * max_tokens``, whatever their
    lengths.
    """
    return (
        term_weight
        / {
            "sequence_mean": num_responses * num_tokens,
            "token_mean": total_tokens,
            "constant": num_responses * max_tokens,
        }[aggregation]
    )


def importance_correction(
    log_ratio_N: torch.Tensor, config: ImportanceCorrectionConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights fp32 ``[N]`` of tokens sampled from another policy than pi_old, ``log_ratio_N`` = log pi_old - log
    pi_sampler; and which of them the cap changed."""
    ratio_N = log_ratio_N.exp()
    cap = math.inf if config.cap is None else config.cap
    if config.mode == "truncate":
        return ratio_N.clamp(max=cap), ratio_N > cap
    outside_N = (ratio_N > cap) | (ratio_N < 1 / cap)
    return ratio_N.masked_fill(outside_N, 0), outside_N


class Surrogate(NamedTuple):
    """What the kernel's clipped surrogate takes for another one: the log-probs fp32 ``[N]`` that its ratio is taken
    against, and factors of the loss weights. ``ratio_N`` and ``clipped_N`` where the kernel's own are not those of the
    objective, else None."""

    old_logp_N: torch.Tensor
    factor_N: torch.Tensor | float = 1.0
    ratio_N: torch.Tensor | None = None
    clipped_N: torch.Tensor | None = None


def as_clipped_surrogate(
    logp_N: torch.Tensor, old_logp_N: torch.Tensor, lengths: Sequence[int], config: ObjectiveConfig
) -> Surrogate:
    """Every surrogate by the kernel's -w min(rho A, clip(rho) A), rho = exp(logp - old), whose gradient with respect to
    logp is -w rho A where the clip does not cut it.

    sequence: against logp - log s_i the ratio is s_i = exp(mean_t(logp - old)) at every token of response i, and the
    gradient -w s_i A that of GSPO's token form (arXiv 2507.18071, section 4.3; for one advantage per response it is
    GSPO). cispo: against logp the ratio is 1, and -w clip(rho) A is left of the gradient. ``logp_N`` and the result
    carry no gradient; ``logp_N`` is not read where ``config.has_paper_surrogate``.
    """
    if config.ratio_level == "sequence":
        means = [gap_n.mean().expand(len(gap_n)) for gap_n in (logp_N - old_logp_N).split(list(lengths))]
        old_logp_N = logp_N - torch.cat(means)
    if config.surrogate == "clip":
        return Surrogate(old_logp_N)
    ratio_N = (logp_N - old_logp_N).exp()
    clipped_N = ratio_N.clamp(1 - config.clip_low, 1 + config.clip_high)
    return Surrogate(logp_N, clipped_N, ratio_N, clipped_N != ratio_N)


def _dense(groups: Sequence[int]) -> list[int]:
    """Group ids renumbered 0, 1, 2 ... in order of appearance."""
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    return [numbers[group] for group in groups]
