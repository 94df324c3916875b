# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton has no types for what a kernel takes.
"""Tiles of logits, made in registers: the product of hidden states and lm_head rows, then bias, softcap, temperature.

Also the few functions that Triton's own language lacks and that must not cancel. They are polynomials rather than
libdevice calls so that the interpreter, CUDA and HIP compute the same thing.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def expm1_minus_small(x):
    """expm1(x) - x >= 0 for |x| < 0.5 by its series (next term relative: x^8 / 1.8e6)."""
    series = 1.0 / 40320 + x * (1.0 / 362880)
    series = 1.0 / 5040 + x * series
    series = 1.0 / 720 + x * series
    series = 1.0 / 120 + x * series
    series = 1.0 / 24 + x * series
    series = 1.0 / 6 + x * series
    series = 1.0 / 2 + x * series
    return x * x * series


@triton.jit
def expm1_minus(x):
    """expm1(x) - x >= 0 for every x."""
    return tl.where(tl.abs(x) < 0.5, expm1_minus_small(x), tl.exp(x) - 1.0 - x)


@triton.jit
def expm1(x):
    """exp(x) - 1. Where exp(x) overflows it is inf, and -1 at -inf."""
    return tl.where(tl.abs(x) < 0.5, x + expm1_minus_small(x), tl.exp(x) - 1.0)


@triton.jit
def log1p(x):
    """log(1 + x): 2 atanh(x / (2 + x)) by its series where |x| < 0.5 (argument at most 1/3)."""
    z = x / (2.0 + x)
    w = z * z
    series = 1.0 / 13 + w * (1.0 / 15)
    series = 1.0 / 11 + w * series
    series = 1.0 / 9 + w * series
    series = 1.0 / 7 + w * series
    series = 1.0 / 5 + w * series
    series = 1.0 / 3 + w * series
    return tl.where(tl.abs(x) < 0.5, 2.0 * z + 2.0 * z * w * series, tl.log(1.0 + x))


@triton.jit
def tanh(x):
    """tanh by expm1, so that small arguments keep their digits."""
    fall = expm1(-2.0 * tl.abs(x))
    size = -fall / (2.0 + fall)
    return tl.where(x < 0, -size, size)


@triton.jit
def tile_begins(num_tokens, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr):
    """First token and first vocabulary entry of this program's tile, int32.

    The grid lies on axis 0 alone, whose limit is 2^31 - 1 and not 65,535. Neighbours share their lm_head rows: these
    are read once, and the hidden states of a chunk stay in L2.
    """
    num_blocks = tl.cdiv(num_tokens, BLOCK_T)
    return (tl.program_id(0) % num_blocks) * BLOCK_T, (tl.program_id(0) // num_blocks) * BLOCK_V


@triton.jit
def logits_tile(
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
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    USE_TMA: tl.constexpr,
    EVEN_D: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Logits fp32 ``[BLOCK_T, BLOCK_V]``, -inf beyond the vocabulary.

    ``hidden`` ``[T, D]`` and ``weight`` ``[V, D]``: contiguous, or descriptors of their tiles with ``USE_TMA``;
    ``bias`` fp32 ``[V]``. ``EVEN_D``: D is a multiple of ``BLOCK_D``.
    """
    rows = row_begin + tl.arange(0, BLOCK_T)
    columns = column_begin + tl.arange(0, BLOCK_V)
    depth = tl.arange(0, BLOCK_D)
    # int64: T·D and V·D may pass 2^31.
    hidden_rows = rows.to(tl.int64)[:, None] * hidden_size
    weight_rows = columns.to(tl.int64)[None, :] * hidden_size
    logits = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    for d in range(0, hidden_size, BLOCK_D):
        if USE_TMA:
            a = hidden.load([row_begin, d])
            b = weight.load([column_begin, d]).T
        else:
            a_mask = (rows < num_tokens)[:, None]
            b_mask = (columns < vocab_size)[None, :]
            if not EVEN_D:
                a_mask = a_mask & (d + depth < hidden_size)[None, :]
                b_mask = b_mask & (d + depth < hidden_size)[:, None]
            a = tl.load(hidden + hidden_rows + (d + depth)[None, :], mask=a_mask, other=0.0)
            b = tl.load(weight + weight_rows + (d + depth)[:, None], mask=b_mask, other=0.0)
        if WIDEN:
            # The interpreter multiplies the bit patterns of bf16.
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        logits = tl.dot(a, b, logits, input_precision=PRECISION)
    inside = columns < vocab_size
    if HAS_BIAS:
        logits += tl.load(bias + columns, mask=inside, other=0.0)[None, :]
    if HAS_SOFTCAP:
        # An excluded token (-inf) stays excluded instead of becoming the least likely one.
        logits = tl.where(logits == float("-inf"), logits, softcap * tanh(logits / softcap))
    return tl.where(inside[None, :], logits * inverse_temperature, float("-inf"))
