# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton has no types for what a kernel takes.
"""Gradients of the raw product and the second pass from logits that the kernels of statistics.py stored.

``params`` and the formulas: terms.py. ``TILE_V``: the width of the tiles of ``partial``, their partial statistics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from copd_kernels.gpu import terms
from copd_kernels.gpu.logits import tile_begins


@triton.jit
def _tile_row(partial, tile, row: tl.constexpr, num_rows: tl.constexpr, rows, num_tokens):
    """One row of the partial statistics of a tile, ``[T]``."""
    at = (tile.to(tl.int64) * num_rows + row) * num_tokens + rows
    return tl.load(partial + at, mask=rows < num_tokens, other=0.0)


@triton.jit
def single_gradient_rows(
    stored,
    partial,
    grad,
    params,
    target,
    stride,
    num_tokens,
    vocab_size,
    inverse_temperature,
    softcap,
    BLOCK_T: tl.constexpr,
    TILE_V: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    CENTRED: tl.constexpr,
):
    """Gradient ``[T, stride]`` of one head from the stored logits, whose memory ``grad`` may share: a program reads
    its own entries before it writes them."""
    row_begin, column_begin = tile_begins(num_tokens, BLOCK_T, TILE_V)
    rows = row_begin + tl.arange(0, BLOCK_T)
    columns = column_begin + tl.arange(0, TILE_V)
    at = rows.to(tl.int64)[:, None] * stride + columns[None, :]
    inside = (rows < num_tokens)[:, None] & (columns < vocab_size)[None, :]
    z = tl.load(stored + at, mask=inside, other=0.0).to(tl.float32)
    top = terms.param(params, 0, rows, num_tokens)
    if CENTRED:
        tile_top = _tile_row(partial, column_begin // TILE_V, 0, 4, rows, num_tokens)[:, None]
        logp = tl.where(z == float("-inf"), z, z + (tile_top - top))
        z = tl.where(z == float("-inf"), z, z + tile_top)
    else:
        logp = z - top
    logp -= terms.param(params, 1, rows, num_tokens)
    wanted = tl.load(target + rows, mask=rows < num_tokens, other=-1)
    result = terms.single_gradient(
        logp, z, params, rows, columns, wanted, num_tokens, inverse_temperature, softcap, HAS_SOFTCAP
    )
    tl.store(grad + at, result.to(grad.dtype.element_ty), mask=inside)


@triton.jit
def _load_pair(stored_x, stored_r, partial, params, at, inside, tile, rows, num_tokens, CENTRED: tl.constexpr):
    """log p, log q, gap - c, Δ and the student's logits of a stored tile."""
    x = tl.load(stored_x + at, mask=inside, other=float("-inf")).to(tl.float32)
    r = tl.load(stored_r + at, mask=inside, other=float("-inf")).to(tl.float32)
    if CENTRED:
        s_max = _tile_row(partial, tile, 0, 12, rows, num_tokens)
        t_max = _tile_row(partial, tile, 4, 12, rows, num_tokens)
        logp, logq, gap, delta, s = terms.from_centred(x, r, s_max, t_max, params, rows, num_tokens)
    else:
        s = x
        logp, logq, gap, delta = terms.from_logits(x, r, params, rows, num_tokens)
    return logp, logq, gap, delta, s


@triton.jit
def dual_gradient_rows(
    stored_x,
    stored_r,
    partial,
    grad,
    params,
    target,
    stride,
    num_tokens,
    vocab_size,
    inverse_temperature,
    softcap,
    beta,
    BLOCK_T: tl.constexpr,
    TILE_V: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    CENTRED: tl.constexpr,
    WITH_JSD: tl.constexpr,
):
    """The student's gradient ``[T, stride]`` from the stored logits; ``grad`` may share the memory of ``stored_x``."""
    row_begin, column_begin = tile_begins(num_tokens, BLOCK_T, TILE_V)
    rows = row_begin + tl.arange(0, BLOCK_T)
    columns = column_begin + tl.arange(0, TILE_V)
    at = rows.to(tl.int64)[:, None] * stride + columns[None, :]
    inside = (rows < num_tokens)[:, None] & (columns < vocab_size)[None, :]
    logp, logq, gap, delta, s = _load_pair(
        stored_x, stored_r, partial, params, at, inside, column_begin // TILE_V, rows, num_tokens, CENTRED
    )
    wanted = tl.load(target + rows, mask=rows < num_tokens, other=-1)
    result = terms.dual_gradient(
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
        HAS_SOFTCAP,
        WITH_JSD,
    )
    tl.store(grad + at, result.to(grad.dtype.element_ty), mask=inside)


@triton.jit
def second_rows(
    stored_s,
    stored_t,
    second,
    params,
    stride,
    num_tokens,
    vocab_size,
    tiles_per_part,
    beta,
    BLOCK_T: tl.constexpr,
    TILE_V: tl.constexpr,
):
    """sum min(p, q), JSD_beta, E_p[log(p / m)] of parts of the vocabulary, fp32 ``[parts, 3, T]``: their sum is that
    of the whole. The stored logits are fp32: what is made of them is a result, and no longer a gradient."""
    num_blocks = tl.cdiv(num_tokens, BLOCK_T)
    rows = (tl.program_id(0) % num_blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
    part = tl.program_id(0) // num_blocks
    sum_min = tl.zeros((BLOCK_T,), tl.float32)
    jsd = tl.zeros((BLOCK_T,), tl.float32)
    mean_ratio = tl.zeros((BLOCK_T,), tl.float32)
    end = tl.minimum((part + 1) * tiles_per_part, tl.cdiv(vocab_size, TILE_V))
    for tile in range(part * tiles_per_part, end):
        columns = tile * TILE_V + tl.arange(0, TILE_V)
        at = rows.to(tl.int64)[:, None] * stride + columns[None, :]
        inside = (rows < num_tokens)[:, None] & (columns < vocab_size)[None, :]
        s = tl.load(stored_s + at, mask=inside, other=float("-inf"))
        t = tl.load(stored_t + at, mask=inside, other=float("-inf"))
        logp, logq, _, delta = terms.from_logits(s, t, params, rows, num_tokens)
        a, b, c = terms.second_sums(logp, logq, delta, beta)
        sum_min += a
        jsd += b
        mean_ratio += c
    terms.store_second(second, part, rows, num_tokens, sum_min, jsd, mean_ratio)
