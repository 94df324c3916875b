"""How far apart two policies are, per token, from their hidden states and lm_heads. Forward only."""

from __future__ import annotations

from typing import NamedTuple

import torch

from copd_kernels import _projection as projection


class Divergence(NamedTuple):
    """Per token. The two log-probs are None when no target was given.

    ``kl_student_teacher_T`` is KL(student || teacher), the reverse KL that (OPD-ADV) estimates; ``overlap_T`` the share
    of the top k that both have in common (OVERLAP); ``sum_min_T`` = sum_v min(student, teacher), 1 minus the total
    variation.
    """

    student_logp_T: torch.Tensor | None
    teacher_logp_T: torch.Tensor | None
    kl_student_teacher_T: torch.Tensor
    kl_teacher_student_T: torch.Tensor
    symmetric_kl_T: torch.Tensor
    overlap_T: torch.Tensor
    sum_min_T: torch.Tensor
    student_entropy_T: torch.Tensor
    teacher_entropy_T: torch.Tensor


def _centred_lse(centred_CV: torch.Tensor, centre_C1: torch.Tensor) -> torch.Tensor:
    """log-sum-exp ``[C, 1]`` of rows whose entry at ``centre_C1`` is 0.

    When that entry is the row's maximum the result is log1p(tail): the digits of a small tail survive. Another maximum
    (the student's choice is not the teacher's) makes the result at least log 2, where a plain log does as well.
    """
    top_C1 = centred_CV.amax(-1, keepdim=True)
    tail_C1 = (centred_CV - top_C1).exp_().scatter_(-1, centre_C1, 0).sum(-1, keepdim=True)
    return torch.where(top_C1 > 0, top_C1 + (tail_C1 + (-top_C1).exp()).log(), tail_C1.log1p())


def _kl(p_CV: torch.Tensor, q_CV: torch.Tensor, delta_CV: torch.Tensor) -> torch.Tensor:
    """KL(p || q) ``[C]`` as sum p (Δ + expm1(-Δ)) with Δ = log p - log q: every term is >= 0, so nothing cancels."""
    # Δ + expm1(-Δ) loses its leading digits where Δ is small and can come out negative; there its series is exact to
    # rounding (next term relative: Δ^4 / 360).
    small = 0.05 if delta_CV.dtype == torch.float32 else 1e-3
    series_CV = delta_CV.square() * (0.5 - delta_CV * (1 / 6 - delta_CV * (1 / 24 - delta_CV * (1 / 120))))
    factor_CV = torch.where(delta_CV.abs() < small, series_CV, delta_CV + torch.expm1(-delta_CV))
    # Far below, p exp(-Δ) is q, which does not overflow. At p = 0 all that is left is q, also where both exclude the
    # token (-inf padding) and Δ is NaN. A NaN of the inputs is a NaN in p and stays.
    terms_CV = torch.where(delta_CV < -10, q_CV + p_CV * (delta_CV - 1), p_CV * factor_CV)
    return torch.where(p_CV == 0, q_CV, terms_CV).sum(-1)


def _top_k_mask(logits_CV: torch.Tensor, top_k: int) -> torch.Tensor:
    """True at each row's ``top_k`` largest entries, ties by lower index (``topk`` itself leaves them open)."""
    smallest_C1 = logits_CV.topk(top_k, dim=-1).values[:, -1:]
    above_CV = logits_CV > smallest_C1
    tied_CV = logits_CV == smallest_C1
    num_tied_C1 = top_k - above_CV.sum(-1, keepdim=True)
    return above_CV | (tied_CV & (tied_CV.cumsum(-1, dtype=torch.int32) <= num_tied_C1))


def _chunk_divergence(
    student_CV: torch.Tensor, teacher_CV: torch.Tensor, target_C: torch.Tensor | None, top_k: int
) -> tuple[torch.Tensor, ...]:
    """The rows of :class:`Divergence` for one chunk of logits; log-probs are 0 without a target."""
    overlap_C = (_top_k_mask(student_CV, top_k) & _top_k_mask(teacher_CV, top_k)).sum(-1) / top_k

    # Both rows are centred at the student's most likely token, and so is their difference r: branches are close, so r
    # is small and exact, while student and teacher log-probs subtracted from each other would lose it.
    centre_C1 = student_CV.argmax(-1, keepdim=True)
    r_CV = student_CV - teacher_CV
    r_CV -= r_CV.gather(-1, centre_C1)
    student_CV = student_CV - student_CV.gather(-1, centre_C1)
    teacher_CV = teacher_CV - teacher_CV.gather(-1, centre_C1)
    student_lse_C1, teacher_lse_C1 = _centred_lse(student_CV, centre_C1), _centred_lse(teacher_CV, centre_C1)
    delta_CV = r_CV.add_(teacher_lse_C1 - student_lse_C1)

    student_CV -= student_lse_C1
    teacher_CV -= teacher_lse_C1
    if target_C is None:
        student_logp_C = teacher_logp_C = torch.zeros_like(student_lse_C1[:, 0])
    else:
        student_logp_C = student_CV.gather(-1, target_C[:, None])[:, 0]
        teacher_logp_C = teacher_CV.gather(-1, target_C[:, None])[:, 0]
    p_CV, q_CV = student_CV.exp_(), teacher_CV.exp_()
    kl_student_teacher_C = _kl(p_CV, q_CV, delta_CV)
    kl_teacher_student_C = _kl(q_CV, p_CV, -delta_CV)
    sum_min_C = torch.minimum(p_CV, q_CV).sum(-1)
    return (
        student_logp_C,
        teacher_logp_C,
        kl_student_teacher_C,
        kl_teacher_student_C,
        kl_student_teacher_C + kl_teacher_student_C,
        # Comparisons with NaN are False: without this a broken row would read as "no overlap".
        overlap_C.to(p_CV.dtype).masked_fill_(sum_min_C.isnan(), torch.nan),
        sum_min_C,
        torch.special.entr(p_CV).sum(-1),
        torch.special.entr(q_CV).sum(-1),
    )


@torch.no_grad()
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
    chunk_tokens: int | None = None,
) -> Divergence:
    """KL in both directions, (SYM-KL), (OVERLAP) and the log-probs of (OPD-DELTA), arXiv 2604.27083, without grad.

    Hidden states ``[T, D]`` and weights ``[V, D]``, of one floating dtype per policy; D may differ between the
    policies, T and V may not. ``target_T`` int64 ``[T]``: the tokens whose log-probs are wanted. Returns fp32 ``[T]``
    tensors (fp64 when either policy is fp64), divergences in nats and never negative. Two equal policies give exactly
    0, and equal log-probs. NaN in a hidden row gives NaN for that token.

    Raises ValueError on a wrong rank, size or dtype, different vocabularies, a target outside the vocabulary,
    temperature <= 0 or top_k outside 1..V.
    """
    student_hidden_TD, student_weight_VD = projection.autocast_inputs(student_hidden_TD, student_weight_VD)
    teacher_hidden_TD, teacher_weight_VD = projection.autocast_inputs(teacher_hidden_TD, teacher_weight_VD)
    projection.check_projection(student_hidden_TD, student_weight_VD, student_bias_V, prefix="student_")
    projection.check_projection(teacher_hidden_TD, teacher_weight_VD, teacher_bias_V, prefix="teacher_")
    num_tokens, vocab_size = student_hidden_TD.shape[0], student_weight_VD.shape[0]
    if teacher_hidden_TD.shape[0] != num_tokens:
        raise ValueError(
            f"teacher_hidden_TD must have the student's T = {num_tokens}, was {teacher_hidden_TD.shape[0]}"
        )
    if teacher_weight_VD.shape[0] != vocab_size:
        raise ValueError(
            f"teacher_weight_VD must have the student's V = {vocab_size}, was {teacher_weight_VD.shape[0]}"
        )
    if target_T is not None:
        projection.check_target(target_T, num_tokens, vocab_size)
    projection.check_temperature(temperature)
    if not 1 <= top_k <= vocab_size:
        raise ValueError(f"top_k must lie in 1..{vocab_size} (the vocabulary), was {top_k}")
    chunk = projection.resolve_chunk_tokens(chunk_tokens, vocab_size)

    dtype = projection.statistics_dtype(torch.promote_types(student_hidden_TD.dtype, teacher_hidden_TD.dtype))
    columns_FT = student_hidden_TD.new_empty((len(Divergence._fields), num_tokens), dtype=dtype)
    with projection.without_autocast(student_hidden_TD):
        for rows in projection.token_chunks(num_tokens, chunk):
            columns = _chunk_divergence(
                projection.chunk_logits(student_hidden_TD[rows], student_weight_VD, student_bias_V, temperature).to(
                    dtype
                ),
                projection.chunk_logits(teacher_hidden_TD[rows], teacher_weight_VD, teacher_bias_V, temperature).to(
                    dtype
                ),
                None if target_T is None else target_T[rows],
                top_k,
            )
            columns_FT[:, rows] = torch.stack(columns)
    result = Divergence(*columns_FT.unbind())
    return result if target_T is not None else result._replace(student_logp_T=None, teacher_logp_T=None)
