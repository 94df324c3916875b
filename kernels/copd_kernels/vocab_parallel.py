"""One lm_head over several ranks, each with a shard of the vocabulary.

Every rank takes the statistics of its shard, the ranks exchange ``[4, T]`` (or ``[12, T]``) numbers, and
:func:`copd_kernels.statistics.merge_statistics` makes them those of the whole vocabulary. With these every rank
computes the gradient of its shard; those of the hidden states add up over ranks. With ``torch.distributed``::

    mine = single_statistics(hidden_TD, weight_shard, target_T, vocab_begin=rank * shard_size)
    parts = [torch.empty_like(mine) for _ in range(world_size)]
    dist.all_gather(parts, mine)
    merged = merge_statistics(torch.stack(parts))
    logp_T, entropy_T, lse_T = head_finals(merged)
    grads = single_gradient(hidden_TD, weight_shard, target_T, merged, grad_logp_T, vocab_begin=rank * shard_size)
    dist.all_reduce(grads.hidden_TD)
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from copd_kernels import _backend, _checks, _driver, statistics
from copd_kernels._types import Head


class ShardGradients(NamedTuple):
    """Gradients from one shard: of hidden states ``[T, D]`` (to be added up over shards), of its weight and bias."""

    hidden_TD: torch.Tensor
    weight_VD: torch.Tensor
    bias_V: torch.Tensor | None


def _check(
    student: Head,
    teacher: Head | None,
    target_T: torch.Tensor | None,
    vocab_begin: int,
    temperature: float,
    softcap: float | None,
) -> None:
    if teacher is None:
        _checks.check_head(student, None)
        _checks.check_finite("hidden_TD", student.hidden_TD)
    else:
        _checks.check_pair(student, teacher, None)
        _checks.check_finite("student_hidden_TD", student.hidden_TD)
        _checks.check_finite("teacher_hidden_TD", teacher.hidden_TD)
    if target_T is not None:
        _checks.check_target(target_T, student.hidden_TD)
        _checks.check_shard_target_values(target_T)
    _checks.check_scale(temperature, softcap)
    if vocab_begin < 0:
        raise ValueError(f"vocab_begin must be >= 0, was {vocab_begin}")


def _check_upstream(
    merged_FT: torch.Tensor,
    num_rows: int,
    student: Head,
    teacher: Head | None,
    target_T: torch.Tensor | None,
    gradients: dict[str, torch.Tensor | None],
) -> None:
    """Merged statistics and the gradients that come from above: of the tokens, dtype and device of the heads."""
    hidden_TD = student.hidden_TD
    name, shape = f"merged_{num_rows}T", [num_rows, hidden_TD.shape[0]]
    dtype = _driver.statistics_dtype(student, teacher)
    if list(merged_FT.shape) != shape:
        raise ValueError(f"{name} must be [{num_rows}, T] with T = {shape[1]}, was {list(merged_FT.shape)}")
    if merged_FT.dtype != dtype:
        raise ValueError(f"{name} must be {dtype} for these heads, was {merged_FT.dtype}")
    if merged_FT.device != hidden_TD.device:
        raise ValueError(f"{name} must be on {hidden_TD.device}, was on {merged_FT.device}")
    for name, gradient_T in gradients.items():
        if gradient_T is not None:
            _checks.check_per_token(name, gradient_T, hidden_TD)
    if target_T is None and gradients["grad_logp_T"] is not None:
        raise ValueError("grad_logp_T must be None without target_T, was given: there is no log-prob")


@torch.no_grad()
def single_statistics(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    target_T: torch.Tensor | None,
    *,
    vocab_begin: int,
    bias_V: torch.Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> torch.Tensor:
    """Statistics ``[4, T]`` of the shard whose rows are the entries ``vocab_begin`` .. ``vocab_begin + V - 1``.

    ``target_T`` int64 ``[T]`` are indices into the whole vocabulary, -1 for none; a target of another shard is normal.
    The other arguments are those of :func:`copd_kernels.linear_logprob`, the rows are described in ``statistics.py``.
    Without grad.

    Raises ValueError on a wrong rank, size, dtype or device, a target < -1, temperature or softcap <= 0, vocab_begin <
    0, and, on a CPU, hidden states that are not finite.
    """
    head = Head(hidden_TD, weight_VD, bias_V)
    _check(head, None, target_T, vocab_begin, temperature, softcap)
    return _backend.driver(hidden_TD.device).single_statistics(
        head, target_T, temperature=float(temperature), softcap=float(softcap or 0), v_begin=vocab_begin
    )


@torch.no_grad()
def dual_statistics(
    student_hidden_TD: torch.Tensor,
    student_weight_VD: torch.Tensor,
    teacher_hidden_TD: torch.Tensor,
    teacher_weight_VD: torch.Tensor,
    target_T: torch.Tensor | None,
    *,
    vocab_begin: int,
    student_bias_V: torch.Tensor | None = None,
    teacher_bias_V: torch.Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> torch.Tensor:
    """Statistics ``[12, T]`` of one shard of both policies; both are cut at the same entries. Without grad.

    Merged over the shards they give log-probs, entropies and both KL: :func:`copd_kernels.statistics.head_finals`,
    :func:`copd_kernels.statistics.divergences`. Raises as :func:`single_statistics`.
    """
    student = Head(student_hidden_TD, student_weight_VD, student_bias_V)
    teacher = Head(teacher_hidden_TD, teacher_weight_VD, teacher_bias_V)
    _check(student, teacher, target_T, vocab_begin, temperature, softcap)
    stats_12T, _, _ = _backend.driver(student_hidden_TD.device).dual_statistics(
        student,
        teacher,
        target_T,
        temperature=float(temperature),
        softcap=float(softcap or 0),
        second_beta=None,
        top_k=0,
        v_begin=vocab_begin,
    )
    return stats_12T


def _gradient_or_zero(gradient_T: torch.Tensor | None, like_T: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(like_T) if gradient_T is None else gradient_T.to(like_T.dtype)


@torch.no_grad()
def single_gradient(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    target_T: torch.Tensor | None,
    merged_4T: torch.Tensor,
    grad_logp_T: torch.Tensor | None = None,
    grad_entropy_T: torch.Tensor | None = None,
    grad_lse_T: torch.Tensor | None = None,
    *,
    vocab_begin: int,
    bias_V: torch.Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> ShardGradients:
    """The shard's gradients from the merged statistics and the gradients of log-prob, entropy and lse ``[T]``.

    Raises as :func:`single_statistics`, on statistics and gradients of another shape, dtype or device, and on a
    gradient of the log-prob without targets.
    """
    head = Head(hidden_TD, weight_VD, bias_V)
    _check(head, None, target_T, vocab_begin, temperature, softcap)
    upstream = {"grad_logp_T": grad_logp_T, "grad_entropy_T": grad_entropy_T, "grad_lse_T": grad_lse_T}
    _check_upstream(merged_4T, statistics.NUM_SINGLE, head, None, target_T, upstream)
    logp_T, entropy_T, lse_T = (
        _gradient_or_zero(gradient_T, merged_4T[0]) for gradient_T in (grad_logp_T, grad_entropy_T, grad_lse_T)
    )
    gradients = _backend.driver(hidden_TD.device).single_gradient(
        head,
        target_T,
        merged_4T,
        torch.stack([lse_T - logp_T, -entropy_T, logp_T]),
        temperature=float(temperature),
        softcap=float(softcap or 0),
        wanted=(True, True, bias_V is not None),
        v_begin=vocab_begin,
    )
    return ShardGradients(*gradients)


@torch.no_grad()
def dual_gradient(
    student_hidden_TD: torch.Tensor,
    student_weight_VD: torch.Tensor,
    teacher_hidden_TD: torch.Tensor,
    teacher_weight_VD: torch.Tensor,
    target_T: torch.Tensor | None,
    merged_12T: torch.Tensor,
    grad_logp_T: torch.Tensor | None = None,
    grad_entropy_T: torch.Tensor | None = None,
    grad_reverse_kl_T: torch.Tensor | None = None,
    grad_forward_kl_T: torch.Tensor | None = None,
    *,
    vocab_begin: int,
    student_bias_V: torch.Tensor | None = None,
    teacher_bias_V: torch.Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> ShardGradients:
    """The student shard's gradients from the merged statistics and the gradients of the student's log-prob and entropy
    and of both KL, ``[T]``: reverse is KL(student || teacher). Raises as :func:`single_gradient`.
    """
    student = Head(student_hidden_TD, student_weight_VD, student_bias_V)
    teacher = Head(teacher_hidden_TD, teacher_weight_VD, teacher_bias_V)
    _check(student, teacher, target_T, vocab_begin, temperature, softcap)
    upstream = {
        "grad_logp_T": grad_logp_T,
        "grad_entropy_T": grad_entropy_T,
        "grad_reverse_kl_T": grad_reverse_kl_T,
        "grad_forward_kl_T": grad_forward_kl_T,
    }
    _check_upstream(merged_12T, statistics.NUM_DUAL, student, teacher, target_T, upstream)
    logp_T, entropy_T, reverse_T, forward_T = (
        _gradient_or_zero(gradient_T, merged_12T[0])
        for gradient_T in (grad_logp_T, grad_entropy_T, grad_reverse_kl_T, grad_forward_kl_T)
    )
    gradients = _backend.driver(student_hidden_TD.device).dual_gradient(
        student,
        teacher,
        target_T,
        merged_12T,
        None,
        torch.stack([-logp_T, -entropy_T, logp_T, reverse_T, forward_T, torch.zeros_like(logp_T)]),
        beta=0.5,
        temperature=float(temperature),
        softcap=float(softcap or 0),
        wanted=(True, True, student_bias_V is not None),
        v_begin=vocab_begin,
    )
    return ShardGradients(*gradients)
