"""How far apart two policies are, per token, from their hidden states and lm_heads."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from copd_kernels import _backend, _checks, _driver, statistics
from copd_kernels._types import Head


class Divergence(NamedTuple):
    """Per token. The log-probs of the target and their difference are None when no target was given.

    ``kl_student_teacher_T`` is KL(student || teacher), the reverse KL that (OPD-ADV) estimates; ``overlap_T`` the share
    of the top k that both have in common (OVERLAP); ``sum_min_T`` = sum_v min(student, teacher), 1 minus the total
    variation; ``delta_T`` = student_logp - teacher_logp, (OPD-DELTA); ``jsd_T`` = beta KL(teacher || m) + (1 - beta)
    KL(student || m) with m = beta teacher + (1 - beta) student. A field that an operation was not asked for is None.
    """

    student_logp_T: torch.Tensor | None
    teacher_logp_T: torch.Tensor | None
    kl_student_teacher_T: torch.Tensor
    kl_teacher_student_T: torch.Tensor
    symmetric_kl_T: torch.Tensor
    overlap_T: torch.Tensor | None
    sum_min_T: torch.Tensor | None
    student_entropy_T: torch.Tensor
    teacher_entropy_T: torch.Tensor
    delta_T: torch.Tensor | None
    jsd_T: torch.Tensor | None


NUM_FIELDS = len(Divergence._fields)
_DIFFERENTIABLE = {"student_logp_T", "kl_student_teacher_T", "kl_teacher_student_T", "symmetric_kl_T"} | {
    "student_entropy_T",
    "delta_T",
    "jsd_T",
}
_OF_TARGET = ("student_logp_T", "teacher_logp_T", "delta_T")


def divergence_columns(
    stats_12T: torch.Tensor, second_3T: torch.Tensor | None, overlap_T: torch.Tensor | None
) -> torch.Tensor:
    """The fields of :class:`Divergence`, ``[11, T]``; 0 for what was not computed."""
    student, teacher = statistics.head_finals(stats_12T[:4]), statistics.head_finals(stats_12T[4:8])
    kl_student_teacher_T, kl_teacher_student_T = statistics.divergences(stats_12T)
    zeros_T = torch.zeros_like(student.lse_T)
    return torch.stack(
        [
            student.logp_T,
            teacher.logp_T,
            kl_student_teacher_T,
            kl_teacher_student_T,
            kl_student_teacher_T + kl_teacher_student_T,
            zeros_T if overlap_T is None else overlap_T.to(zeros_T.dtype),
            zeros_T if second_3T is None else second_3T[0],
            student.entropy_T,
            teacher.entropy_T,
            (stats_12T[statistics.TARGET] - stats_12T[4 + statistics.TARGET]) - statistics.lse_difference(stats_12T),
            zeros_T if second_3T is None else second_3T[1],
        ]
    )


@torch.library.custom_op("copd_kernels::linear_divergence", mutates_args=())
def _linear_divergence(
    student_hidden_TD: torch.Tensor,
    student_weight_VD: torch.Tensor,
    student_bias_V: torch.Tensor | None,
    teacher_hidden_TD: torch.Tensor,
    teacher_weight_VD: torch.Tensor,
    teacher_bias_V: torch.Tensor | None,
    target_T: torch.Tensor | None,
    mask_T: torch.Tensor | None,
    vocab_size: int,
    temperature: float,
    softcap: float,
    top_k: int,
    jsd_beta: float,
    chunk_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The fields ``[11, T]``, and for backward the statistics ``[12, T]`` and the second pass ``[3, T]``."""
    tokens = _backend.Tokens(mask_T)
    student = tokens.head(
        Head(student_hidden_TD, student_weight_VD, student_bias_V), vocab_size, name="student_hidden_TD"
    )
    teacher = tokens.head(
        Head(teacher_hidden_TD, teacher_weight_VD, teacher_bias_V), vocab_size, name="teacher_hidden_TD"
    )
    if target_T is not None:
        target_T = tokens.take(target_T)
        _checks.check_target_values(target_T, vocab_size)
    stats_12T, second_3T, overlap_T = _backend.driver(student_hidden_TD.device).dual_statistics(
        student,
        teacher,
        target_T,
        temperature=temperature,
        softcap=softcap,
        second_beta=jsd_beta,
        top_k=top_k,
        chunk_tokens=chunk_tokens,
    )
    columns = divergence_columns(stats_12T, second_3T, overlap_T)
    if target_T is None:
        columns[[Divergence._fields.index(name) for name in _OF_TARGET]] = 0
    return tokens.put_last(columns), tokens.put_last(stats_12T), tokens.put_last(second_3T)


@_linear_divergence.register_fake
def _(
    student_hidden_TD: torch.Tensor,
    student_weight_VD: torch.Tensor,
    student_bias_V: torch.Tensor | None,
    teacher_hidden_TD: torch.Tensor,
    teacher_weight_VD: torch.Tensor,
    *_: Any,
) -> tuple[torch.Tensor, ...]:
    dtype = _driver.statistics_dtype(
        Head(student_hidden_TD, student_weight_VD, None), Head(teacher_hidden_TD, teacher_weight_VD, None)
    )
    num_tokens = student_hidden_TD.shape[0]
    return tuple(student_hidden_TD.new_empty((rows, num_tokens), dtype=dtype) for rows in (NUM_FIELDS, 12, 3))


@torch.library.custom_op("copd_kernels::linear_divergence_backward", mutates_args=())
def _linear_divergence_backward(
    student_hidden_TD: torch.Tensor,
    student_weight_VD: torch.Tensor,
    student_bias_V: torch.Tensor | None,
    teacher_hidden_TD: torch.Tensor,
    teacher_weight_VD: torch.Tensor,
    teacher_bias_V: torch.Tensor | None,
    target_T: torch.Tensor | None,
    mask_T: torch.Tensor | None,
    stats_12T: torch.Tensor,
    second_3T: torch.Tensor,
    grad_FT: torch.Tensor,
    vocab_size: int,
    temperature: float,
    softcap: float,
    jsd_beta: float,
    chunk_tokens: int,
    wanted: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens = _backend.Tokens(mask_T)
    student = tokens.head(
        Head(student_hidden_TD, student_weight_VD, student_bias_V), vocab_size, name="student_hidden_TD"
    )
    teacher = tokens.head(
        Head(teacher_hidden_TD, teacher_weight_VD, teacher_bias_V), vocab_size, name="teacher_hidden_TD"
    )
    grad = dict(zip(Divergence._fields, tokens.take_last(grad_FT), strict=True))
    logp = grad["student_logp_T"] + grad["delta_T"]
    coefs_6T = torch.stack(
        [
            -logp,
            -grad["student_entropy_T"],
            logp,
            grad["kl_student_teacher_T"] + grad["symmetric_kl_T"],
            grad["kl_teacher_student_T"] + grad["symmetric_kl_T"],
            (1 - jsd_beta) * grad["jsd_T"],
        ]
    )
    gradients = _backend.driver(student_hidden_TD.device).dual_gradient(
        student,
        teacher,
        None if target_T is None else tokens.take(target_T),
        tokens.take_last(stats_12T),
        tokens.take_last(second_3T),
        coefs_6T,
        beta=jsd_beta,
        temperature=temperature,
        softcap=softcap,
        wanted=tuple(wanted),
        chunk_tokens=chunk_tokens,
    )
    return _backend.pad_gradients(gradients, tokens, student_weight_VD)


@_linear_divergence_backward.register_fake
def _(
    student_hidden_TD: torch.Tensor,
    student_weight_VD: torch.Tensor,
    student_bias_V: torch.Tensor | None,
    *arguments: Any,
) -> tuple[torch.Tensor, ...]:
    return _backend.fake_gradients(Head(student_hidden_TD, student_weight_VD, student_bias_V), arguments[-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *tensors, vocab_size, temperature, softcap, _, jsd_beta, chunk_tokens = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.arguments = (vocab_size, temperature, softcap, jsd_beta, chunk_tokens)


def _backward(ctx: Any, grad_FT: torch.Tensor, *_: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:3])
    gradients = _linear_divergence_backward(*ctx.saved_tensors, grad_FT, *ctx.arguments, wanted)
    return (*(gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)), *(None,) * 11)


_linear_divergence.register_autograd(_backward, setup_context=_setup_context)


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
    chunk_tokens: int | None = None,
) -> Divergence:
    """KL in both directions, (SYM-KL), JSD, (OVERLAP) and (OPD-DELTA), arXiv 2604.27083, from one projection per head.

    Hidden states ``[T, D]`` and weights ``[V, D]``, of one floating dtype per policy; D may differ between the
    policies. ``target_T`` int64 ``[T]``: the tokens whose log-probs are wanted. ``vocab_size``: rows of either weight
    from there on are padding; needed where the two are padded differently. ``mask_T``, ``temperature``, ``softcap``,
    ``chunk_tokens`` as in :func:`copd_kernels.linear_logprob`. ``jsd_beta`` in (0, 1).

    Returns fp32 ``[T]`` tensors (fp64 when either policy is fp64), divergences in nats and never negative. Two equal
    policies give exactly 0, and equal log-probs. The student's log-prob and entropy, delta, both KL, their sum and the
    JSD are differentiable once with respect to the student's hidden states, weight and bias (backward projects again:
    where token weights are known beforehand, :func:`copd_kernels.linear_policy_loss` needs two projections less);
    the teacher is a constant, overlap and sum_min carry no gradient. The numerics stand in ``statistics.py``.

    Raises ValueError on a wrong rank, size, dtype or device, vocabularies that differ without ``vocab_size``, a target
    outside the vocabulary, temperature or softcap <= 0, top_k outside 1..V, jsd_beta outside (0, 1), and, on a CPU,
    hidden states that are not finite.
    """
    student = _backend.autocast_head(Head(student_hidden_TD, student_weight_VD, student_bias_V))
    teacher = _backend.autocast_head(
        Head(
            teacher_hidden_TD.detach(),
            teacher_weight_VD.detach(),
            None if teacher_bias_V is None else teacher_bias_V.detach(),
        )
    )
    common = _checks.check_pair(student, teacher, vocab_size)
    if target_T is not None:
        _checks.check_target(target_T, student_hidden_TD)
    _checks.check_mask(mask_T, student_hidden_TD)
    _checks.check_scale(temperature, softcap)
    _checks.check_top_k(top_k, common)
    _checks.check_jsd_beta(jsd_beta)
    _checks.check_chunk_tokens(chunk_tokens)
    columns_FT, *_ = _linear_divergence(
        *student,
        *teacher,
        target_T,
        mask_T,
        common,
        float(temperature),
        float(softcap or 0),
        top_k,
        float(jsd_beta),
        chunk_tokens or 0,
    )
    fields = [
        column if name in _DIFFERENTIABLE else column.detach()
        for name, column in zip(Divergence._fields, columns_FT.unbind(), strict=True)
    ]
    result = Divergence(*fields)
    return result if target_T is not None else result._replace(student_logp_T=None, teacher_logp_T=None, delta_T=None)
