# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton has no types for what a kernel takes.
"""Gradients of the raw product and the second pass with the logits made again: a second product and no memory.

Gradients are written in the dtype of the inputs, for the matrix products that follow. ``params`` and the formulas:
terms.py. A tile is worked on in slices, for the reason that ``slices`` gives. ``weight``, ``bias``, ``target`` and
``grad`` may be those of a part of the vocabulary, ``target`` then relative to its begin.
"""

from __future__ import annotations

import triton
import triton.language as tl

from copd_kernels.gpu import terms
from copd_kernels.gpu.logits import logits_tile, tile_begins
from copd_kernels.gpu.statistics import slices


@triton.jit
def single_gradient_tile(
    hidden,
    weight,
    bias,
    grad,
    params,
    target,
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
):
    """Gradient ``[T, stride]`` of one head."""
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
    wanted = tl.load(target + rows, mask=rows < num_tokens, other=-1)
    parts = slices(z)
    WIDTH: tl.constexpr = BLOCK_V // 4
    for i in tl.static_range(4):
        columns = column_begin + i * WIDTH + tl.arange(0, WIDTH)
        if column_begin + i * WIDTH < vocab_size:
            logp = parts[i] - terms.param(params, 0, rows, num_tokens) - terms.param(params, 1, rows, num_tokens)
            result = terms.single_gradient(
                logp, parts[i], params, rows, columns, wanted, num_tokens, inverse_temperature, softcap, HAS_SOFTCAP
            )
            at = rows.to(tl.int64)[:, None] * stride + columns[None, :]
            inside = (rows < num_tokens)[:, None] & (columns < vocab_size)[None, :]
            tl.store(grad + at, result.to(grad.dtype.element_ty), mask=inside)


@triton.jit
def dual_gradient_tile(
    student_hidden,
    student_weight,
    student_bias,
    teacher_hidden,
    teacher_weight,
    teacher_bias,
    grad,
    params,
    target,
    stride,
    num_tokens,
    vocab_size,
    student_hidden_size,
    teacher_hidden_size,
    inverse_temperature,
    softcap,
    beta,
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
    WITH_JSD: tl.constexpr,
):
    """The student's gradient ``[T, stride]``."""
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
    rows = row_begin + tl.arange(0, BLOCK_T)
    wanted = tl.load(target + rows, mask=rows < num_tokens, other=-1)
    s_parts = slices(s)
    t_parts = slices(t)
    WIDTH: tl.constexpr = BLOCK_V // 4
    for i in tl.static_range(4):
        columns = column_begin + i * WIDTH + tl.arange(0, WIDTH)
        if column_begin + i * WIDTH < vocab_size:
            logp, logq, gap, delta = terms.from_logits(s_parts[i], t_parts[i], params, rows, num_tokens)
            result = terms.dual_gradient(
                logp,
                logq,
                gap,
                delta,
                s_parts[i],
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
            at = rows.to(tl.int64)[:, None] * stride + columns[None, :]
            inside = (rows < num_tokens)[:, None] & (columns < vocab_size)[None, :]
            tl.store(grad + at, result.to(grad.dtype.element_ty), mask=inside)


@triton.jit
def second_tile(
    student_hidden,
    student_weight,
    student_bias,
    teacher_hidden,
    teacher_weight,
    teacher_bias,
    second,
    params,
    num_tokens,
    vocab_size,
    student_hidden_size,
    teacher_hidden_size,
    inverse_temperature,
    softcap,
    beta,
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
):
    """sum min(p, q), JSD_beta, E_p[log(p / m)] of each tile, fp32 ``[tiles, 3, T]``: their sum is that of the whole."""
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
    rows = row_begin + tl.arange(0, BLOCK_T)
    s_parts = slices(s)
    t_parts = slices(t)
    WIDTH: tl.constexpr = BLOCK_V // 4
    sum_min = tl.zeros((BLOCK_T,), tl.float32)
    jsd = tl.zeros((BLOCK_T,), tl.float32)
    mean_ratio = tl.zeros((BLOCK_T,), tl.float32)
    for i in tl.static_range(4):
        if column_begin + i * WIDTH < vocab_size:
            logp, logq, _, delta = terms.from_logits(s_parts[i], t_parts[i], params, rows, num_tokens)
            a, b, c = terms.second_sums(logp, logq, delta, beta)
            sum_min += a
            jsd += b
            mean_ratio += c
    terms.store_second(second, column_begin // BLOCK_V, rows, num_tokens, sum_min, jsd, mean_ratio)
