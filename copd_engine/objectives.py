"""From rewards and teacher scores to per-token advantages and loss weights.

Each loss term has its own normalisation: a response of term m weighs ``weight_m / (num_responses_m * |y_i|)`` per
token, as in (SURROGATE). Nothing is whitened or averaged across terms (arXiv 2604.27083; ``copd.md`` sections 3 and
7).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from copd_kernels import group_advantages

from copd_engine.types import Rollout


@dataclass(frozen=True)
class TrainSample:
    """One response with all that its loss needs.

    ``token_weight``: loss weight of each of its tokens. GRPO: ``advantage`` is one number for all tokens.
    Distillation: ``teacher_logp_N`` fp32 holds the teacher's log-probs and ``beta`` their weight; the advantage
    follows from the student's own.
    """

    rollout: Rollout
    term: str
    token_weight: float
    advantage: float = 0.0
    teacher_logp_N: torch.Tensor | None = None
    beta: float = 0.0

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


def token_weight(term_weight: float, num_responses: int, num_tokens: int) -> float:
    """Weight of one token: sequence mean, then mean over the term's responses."""
    return term_weight / (num_responses * num_tokens)


def _dense(groups: Sequence[int]) -> list[int]:
    """Group ids renumbered 0, 1, 2 ... in order of appearance."""
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    return [numbers[group] for group in groups]
