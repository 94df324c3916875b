"""Tile sizes, warps and pipeline stages: one table, read by the launches and by the ahead-of-time report.

No autotuning: a choice is made once, is the same in every run, and is checked without a GPU (registers, spills, shared
memory: report.py). What limits a choice is registers: the epilogues keep one or two fp32 tiles of logits in them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from copd_kernels.gpu import gradient, merge, rows, statistics
from copd_kernels.gpu.specs import compile_spec
from copd_kernels.gpu.targets import TYPE_NAMES, CompileSpec, SpecBuilder, Target


class Tiles(NamedTuple):
    """Tokens and vocabulary entries of a program's tile, its step over D, and how it runs."""

    block_t: int
    block_v: int
    block_d: int
    num_warps: int
    num_stages: int


class RowBlocks(NamedTuple):
    """Tokens that a program of the row kernels takes (by one tile of the vocabulary), and how it runs."""

    block_t: int
    num_warps: int


class MergeBlocks(NamedTuple):
    """Tiles and tokens that a program of ``merge_tiles`` takes at a time, and how it runs."""

    block_n: int
    block_t: int
    num_warps: int


SINGLE, DUAL, SINGLE_GRADIENT, DUAL_GRADIENT = "single", "dual", "single_gradient", "dual_gradient"
# By number of heads: what makes (and stores) the statistics, and what makes the gradient.
FAMILIES = {1: (SINGLE, SINGLE_GRADIENT), 2: (DUAL, DUAL_GRADIENT)}

# By target: single statistics, dual statistics, single gradient, dual gradient; 16-bit inputs.
_TILES = {
    "sm_80": {
        SINGLE: Tiles(128, 128, 64, 8, 3),
        DUAL: Tiles(128, 64, 64, 8, 3),
        SINGLE_GRADIENT: Tiles(128, 128, 64, 8, 3),
        DUAL_GRADIENT: Tiles(128, 64, 64, 8, 3),
    },
    "sm_90": {
        SINGLE: Tiles(128, 128, 64, 8, 3),
        DUAL: Tiles(128, 128, 64, 8, 3),
        SINGLE_GRADIENT: Tiles(128, 128, 64, 8, 3),
        DUAL_GRADIENT: Tiles(128, 128, 64, 8, 3),
    },
    "sm_100": {
        SINGLE: Tiles(128, 128, 64, 8, 3),
        DUAL: Tiles(128, 64, 64, 8, 3),
        SINGLE_GRADIENT: Tiles(128, 128, 64, 8, 3),
        DUAL_GRADIENT: Tiles(128, 64, 64, 8, 3),
    },
    "gfx942": {
        SINGLE: Tiles(128, 64, 64, 8, 2),
        DUAL: Tiles(128, 64, 64, 8, 2),
        SINGLE_GRADIENT: Tiles(128, 64, 64, 8, 2),
        DUAL_GRADIENT: Tiles(128, 64, 64, 8, 2),
    },
}
# fp32 inputs are multiplied in full precision, without tensor cores: the accumulators share the registers with the
# operands.
_WIDE_TILES = {
    SINGLE: Tiles(64, 64, 32, 8, 2),
    DUAL: Tiles(64, 32, 32, 8, 2),
    SINGLE_GRADIENT: Tiles(64, 64, 32, 8, 2),
    DUAL_GRADIENT: Tiles(64, 64, 32, 8, 2),
}
# The interpreter runs whole tiles in NumPy: small ones for small tests, which replace them by larger ones.
_INTERPRETER_TILES = Tiles(16, 32, 16, 1, 1)
_INTERPRETER_ROW_BLOCKS = RowBlocks(16, 1)
_INTERPRETER_MERGE_BLOCKS = MergeBlocks(4, 16, 1)


def tiles_of(target: Target, family: str, itemsize: int) -> Tiles:
    """``itemsize`` of the widest input."""
    if target.backend == "interpreter":
        return _INTERPRETER_TILES
    if itemsize > 2:
        return _WIDE_TILES[family]
    return _TILES[target.name][family]


def row_blocks_of(target: Target) -> RowBlocks:
    return _INTERPRETER_ROW_BLOCKS if target.backend == "interpreter" else RowBlocks(16, 4)


def merge_blocks_of(target: Target) -> MergeBlocks:
    return _INTERPRETER_MERGE_BLOCKS if target.backend == "interpreter" else MergeBlocks(32, 32, 4)


def tile_constants(
    target: Target, tiles: Tiles, hidden_sizes: tuple[int, ...], *, use_tma: bool, has_softcap: bool
) -> dict[str, object]:
    """What all kernels that make tiles of logits are compiled with. ``hidden_sizes`` of the heads involved."""
    return {
        "BLOCK_T": tiles.block_t,
        "BLOCK_V": tiles.block_v,
        "BLOCK_D": tiles.block_d,
        "HAS_SOFTCAP": has_softcap,
        "USE_TMA": use_tma,
        "EVEN_D": all(size % tiles.block_d == 0 for size in hidden_sizes),
        "WIDEN": target.backend == "interpreter",
        # Read for fp32 inputs alone: without it they would be rounded to TF32.
        "PRECISION": "ieee",
    }


_HEADS = ("student", "teacher")
_SIZES = dict.fromkeys(
    (
        "stride",
        "num_tokens",
        "vocab_size",
        "hidden_size",
        "student_hidden_size",
        "teacher_hidden_size",
        "num_tiles",
        "tiles_per_part",
    ),
    "i32",
)
_SCALARS = dict.fromkeys(("inverse_temperature", "softcap", "beta"), "fp32")
_POINTERS = dict.fromkeys(("partial", "stats", "params", "second"), "*fp32")


def _types(target: Target, tiles: Tiles | None, dtype: torch.dtype, *, centred: bool = False) -> dict[str, str]:
    """Types of every runtime parameter that a kernel here may have, by name; ``centred``: of the stored logits."""
    element, stored = TYPE_NAMES[dtype], "*fp16" if centred else "*fp32"
    types = {
        **_SIZES,
        **_SCALARS,
        **_POINTERS,
        "target": "*i32",
        "stored": stored,
        "stored_x": stored,
        "stored_r": stored,
        "stored_s": "*fp32",
        "stored_t": "*fp32",
        "grad": f"*{element}",
    }
    for prefix in ("", *(f"{head}_" for head in _HEADS)):
        hidden = weight = f"*{element}"
        if target.has_tma and tiles is not None:
            hidden = f"tensordesc<{element}[{tiles.block_t},{tiles.block_d}]>"
            weight = f"tensordesc<{element}[{tiles.block_v},{tiles.block_d}]>"
        types |= {f"{prefix}hidden": hidden, f"{prefix}weight": weight, f"{prefix}bias": "*fp32"}
    return types


def _divisible(hidden_size: int, vocab_size: int) -> list[str]:
    """Sizes that a launch finds to be multiples of 16; the stored tiles' stride always is, a chunk mostly."""
    names = ["stride", "num_tokens"]
    if hidden_size % 16 == 0:
        names += ["hidden_size", "student_hidden_size", "teacher_hidden_size"]
    return names + (["vocab_size"] if vocab_size % 16 == 0 else [])


def _tile_builder(fn: object, family: str, **extra: object) -> SpecBuilder:
    """Builder of a kernel that makes logits. Without bias and softcap, as the models we train are."""

    def build(target: Target, hidden_size: int, vocab_size: int, dtype: torch.dtype) -> CompileSpec:
        tiles = tiles_of(target, family, dtype.itemsize)
        constants = tile_constants(target, tiles, (hidden_size,), use_tma=target.has_tma, has_softcap=False)
        if family in (SINGLE, SINGLE_GRADIENT):
            constants["HAS_BIAS"] = False
        else:
            constants |= {"HAS_STUDENT_BIAS": False, "HAS_TEACHER_BIAS": False}
        return compile_spec(
            fn,
            _types(target, tiles, dtype, centred=bool(extra.get("CENTRED"))),
            constants | extra,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
            divisible=_divisible(hidden_size, vocab_size),
            tensor_cores=dtype != torch.float32,
            tma=target.has_tma,
        )

    return build


def _row_builder(fn: object, family: str, **extra: object) -> SpecBuilder:
    """Builder of a kernel that reads stored logits."""

    def build(target: Target, hidden_size: int, vocab_size: int, dtype: torch.dtype) -> CompileSpec:
        blocks = row_blocks_of(target)
        return compile_spec(
            fn,
            _types(target, None, dtype, centred=bool(extra.get("CENTRED"))),
            {"BLOCK_T": blocks.block_t, "TILE_V": tiles_of(target, family, dtype.itemsize).block_v} | extra,
            num_warps=blocks.num_warps,
            divisible=_divisible(hidden_size, vocab_size),
        )

    return build


def _merge_builder(num_rows: int) -> SpecBuilder:
    def build(target: Target, hidden_size: int, vocab_size: int, dtype: torch.dtype) -> CompileSpec:
        blocks = merge_blocks_of(target)
        return compile_spec(
            merge.merge_tiles,
            _types(target, None, dtype),
            {"NUM_ROWS": num_rows, "BLOCK_N": blocks.block_n, "BLOCK_T": blocks.block_t},
            num_warps=blocks.num_warps,
            divisible=_divisible(hidden_size, vocab_size),
        )

    return build


_NOT_STORED = {"STORE": False, "CENTRED": False}
_CENTRED = {"STORE": True, "CENTRED": True}
_EXACT = {"STORE": True, "CENTRED": False}

KERNELS: dict[str, SpecBuilder] = {
    "single_statistics": _tile_builder(statistics.single_statistics_tile, SINGLE, **_NOT_STORED),
    "single_statistics_stored": _tile_builder(statistics.single_statistics_tile, SINGLE, **_CENTRED),
    "dual_statistics": _tile_builder(statistics.dual_statistics_tile, DUAL, **_NOT_STORED),
    "dual_statistics_stored": _tile_builder(statistics.dual_statistics_tile, DUAL, **_CENTRED),
    "dual_statistics_exact": _tile_builder(statistics.dual_statistics_tile, DUAL, **_EXACT),
    "merge_single": _merge_builder(4),
    "merge_dual": _merge_builder(12),
    "single_gradient_rows": _row_builder(rows.single_gradient_rows, SINGLE, HAS_SOFTCAP=False, CENTRED=True),
    "dual_gradient_rows": _row_builder(rows.dual_gradient_rows, DUAL, HAS_SOFTCAP=False, CENTRED=True, WITH_JSD=False),
    "dual_gradient_rows_jsd": _row_builder(
        rows.dual_gradient_rows, DUAL, HAS_SOFTCAP=False, CENTRED=False, WITH_JSD=True
    ),
    "second_rows": _row_builder(rows.second_rows, DUAL),
    "single_gradient": _tile_builder(gradient.single_gradient_tile, SINGLE_GRADIENT),
    "dual_gradient": _tile_builder(gradient.dual_gradient_tile, DUAL_GRADIENT, WITH_JSD=False),
    "dual_gradient_jsd": _tile_builder(gradient.dual_gradient_tile, DUAL_GRADIENT, WITH_JSD=True),
    "second": _tile_builder(gradient.second_tile, DUAL_GRADIENT),
}
