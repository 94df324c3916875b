"""What every operation means, in plain PyTorch on full [T, V] logits. For tests and benchmarks, and the fall-back of
the operations without a formula of their own.

Signatures are those of the operations, without ``chunk_tokens``; gradients come from autograd. Statistics are fp32, or
fp64 when the inputs are: fp64 inputs give the truth that the operations are judged by.
"""

from __future__ import annotations

import torch

from copd_kernels.linear_divergence import Divergence
from copd_kernels.linear_logprob import LogProb
from copd_kernels.linear_policy_loss import PolicyLoss


def _log_softmax(
    hidden_TD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs ``[T, V]`` and lse ``[T]``."""
    logits_TV = hidden_TD @ weight_VD.T
    logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    if bias_V is not None:
        logits_TV = logits_TV + bias_V
    logits_TV = logits_TV / temperature
    lse_T = logits_TV.logsumexp(-1)
    return logits_TV - lse_T[:, None], lse_T


def _expectation(p_TV: torch.Tensor, values_TV: torch.Tensor) -> torch.Tensor:
    """sum p · value, where an impossible token counts nothing whatever its value."""
    return (p_TV * values_TV.masked_fill(p_TV == 0, 0)).sum(-1)


def linear_logprob(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    target_T: torch.Tensor,
    *,
    bias_V: torch.Tensor | None = None,
    temperature: float = 1.0,
) -> LogProb:
    logp_TV, lse_T = _log_softmax(hidden_TD, weight_VD, bias_V, temperature)
    logp_T = logp_TV.gather(-1, target_T[:, None])[:, 0]
    return LogProb(logp_T, -_expectation(logp_TV.exp(), logp_TV), lse_T)


def linear_policy_loss(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    target_T: torch.Tensor,
    *,
    advantage_T: torch.Tensor,
    old_logp_T: torch.Tensor,
    loss_weight_T: torch.Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    bias_V: torch.Tensor | None = None,
    temperature: float = 1.0,
) -> PolicyLoss:
    logp_T, entropy_T, _ = linear_logprob(hidden_TD, weight_VD, target_T, bias_V=bias_V, temperature=temperature)
    ratio_T = (logp_T - old_logp_T).exp()
    unclipped_T = ratio_T * advantage_T
    clipped_T = ratio_T.clamp(1 - clip_low, 1 + clip_high) * advantage_T
    loss_T = -loss_weight_T * torch.minimum(unclipped_T, clipped_T)
    per_token = (x.detach() for x in (logp_T, entropy_T, ratio_T, clipped_T < unclipped_T, loss_T))
    return PolicyLoss(loss_T.sum(), *per_token)


def linear_divergence(
    student_hidden_TD: torch.Tensor,
    student_weight_VD: torch.Tensor,
    teacher_hidden_TD: torch.Tensor,
    teacher_weight_VD: torch.Tensor,
    target_T: torch.Tensor | None = None,
    *,
    student_bias_V: torch.Tensor | None = None,
    teacher_bias_V: torch.Tensor | None = None,
    temperature: float = 1.0,
    top_k: int = 10,
) -> Divergence:
    student_logp_TV, _ = _log_softmax(student_hidden_TD, student_weight_VD, student_bias_V, temperature)
    teacher_logp_TV, _ = _log_softmax(teacher_hidden_TD, teacher_weight_VD, teacher_bias_V, temperature)
    p_TV, q_TV = student_logp_TV.exp(), teacher_logp_TV.exp()
    gap_TV = student_logp_TV - teacher_logp_TV
    kl_student_teacher_T, kl_teacher_student_T = _expectation(p_TV, gap_TV), _expectation(q_TV, -gap_TV)
    # A stable sort resolves ties by lower index.
    top_student_TV = student_logp_TV.argsort(dim=-1, descending=True, stable=True)[:, :top_k]
    top_teacher_TV = teacher_logp_TV.argsort(dim=-1, descending=True, stable=True)[:, :top_k]
    common_T = (top_student_TV[:, :, None] == top_teacher_TV[:, None, :]).sum((1, 2))
    return Divergence(
        None if target_T is None else student_logp_TV.gather(-1, target_T[:, None])[:, 0],
        None if target_T is None else teacher_logp_TV.gather(-1, target_T[:, None])[:, 0],
        kl_student_teacher_T,
        kl_teacher_student_T,
        kl_student_teacher_T + kl_teacher_student_T,
        (common_T / top_k).to(p_TV.dtype),
        torch.minimum(p_TV, q_TV).sum(-1),
        -_expectation(p_TV, student_logp_TV),
        -_expectation(q_TV, teacher_logp_TV),
    )


def group_advantages(
    rewards_B: torch.Tensor, group_ids_B: torch.Tensor, mode: str, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    if rewards_B.dim() != 1:
        raise ValueError(f"rewards_B must be [B], was {list(rewards_B.shape)}")
    if not rewards_B.is_floating_point():
        raise ValueError(f"rewards_B must be a floating dtype, was {rewards_B.dtype}")
    if group_ids_B.dtype != torch.int64:
        raise ValueError(f"group_ids_B must be int64, was {group_ids_B.dtype}")
    if group_ids_B.shape != rewards_B.shape:
        raise ValueError(
            f"group_ids_B must be [B] like rewards_B {list(rewards_B.shape)}, was {list(group_ids_B.shape)}"
        )
    if mode not in ("population", "sample", "none"):
        raise ValueError(f"mode must be 'population', 'sample' or 'none', was {mode!r}")
    if rewards_B.numel() and bool((group_ids_B[:1] < 0).any() | (group_ids_B.diff() < 0).any()):
        raise ValueError("group_ids_B must be non-negative and non-decreasing, so that a group is one run")

    rewards = rewards_B.double()
    _, group_B, size_G = group_ids_B.unique_consecutive(return_inverse=True, return_counts=True)
    zeros_G = rewards.new_zeros(size_G.shape)
    low_G = zeros_G.scatter_reduce(0, group_B, rewards, "amin", include_self=False)
    high_G = zeros_G.scatter_reduce(0, group_B, rewards, "amax", include_self=False)
    zero_variance_B = ((low_G == high_G) & low_G.isfinite())[group_B]
    mean_G = zeros_G.index_add(0, group_B, rewards) / size_G
    advantages_B = rewards - mean_G[group_B]
    if mode != "none":
        squares_G = zeros_G.index_add(0, group_B, advantages_B.square())
        std_G = (squares_G / (size_G - 1 if mode == "sample" else size_G)).sqrt()
        advantages_B = advantages_B / (std_G + eps)[group_B]
    advantages_B = advantages_B.masked_fill(zero_variance_B, 0)
    return advantages_B.to(torch.promote_types(rewards_B.dtype, torch.float32)), zero_variance_B
