"""Operations on rows of logits: statistics, gradients, top-k. Schemas and ATen bodies; csrc/rows_*.cpp has the CPU's.

Buffers are ``[C, Vt]``: C tokens, a tile of the vocabulary that begins at ``v_begin``. ``target`` int64 ``[C]`` is an
index into the whole vocabulary, -1 for none. What the rows of ``stats`` mean, and how tiles merge, stands in
statistics.py; second pass and gradients want the statistics of the whole vocabulary.

The compiled bodies take fp32. The ATen bodies take fp64 as well and are what runs without the compiled library.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from copd_kernels import statistics
from copd_kernels._library import native_available

_NAMESPACE = "copd_kernels"
_SCHEMAS = {
    "prepare_": "(Tensor(a!) z, Tensor? bias, float temperature, float softcap) -> ()",
    "single_stats_": "(Tensor z, int v_begin, Tensor target, Tensor(a!) stats) -> ()",
    "dual_stats_": "(Tensor s, Tensor t, int v_begin, Tensor target, Tensor(a!) stats) -> ()",
    "second_": "(Tensor s, Tensor t, Tensor stats, float beta, Tensor(a!) second) -> ()",
    "single_grad_": "(Tensor(a!) z, int v_begin, Tensor target, Tensor stats, Tensor coefs, float temperature,"
    " float softcap) -> ()",
    "dual_grad_": "(Tensor(a!) s, Tensor t, int v_begin, Tensor target, Tensor stats, Tensor second, Tensor coefs,"
    " float beta, float temperature, float softcap) -> ()",
    "topk_": "(Tensor z, int v_begin, Tensor(a!) values, Tensor(b!) indices) -> ()",
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"{_NAMESPACE}::{_name}", _schema)

# Far above it in the gap between the policies: the teacher's probability is taken as such, not as a multiple of p.
_FAR = -10.0


def prepare_aten(z: torch.Tensor, bias: torch.Tensor | None, temperature: float, softcap: float) -> None:
    """The raw product becomes logits: plus bias, softcap (0: none), over the temperature."""
    if bias is not None:
        z += bias
    if softcap:
        z.div_(softcap).tanh_().mul_(softcap)
    if temperature != 1.0:
        z /= temperature


def _chain_(grad: torch.Tensor, z: torch.Tensor, temperature: float, softcap: float) -> None:
    """From the gradient of the logits z to that of the raw product."""
    if temperature != 1.0:
        grad /= temperature
    if softcap:
        grad *= 1 - (z * (temperature / softcap)).square()


def _target_column(z: torch.Tensor, v_begin: int, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Column of each row's target ``[C, 1]`` (0 if elsewhere), and whether it is in the tile."""
    column = target - v_begin
    inside = (column >= 0) & (column < z.shape[1])
    return torch.where(inside, column, 0)[:, None], inside[:, None]


def _head_part(z: torch.Tensor, v_begin: int, target: torch.Tensor) -> torch.Tensor:
    """Rows 0 to 3 of the tile's statistics, ``[4, C]``."""
    largest, argmax = z.max(-1, keepdim=True)
    x = z - largest
    mass = x.exp()
    mean_terms = torch.where(mass == 0, 0, mass * x)
    tail = mass.scatter(-1, argmax, 0).sum(-1)
    mean = mean_terms.sum(-1) / (1 + tail)
    column, inside = _target_column(z, v_begin, target)
    at_target = torch.where(inside, z.gather(-1, column), -torch.inf)[:, 0]
    largest = largest[:, 0]
    empty = largest == -torch.inf
    return torch.stack([largest, torch.where(empty, -1, tail), torch.where(empty, 0, mean), at_target])


def _gap_part(s: torch.Tensor, t: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """Gap and excess of the tile under the softmax of s, ``[2, C]``; ``head`` are the first four rows of s."""
    largest, mass = head[0, :, None], (1 + head[1])[:, None]
    weight = (s - largest).exp()
    possible = weight != 0
    gap = s - t
    # Differences from the gap at the most likely token are small numbers; the gaps themselves are not.
    centre = gap.gather(-1, s.argmax(-1, keepdim=True))
    u = torch.where(possible, gap - centre, 0)
    shift = (weight * u).sum(-1, keepdim=True) / mass
    u = u - shift
    # Also where the most likely token is the one that the other head excludes, and the centre is infinite.
    infinite = (possible & (gap == torch.inf)).any(-1, keepdim=True)
    mean_gap = torch.where(infinite, torch.inf, centre + shift)
    # p exp(-u) where that is large or p is 0: what is left is the teacher's mass, which does not overflow.
    teacher_mass = (t - largest + mean_gap).clamp(max=statistics._LARGEST_EXPONENT).exp()
    far = torch.where(possible, weight * (u - 1), 0) + torch.where(t == -torch.inf, 0, teacher_mass)
    terms = torch.where(possible & ~(u < _FAR), weight * statistics.expm1_minus(-u), far)
    excess = terms.sum(-1, keepdim=True) / mass
    excess = torch.where(mean_gap.isinf(), 0, excess)
    part = torch.cat([mean_gap, excess], -1).T
    return part.masked_fill(largest.T.isneginf(), 0)


def single_stats_aten(z: torch.Tensor, v_begin: int, target: torch.Tensor, stats: torch.Tensor) -> None:
    """Merge the tile into ``stats [4, C]``."""
    if z.numel():
        stats.copy_(statistics.merge_statistics(torch.stack([stats, _head_part(z, v_begin, target)])))


def dual_stats_aten(s: torch.Tensor, t: torch.Tensor, v_begin: int, target: torch.Tensor, stats: torch.Tensor) -> None:
    """Merge the tile of both heads into ``stats [12, C]``."""
    if not s.numel():
        return
    student, teacher = _head_part(s, v_begin, target), _head_part(t, v_begin, target)
    part = torch.cat([student, teacher, _gap_part(s, t, student), _gap_part(t, s, teacher)])
    stats.copy_(statistics.merge_statistics(torch.stack([stats, part])))


def _probabilities(
    s: torch.Tensor, t: torch.Tensor, stats: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """p, q, log p and Δ = log p - log q of a tile, each ``[C, Vt]``; Δ is 0 where both exclude the token."""
    logp = (s - stats[0, :, None]) - stats[1, :, None].log1p()
    p, q = logp.exp(), ((t - stats[4, :, None]) - stats[5, :, None].log1p()).exp()
    delta = (s - t) - statistics.lse_difference(stats)[:, None]
    return p, q, logp, torch.where((s == -torch.inf) & (t == -torch.inf), 0, delta)


def _log_p_over_mixture(delta: torch.Tensor, beta: float) -> torch.Tensor:
    """log(p / m), m = beta q + (1 - beta) p."""
    near = -torch.log1p(beta * torch.expm1(-delta))
    # exp(-Δ) overflows below; there q dominates the mixture.
    far = delta - math.log(beta) - torch.log1p((1 - beta) / beta * delta.exp())
    return torch.where(delta < _FAR, far, near)


def _jsd_terms(p: torch.Tensor, q: torch.Tensor, delta: torch.Tensor, beta: float) -> torch.Tensor:
    """beta q log(q / m) + (1 - beta) p log(p / m) per entry, after adding terms that sum to 0: every one is >= 0.

    With u = -Δ, M = m / p and K = log M, the cumulant generating function of a Bernoulli(beta) variable at u, the term
    is p M (K' u - K). Where u is small that is p M sum_n kappa_n u^n (n - 1) / n!, kappa_n its cumulants.
    """
    log_ratio = _log_p_over_mixture(delta, beta)
    u = -delta.clamp(max=statistics._LARGEST_EXPONENT)
    mixture = beta * q + (1 - beta) * p
    direct = beta * torch.where(q == 0, 0, q * (u + log_ratio)) + torch.where(p == 0, 0, (1 - beta) * p * log_ratio)
    # The student excludes the token: all that is left of the mixture is beta q.
    direct = torch.where((p == 0) & (q > 0), -beta * math.log(beta) * q, direct)
    v, skew = beta * (1 - beta), 1 - 2 * beta
    series = torch.full_like(u, v / 144 * (1 - 30 * v + 120 * v * v))
    for coefficient in (skew * (1 - 12 * v) / 30, (1 - 6 * v) / 8, skew / 3, 1 / 2):
        series = v * coefficient + u * series
    small = 0.05 if p.dtype == torch.float32 else 2e-3
    return torch.where(u.abs() < small, mixture * u.square() * series, direct)


def second_aten(s: torch.Tensor, t: torch.Tensor, stats: torch.Tensor, beta: float, second: torch.Tensor) -> None:
    """Add the tile to ``second [3, C]``: sum min(p, q), JSD, E_p[log(p / m)]."""
    p, q, _, delta = _probabilities(s, t, stats)
    second[0] += torch.minimum(p, q).sum(-1)
    second[1] += _jsd_terms(p, q, delta, beta).sum(-1)
    second[2] += torch.where(p == 0, 0, p * _log_p_over_mixture(delta, beta)).sum(-1)


def _add_at_target_(grad: torch.Tensor, v_begin: int, target: torch.Tensor, value: torch.Tensor) -> None:
    column, inside = _target_column(grad, v_begin, target)
    grad.scatter_add_(-1, column, torch.where(inside, value[:, None], 0))


def single_grad_aten(
    z: torch.Tensor,
    v_begin: int,
    target: torch.Tensor,
    stats: torch.Tensor,
    coefs: torch.Tensor,
    temperature: float,
    softcap: float,
) -> None:
    """p (a + e (log p + entropy)) + o [v = target] with ``coefs`` = (a, e, o), in place of the logits."""
    if not z.numel():
        return
    finals = statistics.head_finals(stats)
    a, e, o = coefs[:, :, None]
    logp = (z - stats[0, :, None]) - stats[1, :, None].log1p()
    p = logp.exp()
    grad = torch.where(p == 0, 0, p * (a + e * (logp + finals.entropy_T[:, None])))
    _add_at_target_(grad, v_begin, target, o[:, 0])
    _chain_(grad, z, temperature, softcap)
    z.copy_(grad)


def dual_grad_aten(
    s: torch.Tensor,
    t: torch.Tensor,
    v_begin: int,
    target: torch.Tensor,
    stats: torch.Tensor,
    second: torch.Tensor,
    coefs: torch.Tensor,
    beta: float,
    temperature: float,
    softcap: float,
) -> None:
    """The student's gradient with ``coefs`` = (a, e, o, reverse KL, forward KL, JSD), in place of its logits."""
    if not s.numel():
        return
    finals = statistics.head_finals(stats)
    a, e, o, reverse, forward, jsd = coefs[:, :, None]
    p, q, logp, delta = _probabilities(s, t, stats)
    # Where the teacher excludes a token the gap is infinite, and 0 times it is not a number.
    centred = torch.where(reverse == 0, 0, (s - t) - stats[8, :, None])
    factor = a + e * (logp + finals.entropy_T[:, None]) + reverse * centred
    if bool((jsd != 0).any()):
        factor = factor + jsd * (_log_p_over_mixture(delta, beta) - second[2, :, None])
    grad = torch.where(p == 0, 0, p * factor)
    # p - q: where the student excludes the token there is nothing to push.
    forward_terms = torch.where(delta < _FAR, p - q, -p * torch.expm1(-delta))
    grad += torch.where(s == -torch.inf, 0, forward * forward_terms)
    _add_at_target_(grad, v_begin, target, o[:, 0])
    _chain_(grad, s, temperature, softcap)
    s.copy_(grad)


def topk_aten(z: torch.Tensor, v_begin: int, values: torch.Tensor, indices: torch.Tensor) -> None:
    """Merge the tile into the running top k, largest first, ties by lower index; empty places are (-inf, -1)."""
    top_k = values.shape[1]
    if not z.numel():
        return
    # A broken row has no top k; whoever reports the overlap sees NaN in the row's statistics.
    clean = z.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    kept = min(top_k, z.shape[1])
    smallest = clean.topk(kept, dim=-1).values[:, -1:]
    above, tied = clean > smallest, clean == smallest
    chosen = above | (tied & (tied.cumsum(-1, dtype=torch.int32) <= kept - above.sum(-1, keepdim=True)))
    columns = chosen.nonzero()[:, 1].view(len(z), kept)
    all_values = torch.cat([values, clean.gather(-1, columns)], -1)
    all_indices = torch.cat([indices, columns + v_begin], -1)
    # Two stable sorts: by index, empty places last, then by value.
    order = torch.where(all_indices < 0, torch.iinfo(torch.int64).max, all_indices).argsort(dim=-1, stable=True)
    all_values, all_indices = all_values.gather(-1, order), all_indices.gather(-1, order)
    order = all_values.argsort(dim=-1, descending=True, stable=True)[:, :top_k]
    values.copy_(all_values.gather(-1, order))
    indices.copy_(all_indices.gather(-1, order))


_ATEN: dict[str, Callable[..., None]] = {
    "prepare_": prepare_aten,
    "single_stats_": single_stats_aten,
    "dual_stats_": dual_stats_aten,
    "second_": second_aten,
    "single_grad_": single_grad_aten,
    "dual_grad_": dual_grad_aten,
    "topk_": topk_aten,
}
for _name, _body in _ATEN.items():
    torch.library.impl(f"{_NAMESPACE}::{_name}", "CompositeExplicitAutograd", _body)
native_available()
