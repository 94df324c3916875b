# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton has no types for what a kernel takes.
"""Statistics of logits without the logits: each program makes one tile in registers and leaves a few numbers per token.

merge.py makes one set of the tiles'. What the rows mean, and why nothing cancels, stands in
copd_kernels/statistics.py. ``store`` the tile as well and the gradient needs no second product: see gradient.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from copd_kernels.gpu.logits import expm1_minus_small, logits_tile, tile_begins

# Below it, relative to its tile's largest entry, a token's probability is 0 in fp32 whatever the rest.
FAR_X = tl.constexpr(-90.0)


@triton.jit
def or_zero(x):
    """0 in place of an infinity (or NaN)."""
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def _halves(x):
    """Left and right half of a tile; both stay in the registers they are in where the layout allows it."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def slices(x):
    """The four quarters of a tile from left to right.

    What follows is done slice by slice, each behind a condition that the compiler cannot foresee (whether the slice
    begins within the vocabulary). Otherwise it makes every intermediate of the whole tile before it sums any of them,
    and hundreds of registers spill.
    """
    left, right = _halves(x)
    a, b = _halves(left)
    c, d = _halves(right)
    return a, b, c, d


@triton.jit
def _add_head_sums(sums, z, largest, u):
    """Add a slice to: mass without the largest entry, number of largest entries, mass · x, mass · u; each ``[T]``.

    ``largest`` of the whole tile, 0 instead of -inf; x = z - largest, mass = exp(x).
    """
    rest, num_top, weighted, shift = sums
    x = z - largest[:, None]
    mass = tl.exp(x)
    # Not x == 0: with a fused multiply-add x differs from 0 by the rounding of z.
    is_top = z == largest[:, None]
    rest += tl.sum(tl.where(is_top, 0.0, mass), axis=1)
    num_top += tl.sum(is_top.to(tl.float32), axis=1)
    # A token without mass may have an infinite logit and no gap.
    weighted += tl.sum(tl.where(mass == 0.0, 0.0, mass * x), axis=1)
    shift += tl.sum(tl.where(mass == 0.0, 0.0, mass * u), axis=1)
    return rest, num_top, weighted, shift


@triton.jit
def _head_rows(largest, sums):
    """Of a tile: tail, log(1 + tail), mean, largest entry (NaN if any logit is), and the mean of u; each ``[T]``."""
    rest, num_top, weighted, shift = sums
    is_empty = largest == float("-inf")
    total = rest + num_top
    mean = tl.where(is_empty, total, weighted / total)
    shift = tl.where(is_empty, total, shift / total)
    return rest + (num_top - 1.0), tl.log(total), mean, tl.where(total == total, largest, total), shift


@triton.jit
def _store_row(partial, tile, row, num_rows: tl.constexpr, num_tokens, rows, values):
    at = (tile.to(tl.int64) * num_rows + row) * num_tokens + rows
    tl.store(partial + at, values, mask=rows < num_tokens)


@triton.jit
def _at_target(z, columns, target):
    """The entry of each token's target, -inf where the tile does not hold it."""
    return tl.max(tl.where(columns[None, :] == target[:, None], z, float("-inf")), axis=1)


@triton.jit
def single_statistics_tile(
    hidden,
    weight,
    bias,
    target,
    partial,
    stored,
    stride,
    num_tokens,
    vocab_size,
    hidden_size,
    inverse_temperature,
    softcap,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    USE_TMA: tl.constexpr,
    EVEN_D: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    STORE: tl.constexpr,
    CENTRED: tl.constexpr,
):
    """Partial statistics fp32 ``[tiles, 4, T]`` of one head; ``target`` int32 ``[T]``, -1 for none.

    With ``STORE`` also the logits, ``stored`` ``[T, stride]``: minus the tile's largest with ``CENTRED`` (fp16).
    """
    row_begin, column_begin = tile_begins(num_tokens, BLOCK_T, BLOCK_V)
    z = logits_tile(
        hidden,
        weight,
        bias,
        row_begin,
        column_begin,
        num_tokens,
        vocab_size,
        hidden_size,
        inverse_temperature,
        softcap,
        BLOCK_T,
        BLOCK_V,
        BLOCK_D,
        HAS_BIAS,
        HAS_SOFTCAP,
        USE_TMA,
        EVEN_D,
        WIDEN,
        PRECISION,
    )
    rows = row_begin + tl.arange(0, BLOCK_T)
    columns = column_begin + tl.arange(0, BLOCK_V)
    largest = tl.max(z, axis=1)
    reference = or_zero(largest)
    if STORE:
        at = rows.to(tl.int64)[:, None] * stride + columns[None, :]
        inside = (rows < num_tokens)[:, None] & (columns < vocab_size)[None, :]
        if CENTRED:
            tl.store(stored + at, (z - reference[:, None]).to(stored.dtype.element_ty), mask=inside)
        else:
            tl.store(stored + at, z, mask=inside)
    zero = tl.zeros_like(largest)
    sums = _add_head_sums((zero, zero, zero, zero), z, reference, z)
    tail, _, mean, top, _ = _head_rows(largest, sums)
    tile = column_begin // BLOCK_V
    wanted = tl.load(target + rows, mask=rows < num_tokens, other=-1)
    _store_row(partial, tile, 0, 4, num_tokens, rows, top)
    _store_row(partial, tile, 1, 4, num_tokens, rows, tail)
    _store_row(partial, tile, 2, 4, num_tokens, rows, mean)
    _store_row(partial, tile, 3, 4, num_tokens, rows, _at_target(z, columns, wanted))


@triton.jit
def _excess_terms(p, q, u):
    """p (u + expm1(-u)), u centred so that p exp(-u) = q up to ``scale``.

    Where u is not small the term is p (u - 1) + q: it cannot overflow, and q is all that is left of a token which this
    head excludes.
    """
    u = tl.where(p == 0.0, 0.0, u)
    is_near = (tl.abs(u) < 0.5) & (p != 0.0)
    return tl.where(is_near, p * expm1_minus_small(-u), p * (u - 1.0) + q)


@triton.jit
def _add_excess(sums, s, t, s_lse, t_lse, s_gap, t_gap, s_scale, t_scale):
    s_excess, t_excess = sums
    p = tl.exp(s - s_lse[:, None])
    q = tl.exp(t - t_lse[:, None])
    v = t - s
    s_excess += tl.sum(_excess_terms(p, q * s_scale[:, None], -v - s_gap[:, None]), axis=1)
    t_excess += tl.sum(_excess_terms(q, p * t_scale[:, None], v - t_gap[:, None]), axis=1)
    return s_excess, t_excess


@triton.jit
def _store_exact(z, stored, row_begin, column_begin, stride, num_tokens, vocab_size):
    rows = row_begin + tl.arange(0, z.shape[0])
    columns = column_begin + tl.arange(0, z.shape[1])
    at = rows.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(stored + at, z, mask=(rows < num_tokens)[:, None] & (columns < vocab_size)[None, :])


@triton.jit
def _store_centred(s, t, s_ref, t_ref, centre, stored_x, stored_r, at, inside):
    x = s - s_ref[:, None]
    # Clamped, because -inf says that the student excludes the token.
    x = tl.where((x < -60000.0) & (s != float("-inf")), -60000.0, x).to(stored_x.dtype.element_ty)
    r = tl.where(x.to(tl.float32) < FAR_X, t - t_ref[:, None], (s - t) - centre[:, None])
    tl.store(stored_x + at, x, mask=inside)
    tl.store(stored_r + at, r.to(stored_r.dtype.element_ty), mask=inside)


@triton.jit
def dual_statistics_tile(
    student_hidden,
    student_weight,
    student_bias,
    teacher_hidden,
    teacher_weight,
    teacher_bias,
    target,
    partial,
    stored_x,
    stored_r,
    stride,
    num_tokens,
    vocab_size,
    student_hidden_size,
    teacher_hidden_size,
    inverse_temperature,
    softcap,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_STUDENT_BIAS: tl.constexpr,
    HAS_TEACHER_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    USE_TMA: tl.constexpr,
    EVEN_D: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    STORE: tl.constexpr,
    CENTRED: tl.constexpr,
):
    """Partial statistics fp32 ``[tiles, 12, T]`` of two heads; ``target`` int32 ``[T]``, -1 for none.

    With ``STORE`` also the logits of both, ``[T, stride]`` each: as they are (fp32), or with ``CENTRED`` in fp16 as
    x = s - max s and r = (s - t) - (max s - max t), the tile's maxima, which are rows 0 and 4 of its statistics: small
    numbers, of which fp16 keeps 11 bits. Where x < FAR_X the token holds no probability of the student's, and r is
    t - max t instead.
    """
    row_begin, column_begin = tile_begins(num_tokens, BLOCK_T, BLOCK_V)
    s = logits_tile(
        student_hidden,
        student_weight,
        student_bias,
        row_begin,
        column_begin,
        num_tokens,
        vocab_size,
        student_hidden_size,
        inverse_temperature,
        softcap,
        BLOCK_T,
        BLOCK_V,
        BLOCK_D,
        HAS_STUDENT_BIAS,
        HAS_SOFTCAP,
        USE_TMA,
        EVEN_D,
        WIDEN,
        PRECISION,
    )
    if STORE and not CENTRED:
        # Before the other product, where nothing else is in the registers.
        _store_exact(s, stored_x, row_begin, column_begin, stride, num_tokens, vocab_size)
    t = logits_tile(
        teacher_hidden,
        teacher_weight,
        teacher_bias,
        row_begin,
        column_begin,
        num_tokens,
        vocab_size,
        teacher_hidden_size,
        inverse_temperature,
        softcap,
        BLOCK_T,
        BLOCK_V,
        BLOCK_D,
        HAS_TEACHER_BIAS,
        HAS_SOFTCAP,
        USE_TMA,
        EVEN_D,
        WIDEN,
        PRECISION,
    )
    if STORE and not CENTRED:
        _store_exact(t, stored_r, row_begin, column_begin, stride, num_tokens, vocab_size)
    rows = row_begin + tl.arange(0, BLOCK_T)
    s_max = tl.max(s, axis=1)
    t_max = tl.max(t, axis=1)
    # Two close policies differ by about this in every entry; what is left is small and exact.
    centre = or_zero(s_max - t_max)
    s_ref = or_zero(s_max)
    t_ref = or_zero(t_max)
    s_parts = slices(s)
    t_parts = slices(t)
    WIDTH: tl.constexpr = BLOCK_V // 4
    zero = tl.zeros_like(s_max)
    s_sums = (zero, zero, zero, zero)
    t_sums = (zero, zero, zero, zero)
    if CENTRED:
        for i in tl.static_range(4):
            column = column_begin + i * WIDTH
            if column < vocab_size:
                inside = (rows < num_tokens)[:, None] & (column + tl.arange(0, WIDTH) < vocab_size)[None, :]
                at = rows.to(tl.int64)[:, None] * stride + (column + tl.arange(0, WIDTH))[None, :]
                _store_centred(s_parts[i], t_parts[i], s_ref, t_ref, centre, stored_x, stored_r, at, inside)
    wanted = tl.load(target + rows, mask=rows < num_tokens, other=-1)
    s_target = zero + float("-inf")
    t_target = zero + float("-inf")
    for i in tl.static_range(4):
        column = column_begin + i * WIDTH
        if column < vocab_size:
            s_target = tl.maximum(s_target, _at_target(s_parts[i], column + tl.arange(0, WIDTH), wanted))
            t_target = tl.maximum(t_target, _at_target(t_parts[i], column + tl.arange(0, WIDTH), wanted))
    for i in tl.static_range(4):
        if column_begin + i * WIDTH < vocab_size:
            u = (s_parts[i] - t_parts[i]) - centre[:, None]
            s_sums = _add_head_sums(s_sums, s_parts[i], s_ref, u)
            t_sums = _add_head_sums(t_sums, t_parts[i], t_ref, -u)
    s_tail, s_log_mass, s_mean, s_top, s_shift = _head_rows(s_max, s_sums)
    t_tail, t_log_mass, t_mean, t_top, t_shift = _head_rows(t_max, t_sums)

    # The second pass over the tile makes everything anew, from other expressions, so that the compiler does not keep
    # the first pass' in registers.
    s_gap = centre + s_shift
    t_gap = t_shift - centre
    s_lse = s_ref + or_zero(s_log_mass)
    t_lse = t_ref + or_zero(t_log_mass)
    # p exp(-u) = q exp(this).
    s_scale = tl.exp(tl.minimum(t_lse - s_lse + s_gap, 80.0))
    t_scale = tl.exp(tl.minimum(s_lse - t_lse + t_gap, 80.0))
    excess = (zero, zero)
    for i in tl.static_range(4):
        if column_begin + i * WIDTH < vocab_size:
            excess = _add_excess(excess, s_parts[i], t_parts[i], s_lse, t_lse, s_gap, t_gap, s_scale, t_scale)
    s_excess, t_excess = excess
    tile = column_begin // BLOCK_V
    _store_row(partial, tile, 0, 12, num_tokens, rows, s_top)
    _store_row(partial, tile, 1, 12, num_tokens, rows, s_tail)
    _store_row(partial, tile, 2, 12, num_tokens, rows, s_mean)
    _store_row(partial, tile, 3, 12, num_tokens, rows, s_target)
    _store_row(partial, tile, 4, 12, num_tokens, rows, t_top)
    _store_row(partial, tile, 5, 12, num_tokens, rows, t_tail)
    _store_row(partial, tile, 6, 12, num_tokens, rows, t_mean)
    _store_row(partial, tile, 7, 12, num_tokens, rows, t_target)
    # The gap is infinite where the other head excludes a token that this one allows; the excess has no meaning then.
    _store_row(partial, tile, 8, 12, num_tokens, rows, s_gap)
    _store_row(partial, tile, 9, 12, num_tokens, rows, s_excess)
    _store_row(partial, tile, 10, 12, num_tokens, rows, t_gap)
    _store_row(partial, tile, 11, 12, num_tokens, rows, t_excess)
