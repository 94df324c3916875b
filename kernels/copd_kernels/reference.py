"""What every operation means, in plain PyTorch on full [T, V] logits. For tests and benchmarks, and the fall-back of
the operations without a formula of their own.

Signatures are those of the operations, without ``chunk_tokens``; gradients come from autograd. Statistics are fp32, or
fp64 when the inputs are: fp64 inputs give the truth that the operations are judged by.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from copd_kernels._surrogate import surrogate
from copd_kernels._types import Head
from copd_kernels.linear_divergence import Divergence
from copd_kernels.linear_logprob import LogProb
from copd_kernels.linear_policy_loss import PolicyLoss, divergence_value


def _logits(head: Head, temperature: float, softcap: float | None, vocab_size: int | None) -> torch.Tensor:
    logits_TV = head.hidden_TD @ head.weight_VD.T
    logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    if head.bias_V is not None:
        logits_TV = logits_TV + head.bias_V
    if softcap is not None:
        logits_TV = softcap * torch.tanh(logits_TV / softcap)
    return logits_TV[:, :vocab_size] / temperature


def _log_softmax(logits_TV: torch.Tensor) -> torch.Tensor:
    return logits_TV - logits_TV.logsumexp(-1, keepdim=True)


def _expectation(p_TV: torch.Tensor, values_TV: torch.Tensor) -> torch.Tensor:
    """sum p · value, where an impossible token counts nothing whatever its value."""
    return (p_TV * values_TV.masked_fill(p_TV == 0, 0)).sum(-1)


def _masked(values_T: torch.Tensor, mask_T: torch.Tensor | None) -> torch.Tensor:
    return values_T if mask_T is None else torch.where(mask_T, values_T, 0)


def _gather(values_TV: torch.Tensor, target_T: torch.Tensor, mask_T: torch.Tensor | None) -> torch.Tensor:
    """Values at the targets; the target of a masked token may be anything."""
    target_T = target_T if mask_T is None else torch.where(mask_T, target_T, 0)
    return values_TV.gather(-1, target_T[:, None])[:, 0]


def linear_logprob(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    target_T: torch.Tensor,
    *,
    bias_V: torch.Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    mask_T: torch.Tensor | None = None,
    vocab_size: int | None = None,
) -> LogProb:
    logits_TV = _logits(Head(hidden_TD, weight_VD, bias_V), temperature, softcap, vocab_size)
    logp_TV = _log_softmax(logits_TV)
    columns = (_gather(logp_TV, target_T, mask_T), -_expectation(logp_TV.exp(), logp_TV), logits_TV.logsumexp(-1))
    return LogProb(*(_masked(column_T, mask_T) for column_T in columns))


def linear_policy_loss(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    target_T: torch.Tensor,
    *,
    advantage_T: torch.Tensor | None = None,
    old_logp_T: torch.Tensor | None = None,
    loss_weight_T: torch.Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    reference_logp_T: torch.Tensor | None = None,
    kl_weight_T: torch.Tensor | None = None,
    kl_estimator: str = "k3",
    teacher_hidden_TD: torch.Tensor | None = None,
    teacher_weight_VD: torch.Tensor | None = None,
    teacher_bias_V: torch.Tensor | None = None,
    divergence: str = "reverse_kl",
    divergence_weight_T: torch.Tensor | None = None,
    jsd_beta: float = 0.5,
    top_k: int = 0,
    bias_V: torch.Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    mask_T: torch.Tensor | None = None,
    vocab_size: int | None = None,
) -> PolicyLoss:
    scale: dict[str, Any] = {
        "temperature": temperature,
        "softcap": softcap,
        "mask_T": mask_T,
        "vocab_size": vocab_size,
    }
    logp_T, entropy_T, _ = linear_logprob(hidden_TD, weight_VD, target_T, bias_V=bias_V, **scale)
    part = surrogate(
        logp_T,
        advantage_T,
        old_logp_T,
        loss_weight_T,
        reference_logp_T,
        kl_weight_T,
        clip_low=clip_low,
        clip_high=clip_high,
        kl_estimator=kl_estimator,
    )
    loss_T, teacher = part.loss_T, None
    if teacher_hidden_TD is not None and teacher_weight_VD is not None:
        teacher = linear_divergence(
            hidden_TD,
            weight_VD,
            teacher_hidden_TD.detach(),
            teacher_weight_VD.detach(),
            target_T,
            student_bias_V=bias_V,
            teacher_bias_V=None if teacher_bias_V is None else teacher_bias_V.detach(),
            top_k=top_k or 1,
            jsd_beta=jsd_beta,
            **scale,
        )
        if divergence_weight_T is not None:
            value_T = divergence_value(divergence, teacher)
            loss_T = loss_T + torch.where(divergence_weight_T == 0, 0, divergence_weight_T * value_T)
        if divergence != "jsd":
            teacher = teacher._replace(sum_min_T=None, jsd_T=None)
        if not top_k:
            teacher = teacher._replace(overlap_T=None)
        teacher = Divergence._make(None if column_T is None else column_T.detach() for column_T in teacher)
    loss_T, *columns = (
        _masked(column_T, mask_T) for column_T in (loss_T, logp_T, entropy_T, part.ratio_T, part.clipped_T, part.kl_T)
    )
    logp_T, entropy_T, ratio_T, clipped_T, kl_T = (column_T.detach() for column_T in columns)
    counts = (
        torch.tensor(0) if weight_T is None else _masked(weight_T != 0, mask_T).sum()
        for weight_T in (loss_weight_T, divergence_weight_T, kl_weight_T)
    )
    return PolicyLoss(
        loss_T.sum(), logp_T, entropy_T, ratio_T, clipped_T.bool(), loss_T.detach(), kl_T, teacher, *counts
    )


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
    softcap: float | None = None,
    mask_T: torch.Tensor | None = None,
    vocab_size: int | None = None,
    top_k: int = 10,
    jsd_beta: float = 0.5,
) -> Divergence:
    student = Head(student_hidden_TD, student_weight_VD, student_bias_V)
    teacher = Head(teacher_hidden_TD.detach(), teacher_weight_VD.detach(), teacher_bias_V)
    student_logp_TV, teacher_logp_TV = (
        _log_softmax(_logits(head, temperature, softcap, vocab_size)) for head in (student, teacher)
    )
    p_TV, q_TV = student_logp_TV.exp(), teacher_logp_TV.exp()
    gap_TV = student_logp_TV - teacher_logp_TV
    kl_student_teacher_T, kl_teacher_student_T = _expectation(p_TV, gap_TV), _expectation(q_TV, -gap_TV)
    log_mixture_TV = ((1 - jsd_beta) * p_TV + jsd_beta * q_TV).log()
    jsd_T = jsd_beta * _expectation(q_TV, teacher_logp_TV - log_mixture_TV)
    jsd_T = jsd_T + (1 - jsd_beta) * _expectation(p_TV, student_logp_TV - log_mixture_TV)
    student_logp_T = teacher_logp_T = delta_T = None
    if target_T is not None:
        student_logp_T = _masked(_gather(student_logp_TV, target_T, mask_T), mask_T)
        teacher_logp_T = _masked(_gather(teacher_logp_TV, target_T, mask_T), mask_T)
        delta_T = student_logp_T - teacher_logp_T
    return Divergence(
        student_logp_T,
        teacher_logp_T,
        _masked(kl_student_teacher_T, mask_T),
        _masked(kl_teacher_student_T, mask_T),
        _masked(kl_student_teacher_T + kl_teacher_student_T, mask_T),
        _masked(_overlap(student_logp_TV, teacher_logp_TV, top_k), mask_T),
        _masked(torch.minimum(p_TV, q_TV).sum(-1), mask_T).detach(),
        _masked(-_expectation(p_TV, student_logp_TV), mask_T),
        _masked(-_expectation(q_TV, teacher_logp_TV), mask_T),
        delta_T,
        _masked(jsd_T, mask_T),
    )


def _overlap(student_TV: torch.Tensor, teacher_TV: torch.Tensor, top_k: int) -> torch.Tensor:
    # A stable sort resolves ties by lower index.
    top_student_Tk = student_TV.argsort(dim=-1, descending=True, stable=True)[:, :top_k]
    top_teacher_Tk = teacher_TV.argsort(dim=-1, descending=True, stable=True)[:, :top_k]
    common_T = (top_student_Tk[:, :, None] == top_teacher_Tk[:, None, :]).sum((1, 2))
    return common_T.to(student_TV.dtype) / top_k


def topk_overlap(
    student_hidden_TD: torch.Tensor,
    student_weight_VD: torch.Tensor,
    teacher_hidden_TD: torch.Tensor,
    teacher_weight_VD: torch.Tensor,
    *,
    top_k: int = 10,
    student_bias_V: torch.Tensor | None = None,
    teacher_bias_V: torch.Tensor | None = None,
    mask_T: torch.Tensor | None = None,
    vocab_size: int | None = None,
) -> torch.Tensor:
    student = _logits(Head(student_hidden_TD, student_weight_VD, student_bias_V), 1.0, None, vocab_size)
    teacher = _logits(Head(teacher_hidden_TD, teacher_weight_VD, teacher_bias_V), 1.0, None, vocab_size)
    return _masked(_overlap(student, teacher, top_k), mask_T).float()


def group_advantages(
    rewards_B: torch.Tensor, group_ids_B: torch.Tensor, mode: str, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    if rewards_B.dim() != 1:
        raise ValueError(f"rewards_B must be [B], was {list(rewards_B.shape)}")
    if not rewards_B.is_floating_point():
        raise ValueError(f"rewards_B must be a floating dtype, was {rewards_B.dtype}")
    if rewards_B.requires_grad:
        raise ValueError("rewards_B must not require grad: advantages have no gradient")
    if group_ids_B.dtype != torch.int64:
        raise ValueError(f"group_ids_B must be int64, was {group_ids_B.dtype}")
    if group_ids_B.shape != rewards_B.shape:
        raise ValueError(
            f"group_ids_B must be [B] like rewards_B {list(rewards_B.shape)}, was {list(group_ids_B.shape)}"
        )
    if mode not in ("population", "sample", "none", "rloo"):
        raise ValueError(f"mode must be 'population', 'sample', 'none' or 'rloo', was {mode!r}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be >= 0 and finite, was {eps}")
    if group_ids_B.device != rewards_B.device:
        raise ValueError(f"group_ids_B must be on {rewards_B.device} like rewards_B, was on {group_ids_B.device}")
    before_B = torch.cat([group_ids_B.new_zeros(1), group_ids_B])[:-1]
    out_of_order = (group_ids_B < before_B).nonzero()[:, 0]
    if out_of_order.numel():
        position = int(out_of_order[0])
        raise ValueError(
            "group_ids_B must be non-negative and non-decreasing, so that a group is one run; position "
            f"{position} holds {int(group_ids_B[position])} after {int(before_B[position])}"
        )

    rewards = rewards_B.double()
    _, group_B, size_G = group_ids_B.unique_consecutive(return_inverse=True, return_counts=True)
    # A ratio of integer tensors would be rounded to fp32.
    size_G = size_G.double()
    zeros_G = rewards.new_zeros(size_G.shape)
    low_G = zeros_G.scatter_reduce(0, group_B, rewards, "amin", include_self=False)
    high_G = zeros_G.scatter_reduce(0, group_B, rewards, "amax", include_self=False)
    zero_variance_B = ((low_G == high_G) & low_G.isfinite())[group_B]
    mean_G = zeros_G.index_add(0, group_B, rewards) / size_G
    advantages_B = rewards - mean_G[group_B]
    if mode == "rloo":
        # r - mean of the others = (r - mean) G / (G - 1)
        advantages_B = advantages_B * (size_G / (size_G - 1).clamp(min=1))[group_B]
    elif mode != "none":
        squares_G = zeros_G.index_add(0, group_B, advantages_B.square())
        std_G = (squares_G / (size_G - 1 if mode == "sample" else size_G)).sqrt()
        advantages_B = advantages_B / (std_G + eps)[group_B]
    advantages_B = advantages_B.masked_fill(zero_variance_B, 0)
    return advantages_B.to(torch.promote_types(rewards_B.dtype, torch.float32)), zero_variance_B
