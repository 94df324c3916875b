# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton has no types for what a kernel takes.
"""What one vocabulary entry contributes: to the gradient of the logits, and to the quantities of the second pass.

Used on tiles that were just made and on tiles that were stored, so that both plans give the same numbers. The formulas
are those of copd_kernels/_rows.py. ``params`` fp32 holds what they need of a token, see driver.py:

single ``[5, T]``: max, log(1 + tail), a, e, o
dual ``[12, T]``: student max, log(1 + tail), gap, lse_s - lse_t, teacher max, log(1 + tail), a, e, o, reverse, forward,
jsd; entropy and E_p[log(p / m)] are already in a.
"""

from __future__ import annotations

import triton
import triton.language as tl

from copd_kernels.gpu.logits import expm1, log1p
from copd_kernels.gpu.statistics import FAR_X

# Far above it in the gap between the policies: the teacher's probability is taken as such, not as a multiple of p.
_FAR_DELTA = tl.constexpr(-10.0)


@triton.jit
def param(params, row: tl.constexpr, rows, num_tokens):
    """One row of the parameters, a column vector ``[T, 1]``."""
    return tl.load(params + row * num_tokens + rows, mask=rows < num_tokens, other=0.0)[:, None]


@triton.jit
def chain(grad, z, inverse_temperature, softcap, HAS_SOFTCAP: tl.constexpr):
    """From the gradient of the logits ``z`` to that of the raw product."""
    if HAS_SOFTCAP:
        capped = z / (softcap * inverse_temperature)
        grad = tl.where(z == float("-inf"), 0.0, grad * (1.0 - capped * capped))
    return grad * inverse_temperature


@triton.jit
def single_gradient(
    logp, z, params, rows, columns, wanted, num_tokens, inverse_temperature, softcap, CAP: tl.constexpr
):
    """p (a + e log p) + o [v = target], chained; ``logp`` and ``z`` ``[T, V]``, ``wanted`` int32 ``[T]``."""
    p = tl.exp(logp)
    factor = param(params, 2, rows, num_tokens) + param(params, 3, rows, num_tokens) * logp
    # An excluded token has log p = -inf.
    grad = tl.where(p == 0.0, 0.0, p * factor)
    at_target = columns[None, :] == wanted[:, None]
    grad += tl.where(at_target, param(params, 4, rows, num_tokens), 0.0)
    return chain(grad, z, inverse_temperature, softcap, CAP)


@triton.jit
def from_logits(s, t, params, rows, num_tokens):
    """log p, log q, gap - c, Δ = log p - log q of a tile ``[T, V]``."""
    logp = (s - param(params, 0, rows, num_tokens)) - param(params, 1, rows, num_tokens)
    logq = (t - param(params, 4, rows, num_tokens)) - param(params, 5, rows, num_tokens)
    # Both exclude the token: no gap.
    gap = tl.where((s == float("-inf")) & (t == float("-inf")), 0.0, s - t)
    return logp, logq, gap - param(params, 2, rows, num_tokens), gap - param(params, 3, rows, num_tokens)


@triton.jit
def from_centred(x, r, s_max, t_max, params, rows, num_tokens):
    """The same from what ``dual_statistics_tile`` stored (as fp32), and the student's logits.

    ``s_max`` and ``t_max`` ``[T]``: the tile's largest logits.
    """
    centre = s_max - t_max
    centre = tl.where(tl.abs(centre) < float("inf"), centre, 0.0)[:, None]
    is_far = x < FAR_X
    logp = (x + (s_max[:, None] - param(params, 0, rows, num_tokens))) - param(params, 1, rows, num_tokens)
    logp = tl.where(x == float("-inf"), x, logp)
    teacher = (r + (t_max[:, None] - param(params, 4, rows, num_tokens))) - param(params, 5, rows, num_tokens)
    teacher = tl.where(r == float("-inf"), r, teacher)
    # Where there is no p left, q is all that counts: any Δ far below says so.
    delta = tl.where(is_far, -100.0, r + (centre - param(params, 3, rows, num_tokens)))
    gap = tl.where(is_far, 0.0, r + (centre - param(params, 2, rows, num_tokens)))
    z = tl.where(x == float("-inf"), x, x + s_max[:, None])
    return logp, tl.where(is_far, teacher, logp - delta), gap, delta, z


@triton.jit
def log_p_over_mixture(delta, beta):
    """log(p / m), m = beta q + (1 - beta) p."""
    near = -log1p(beta * expm1(-delta))
    # exp(-Δ) overflows below; there q dominates the mixture.
    far = delta - tl.log(beta) - log1p((1.0 - beta) / beta * tl.exp(delta))
    return tl.where(delta < _FAR_DELTA, far, near)


@triton.jit
def dual_gradient(
    logp,
    logq,
    gap,
    delta,
    s,
    params,
    rows,
    columns,
    wanted,
    num_tokens,
    inverse_temperature,
    softcap,
    beta,
    CAP: tl.constexpr,
    WITH_JSD: tl.constexpr,
):
    """The student's gradient, chained: surrogate, entropy, reverse KL, forward KL and JSD in one."""
    p = tl.exp(logp)
    factor = param(params, 6, rows, num_tokens) + param(params, 7, rows, num_tokens) * logp
    reverse = param(params, 9, rows, num_tokens)
    # Not 0 · inf: a token that the teacher excludes makes the gap infinite also where no reverse KL is asked for.
    factor += tl.where(reverse == 0.0, 0.0, reverse * gap)
    if WITH_JSD:
        factor += param(params, 11, rows, num_tokens) * log_p_over_mixture(delta, beta)
    grad = tl.where(p == 0.0, 0.0, p * factor)
    difference = tl.where(delta < _FAR_DELTA, p - tl.exp(logq), -p * expm1(-delta))
    # Where the student excludes the token there is nothing to push.
    grad += tl.where(s == float("-inf"), 0.0, param(params, 10, rows, num_tokens) * difference)
    at_target = columns[None, :] == wanted[:, None]
    grad += tl.where(at_target, param(params, 8, rows, num_tokens), 0.0)
    return chain(grad, s, inverse_temperature, softcap, CAP)


@triton.jit
def second_sums(logp, logq, delta, beta):
    """Row sums of min(p, q), the terms of JSD_beta, and p log(p / m); ``[T]`` each.

    A term of the JSD, after adding what sums to 0, is p M (K' u - K) >= 0 with u = -Δ and K the cumulant generating
    function of a Bernoulli(beta) variable. Where u is small: p M sum_n kappa_n u^n (n - 1) / n!, kappa_n its cumulants.
    """
    p = tl.exp(logp)
    q = tl.exp(logq)
    log_ratio = log_p_over_mixture(delta, beta)
    u = -delta
    direct = tl.where(q == 0.0, 0.0, beta * q * (u + log_ratio))
    direct += tl.where(p == 0.0, 0.0, (1.0 - beta) * p * log_ratio)
    # The student excludes the token: all that is left of the mixture is beta q.
    direct = tl.where((p == 0.0) & (q > 0.0), -beta * tl.log(beta) * q, direct)
    v = beta * (1.0 - beta)
    skew = 1.0 - 2.0 * beta
    series = v / 144.0 * (1.0 - 30.0 * v + 120.0 * v * v)
    series = v * skew * (1.0 - 12.0 * v) / 30.0 + u * series
    series = v * (1.0 - 6.0 * v) / 8.0 + u * series
    series = v * skew / 3.0 + u * series
    series = v / 2.0 + u * series
    small = (beta * q + (1.0 - beta) * p) * u * u * series
    terms = tl.where(tl.abs(u) < 0.05, small, direct)
    sum_min = tl.sum(tl.minimum(p, q, propagate_nan=tl.PropagateNan.ALL), axis=1)
    return sum_min, tl.sum(terms, axis=1), tl.sum(tl.where(p == 0.0, 0.0, p * log_ratio), axis=1)


@triton.jit
def store_second(second, part, rows, num_tokens, sum_min, jsd, mean_ratio):
    """The three sums of a part of the vocabulary into ``second`` ``[parts, 3, T]``."""
    at = part.to(tl.int64) * 3 * num_tokens + rows
    tl.store(second + at, sum_min, mask=rows < num_tokens)
    tl.store(second + at + num_tokens, jsd, mask=rows < num_tokens)
    tl.store(second + at + 2 * num_tokens, mean_ratio, mask=rows < num_tokens)
