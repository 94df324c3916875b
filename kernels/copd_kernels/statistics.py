"""Statistics of a part of the vocabulary, and how they merge: over tiles, and over the shards of a vocab-parallel head.

Per token and head, ``[4, T]``, for a set S of vocabulary entries with logits z:

===  ======  ==================================================================================
row  name    meaning
===  ======  ==================================================================================
0    max     m = max_S z; -inf for an empty set
1    tail    sum over S, without the first entry that attains m, of exp(z - m); -1 for an empty set
2    mean    E[z] - m under the softmax over S
3    target  z of the target, -inf while the target is not in S
===  ======  ==================================================================================

Keeping the largest entry out of the sum keeps the digits of a small tail: log-probs are (z - m) - log1p(tail) <= 0.

For two heads, student logits s and teacher logits t, ``[12, T]``: the four rows of each, and

===  ========  ===============================================================================
row  name      meaning (p and q: softmax over S of s and t)
===  ========  ===============================================================================
8    gap       c = E_p[s - t]
9    excess    b = E_p[u + expm1(-u)] >= 0 with u = (s - t) - c
10   t_gap     the same with the roles of student and teacher exchanged
11   t_excess
===  ========  ===============================================================================

**Why these.** Over the whole vocabulary sum_v p_v exp(-(s_v - t_v)) = Z_t / Z_s. With c split off, and E_p[u] = 0,

    E_p[exp(-u)] = 1 + E_p[u + expm1(-u)] = 1 + b,    hence    lse_s - lse_t = c - log1p(b)
    KL(p || q) = E_p[s - t] - (lse_s - lse_t) = log1p(b)
    d KL / d s_v = p_v ((s_v - t_v) - c)

No large numbers are subtracted: c carries the first order of the gap between two close policies, b its second order,
which is what the KL is made of, and every term of b is >= 0. The usual formula E_p[s - t] - lse_s + lse_t loses all
digits at a KL of 1e-6 in fp32.

**The online rule** is the analogue of Chan's parallel variance. Let W_i be the share of set i in the total mass:

    c = sum_i W_i c_i,    k_i = c - c_i,    b = sum_i W_i (exp(k_i) b_i + (expm1(k_i) - k_i))

because for u' = u - k: E[u' + expm1(-u')] = E[u] - k + exp(k) (1 + b - E[u]) - 1 with E[u] = 0. Again all terms are
>= 0 and of second order. It is exact, so tiles of any size in any order give the same statistics up to rounding.
Where k or b_i is large, or W_i has underflown, the term is taken as exp(c + lse_t,i - lse_s) - W_i (1 + k_i), which is
the same. Where that would overflow b is only huge; the divergence then is c - (lse_s - lse_t), where nothing cancels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

MAX, TAIL, MEAN, TARGET = range(4)
NUM_SINGLE, NUM_DUAL = 4, 12
_GAP = 8

# Beyond it exp(k) is about to overflow fp32.
_LARGEST_EXPONENT = 80.0
# Beyond it nothing cancels in the mass of a part less its share.
_NEAR_SHIFT = 5.0
# Beyond it log1p(excess) and the direct formula agree to rounding, and only the latter cannot overflow.
_LARGEST_EXCESS = 1e4


def empty_statistics(num_rows: int, num_tokens: int, *, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Statistics ``[num_rows, T]`` of the empty set, which merge as nothing."""
    stats_FT = torch.zeros(num_rows, num_tokens, dtype=dtype, device=like.device)
    for head in range(0, min(num_rows, _GAP), 4):
        stats_FT[[head + MAX, head + TARGET]] = -torch.inf
        stats_FT[head + TAIL] = -1
    return stats_FT


def expm1_minus(x: torch.Tensor) -> torch.Tensor:
    """expm1(x) - x >= 0 without cancellation: the series below where x is small (next term relative: x^5 / 2520)."""
    small = 0.05 if x.dtype == torch.float32 else 2e-3
    series = x.square() * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720)))))
    return torch.where(x.abs() < small, series, torch.expm1(x) - x)


def _merge_head(parts_SFT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows 0 to 3 of the union ``[4, T]``, and the share ``[S, T]`` of each part in its mass."""
    max_ST, tail_ST, mean_ST, target_ST = parts_SFT.unbind(1)
    max_T, winner_T = max_ST.max(0)
    # A part without any possible token holds no mass, also when none has any (-inf - -inf).
    offset_ST = torch.where(max_ST == -torch.inf, -torch.inf, max_ST - max_T)
    mass_ST = torch.where(offset_ST == -torch.inf, 0, offset_ST.exp() * (1 + tail_ST))
    is_winner_ST = torch.arange(len(max_ST), device=max_ST.device)[:, None] == winner_T
    tail_T = torch.where(is_winner_ST, tail_ST, mass_ST).sum(0)
    share_ST = mass_ST / (1 + tail_T)
    share_ST = torch.where(max_T == -torch.inf, 0, share_ST)
    mean_T = torch.where(share_ST == 0, 0, share_ST * (mean_ST + offset_ST)).sum(0)
    return torch.stack([max_T, tail_T, mean_T, target_ST.amax(0)]), share_ST


def _merge_gap(
    share_ST: torch.Tensor, gap_ST: torch.Tensor, excess_ST: torch.Tensor, log_ratio_ST: torch.Tensor
) -> torch.Tensor:
    """Gap and excess of the union, ``[2, T]``; ``log_ratio_ST``: lse of the parts under the other head less that of the
    union under this one."""
    # Differences from the heaviest part: the gaps are close to each other, not to 0.
    base_T = gap_ST.gather(0, share_ST.argmax(0, keepdim=True))[0]
    counted_ST = share_ST != 0
    moved_ST = torch.where(counted_ST, share_ST * (gap_ST - base_T), 0)
    # An infinite gap (the teacher excludes a token that the student allows) stays infinite.
    gap_T = torch.where(base_T.isinf(), base_T, base_T + moved_ST.sum(0))
    shift_ST = torch.where(counted_ST & ~gap_T.isinf(), gap_T - gap_ST, 0)
    near_ST = share_ST * (shift_ST.exp() * excess_ST + expm1_minus(shift_ST))
    # The same in other words, where exp(shift) or the excess is large and the share may have underflown: the part's
    # mass under the other head, weighed as under this one, less share (1 + shift).
    mass_ST = (gap_T + log_ratio_ST).clamp(max=_LARGEST_EXPONENT).exp()
    far_ST = (mass_ST - torch.where(counted_ST, share_ST * (1 + shift_ST), 0)).clamp(min=0)
    near = counted_ST & (shift_ST < _NEAR_SHIFT) & (excess_ST < _LARGEST_EXCESS)
    excess_T = torch.where(near, near_ST, far_ST).sum(0)
    nothing_T = gap_T.isinf() | (share_ST == 0).all(0)
    return torch.stack([gap_T, torch.where(nothing_T, 0, excess_T)])


def merge_statistics(parts_SFT: torch.Tensor) -> torch.Tensor:
    """Statistics of the union of S disjoint sets of vocabulary entries: ``[S, 4, T]`` to ``[4, T]``, or 12 rows.

    fp32 or fp64. The order of the parts changes the result by rounding only. Raises ValueError on another shape or
    dtype.
    """
    if parts_SFT.dim() != 3 or parts_SFT.shape[0] == 0 or parts_SFT.shape[1] not in (NUM_SINGLE, NUM_DUAL):
        raise ValueError(f"parts_SFT must be [S, 4, T] or [S, 12, T] with S >= 1, was {list(parts_SFT.shape)}")
    if parts_SFT.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"parts_SFT must be fp32 or fp64, was {parts_SFT.dtype}")
    student_FT, student_share_ST = _merge_head(parts_SFT[:, :4])
    if parts_SFT.shape[1] == NUM_SINGLE:
        return student_FT
    teacher_FT, teacher_share_ST = _merge_head(parts_SFT[:, 4:8])
    # Differences of the largest logits first: log-sums are large numbers, their difference is not.
    student_log_ST, teacher_log_ST = parts_SFT[:, TAIL].log1p(), parts_SFT[:, 4 + TAIL].log1p()
    to_teacher_ST = (parts_SFT[:, 4 + MAX] - student_FT[MAX]) + (teacher_log_ST - student_FT[TAIL].log1p())
    to_student_ST = (parts_SFT[:, MAX] - teacher_FT[MAX]) + (student_log_ST - teacher_FT[TAIL].log1p())
    # A part that is empty under the other head has no mass there.
    to_teacher_ST = torch.where(parts_SFT[:, 4 + MAX] == -torch.inf, -torch.inf, to_teacher_ST)
    to_student_ST = torch.where(parts_SFT[:, MAX] == -torch.inf, -torch.inf, to_student_ST)
    gap_FT = _merge_gap(student_share_ST, parts_SFT[:, 8], parts_SFT[:, 9], to_teacher_ST)
    teacher_gap_FT = _merge_gap(teacher_share_ST, parts_SFT[:, 10], parts_SFT[:, 11], to_student_ST)
    return torch.cat([student_FT, teacher_FT, gap_FT, teacher_gap_FT])


def _check_rows(stats_FT: torch.Tensor, num_rows: int) -> None:
    if stats_FT.dim() != 2 or stats_FT.shape[0] < num_rows:
        raise ValueError(f"stats_FT must be [{num_rows}, T], was {list(stats_FT.shape)}")


class HeadFinals(NamedTuple):
    """What the statistics of the whole vocabulary say of one head, each ``[T]``."""

    logp_T: torch.Tensor
    entropy_T: torch.Tensor
    lse_T: torch.Tensor


def head_finals(stats_FT: torch.Tensor) -> HeadFinals:
    """Log-prob of the target (-inf where it is in no set), entropy in nats and log-sum-exp, from rows 0 to 3.

    Raises ValueError where rows are missing.
    """
    _check_rows(stats_FT, NUM_SINGLE)
    max_T, tail_T, mean_T, target_T = stats_FT[:4].unbind()
    log_mass_T = tail_T.log1p()
    return HeadFinals((target_T - max_T) - log_mass_T, log_mass_T - mean_T, max_T + log_mass_T)


def _direct(stats_FT: torch.Tensor, *, teacher: bool) -> torch.Tensor:
    """Where the excess is too large (or lost) the divergence is the plain difference."""
    row = _GAP + 2 * teacher
    return ~(stats_FT[row + 1] < _LARGEST_EXCESS) | stats_FT[row].isinf()


def lse_difference(stats_FT: torch.Tensor) -> torch.Tensor:
    """lse_s - lse_t, so that log p_v - log q_v = (s_v - t_v) - this, without cancellation for close policies."""
    student, teacher = head_finals(stats_FT[:4]), head_finals(stats_FT[4:8])
    return torch.where(
        _direct(stats_FT, teacher=False),
        student.lse_T - teacher.lse_T,
        stats_FT[_GAP] - stats_FT[_GAP + 1].log1p(),
    )


def divergences(stats_FT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(student || teacher) and KL(teacher || student), nats ``[T]``, never negative.

    Raises ValueError where rows are missing.
    """
    _check_rows(stats_FT, NUM_DUAL)
    student, teacher = head_finals(stats_FT[:4]), head_finals(stats_FT[4:8])
    difference_T = student.lse_T - teacher.lse_T
    result = []
    for is_teacher, sign in ((False, 1), (True, -1)):
        row = _GAP + 2 * is_teacher
        plain_T = (stats_FT[row] - sign * difference_T).clamp(min=0)
        result.append(torch.where(_direct(stats_FT, teacher=is_teacher), plain_T, stats_FT[row + 1].log1p()))
    return result[0], result[1]
