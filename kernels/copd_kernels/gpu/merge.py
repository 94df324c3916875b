# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton has no types for what a kernel takes.
"""Statistics of the whole vocabulary from those of its tiles: the rule of copd_kernels/statistics.py, in few passes."""

from __future__ import annotations

import triton
import triton.language as tl

from copd_kernels.gpu.logits import expm1_minus
from copd_kernels.gpu.statistics import or_zero

# As in copd_kernels/statistics.py: where the two forms of the excess of a tile take over from each other.
_NEAR_SHIFT = tl.constexpr(5.0)
_LARGEST_EXCESS = tl.constexpr(1e4)
_LARGEST_EXPONENT = tl.constexpr(80.0)


@triton.jit
def _load_row(partial, tiles, row, num_rows: tl.constexpr, num_tiles, num_tokens, rows, empty):
    """One row of a block of tiles, ``[tiles, tokens]``; ``empty`` beyond either end."""
    at = (tiles.to(tl.int64)[:, None] * num_rows + row) * num_tokens + rows[None, :]
    inside = (tiles < num_tiles)[:, None] & (rows < num_tokens)[None, :]
    return tl.load(partial + at, mask=inside, other=empty)


@triton.jit
def _merge_head(
    partial,
    stats,
    num_tiles,
    num_tokens,
    rows,
    HEAD: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Four rows of the union of all tiles; returns its max and 1 + tail, both ``[T]``."""
    top = tl.full((BLOCK_N, BLOCK_T), float("-inf"), tl.float32)
    at_target = tl.full((BLOCK_N, BLOCK_T), float("-inf"), tl.float32)
    for begin in range(0, num_tiles, BLOCK_N):
        tiles = begin + tl.arange(0, BLOCK_N)
        top = tl.maximum(top, _load_row(partial, tiles, HEAD, NUM_ROWS, num_tiles, num_tokens, rows, float("-inf")))
        entry = _load_row(partial, tiles, HEAD + 3, NUM_ROWS, num_tiles, num_tokens, rows, float("-inf"))
        at_target = tl.maximum(at_target, entry)
    top = tl.max(top, axis=0)
    rest = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    weighted = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    num_top = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    for begin in range(0, num_tiles, BLOCK_N):
        tiles = begin + tl.arange(0, BLOCK_N)
        largest = _load_row(partial, tiles, HEAD, NUM_ROWS, num_tiles, num_tokens, rows, float("-inf"))
        tail = _load_row(partial, tiles, HEAD + 1, NUM_ROWS, num_tiles, num_tokens, rows, -1.0)
        mean = _load_row(partial, tiles, HEAD + 2, NUM_ROWS, num_tiles, num_tokens, rows, 0.0)
        mass, offset = _mass(largest, tail, top)
        is_top = (largest == top[None, :]) & (largest != float("-inf"))
        rest += tl.where(is_top, tail, mass)
        num_top += is_top.to(tl.float32)
        weighted += tl.where(mass == 0.0, 0.0, mass * (mean + offset))
    rest = tl.sum(rest, axis=0)
    num_top = tl.sum(num_top, axis=0)
    total = rest + num_top
    mean = tl.where(total == 0.0, 0.0, tl.sum(weighted, axis=0) / total)
    inside = rows < num_tokens
    tl.store(stats + (HEAD + 0) * num_tokens + rows, tl.where(total == total, top, total), mask=inside)
    tl.store(stats + (HEAD + 1) * num_tokens + rows, rest + (num_top - 1.0), mask=inside)
    tl.store(stats + (HEAD + 2) * num_tokens + rows, mean, mask=inside)
    tl.store(stats + (HEAD + 3) * num_tokens + rows, tl.max(at_target, axis=0), mask=inside)
    return top, total


@triton.jit
def _mass(largest, tail, top):
    """Mass of each tile relative to the largest entry of all, and the distance of the tile's own largest from that."""
    is_empty = largest == float("-inf")
    offset = tl.where(is_empty, 0.0, largest - top[None, :])
    return tl.where(is_empty, 0.0, tl.exp(offset) * (1.0 + tail)), offset


@triton.jit
def _merge_gap(
    partial,
    stats,
    num_tiles,
    num_tokens,
    rows,
    top,
    total,
    HEAD: tl.constexpr,
    GAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Gap and excess of the union: Chan's rule with u + expm1(-u) in place of the square."""
    # Differences from the gap of a tile that holds a largest entry: the gaps are close to each other, not to 0.
    base = tl.full((BLOCK_N, BLOCK_T), float("-inf"), tl.float32)
    for begin in range(0, num_tiles, BLOCK_N):
        tiles = begin + tl.arange(0, BLOCK_N)
        largest = _load_row(partial, tiles, HEAD, 12, num_tiles, num_tokens, rows, float("-inf"))
        gap = _load_row(partial, tiles, GAP, 12, num_tiles, num_tokens, rows, 0.0)
        base = tl.maximum(base, tl.where(largest == top[None, :], gap, float("-inf")))
    base = or_zero(tl.max(base, axis=0))
    moved = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    for begin in range(0, num_tiles, BLOCK_N):
        tiles = begin + tl.arange(0, BLOCK_N)
        largest = _load_row(partial, tiles, HEAD, 12, num_tiles, num_tokens, rows, float("-inf"))
        tail = _load_row(partial, tiles, HEAD + 1, 12, num_tiles, num_tokens, rows, -1.0)
        gap = _load_row(partial, tiles, GAP, 12, num_tiles, num_tokens, rows, 0.0)
        mass, _ = _mass(largest, tail, top)
        moved += tl.where(mass == 0.0, 0.0, mass * (gap - base[None, :]))
    moved = tl.sum(moved, axis=0)
    merged = tl.where(total == 0.0, 0.0, base + moved / total)
    log_total = tl.log(total)
    excesses = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    for begin in range(0, num_tiles, BLOCK_N):
        tiles = begin + tl.arange(0, BLOCK_N)
        largest = _load_row(partial, tiles, HEAD, 12, num_tiles, num_tokens, rows, float("-inf"))
        tail = _load_row(partial, tiles, HEAD + 1, 12, num_tiles, num_tokens, rows, -1.0)
        gap = _load_row(partial, tiles, GAP, 12, num_tiles, num_tokens, rows, 0.0)
        excess = _load_row(partial, tiles, GAP + 1, 12, num_tiles, num_tokens, rows, 0.0)
        mass, _ = _mass(largest, tail, top)
        share = mass / total[None, :]
        shift = tl.where(share == 0.0, 0.0, merged[None, :] - gap)
        near = share * (tl.exp(tl.minimum(shift, _NEAR_SHIFT)) * excess + expm1_minus(tl.minimum(shift, _NEAR_SHIFT)))
        # The same in other words, where exp(shift) or the excess is large and the share may have underflown: the tile's
        # mass under the other head, weighed as under this one, less share (1 + shift).
        other = _load_row(partial, tiles, 4 - HEAD, 12, num_tiles, num_tokens, rows, float("-inf"))
        other_tail = _load_row(partial, tiles, 5 - HEAD, 12, num_tiles, num_tokens, rows, -1.0)
        log_mass = (other - top[None, :]) + (tl.log(1.0 + other_tail) - log_total[None, :])
        other_mass = tl.where(
            other == float("-inf"), 0.0, tl.exp(tl.minimum(merged[None, :] + log_mass, _LARGEST_EXPONENT))
        )
        far = tl.maximum(other_mass - share * (1.0 + shift), 0.0)
        is_near = (share != 0.0) & (shift < _NEAR_SHIFT) & (excess < _LARGEST_EXCESS)
        excesses += tl.where(is_near, near, far)
    excess = tl.where((total == 0.0) | (merged == float("inf")), 0.0, tl.sum(excesses, axis=0))
    # Comparisons with NaN are False and maxima leave it out.
    excess = tl.where(merged == merged, excess, merged)
    inside = rows < num_tokens
    tl.store(stats + GAP * num_tokens + rows, merged, mask=inside)
    tl.store(stats + (GAP + 1) * num_tokens + rows, excess, mask=inside)


@triton.jit
def merge_tiles(
    partial,
    stats,
    num_tiles,
    num_tokens,
    NUM_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Statistics fp32 ``[4, T]`` or ``[12, T]`` of the union of ``[tiles, 4, T]`` or ``[tiles, 12, T]``.

    One program per block of tokens, several passes: the partial statistics are a thousandth of the logits.
    """
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    top, total = _merge_head(partial, stats, num_tiles, num_tokens, rows, 0, NUM_ROWS, BLOCK_N, BLOCK_T)
    if NUM_ROWS == 12:
        _merge_gap(partial, stats, num_tiles, num_tokens, rows, top, total, 0, 8, BLOCK_N, BLOCK_T)
        top, total = _merge_head(partial, stats, num_tiles, num_tokens, rows, 4, NUM_ROWS, BLOCK_N, BLOCK_T)
        _merge_gap(partial, stats, num_tiles, num_tokens, rows, top, total, 4, 10, BLOCK_N, BLOCK_T)
