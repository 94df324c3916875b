# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton has no types for what a kernel takes.
"""Streaming top-k overlap of two heads: no logits leave the chip, only each token's k candidates.

``topk_candidates`` walks one split of the vocabulary for one block of tokens. It keeps the split's largest entries in
registers and lets a tile's maximum in only while it beats the weakest of them; after the first tiles hardly any does,
so the selection costs one row maximum per tile. ``topk_overlap_rows`` then picks the top k of all splits and counts the
indices that both heads hold.

The temperature and the softcap are left out: both are increasing functions of a logit, so they keep the order (where
the softcap saturates, this order is that of the values before it). A bias changes the order and is added.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from copd_kernels._types import Head
from copd_kernels.gpu.configs import Tiles
from copd_kernels.gpu.logits import logits_tile
from copd_kernels.gpu.specs import compile_spec
from copd_kernels.gpu.targets import (
    TYPE_NAMES,
    CompileSpec,
    SpecBuilder,
    Target,
    check_dtypes,
    fits_tma,
    target_of,
)

# Order keys: int32 in the order of the fp32 values. NaN above everything, so that a row with one keeps it and is
# found by it; "no entry" below -inf, which is an entry like any other.
_NAN = tl.constexpr(0x7FFFFFFF)
_NOTHING = tl.constexpr(-0x80000000)


@triton.jit
def order_key(values):
    """int32 keys in the order of fp32 ``values``: equal values (0 and -0 too) have equal keys, NaN the largest."""
    bits = tl.where(values == 0.0, 0.0, values).to(tl.int32, bitcast=True)
    return tl.where(values != values, _NAN, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def _absorb(key, tile_begin, best_key, best_index):
    """Move the entries of the tile that belong to the running best ``[T, K]`` there; ``key`` ``[T, V]`` of the tile.

    Tiles come in the order of the vocabulary. A tied entry therefore never displaces one that is in already, and of
    tied entries of the best the one with the largest index goes first: ties by lower index.
    """
    columns = tl.arange(0, key.shape[1])[None, :]
    top_key = tl.max(key, axis=1)
    weakest = tl.min(best_key, axis=1)
    while tl.max((top_key > weakest).to(tl.int32), axis=0) > 0:
        top_column = tl.min(tl.where(key == top_key[:, None], columns, key.shape[1]), axis=1)
        leaves = tl.max(tl.where(best_key == weakest[:, None], best_index, -0x80000000), axis=1)
        # In a row where nothing enters, no column and no slot has this number.
        top_column = tl.where(top_key > weakest, top_column, -1)
        leaves = tl.where(top_key > weakest, leaves, -0x80000000)
        key = tl.where(columns == top_column[:, None], _NOTHING, key)
        best_key = tl.where(best_index == leaves[:, None], top_key[:, None], best_key)
        best_index = tl.where(best_index == leaves[:, None], tile_begin + top_column[:, None], best_index)
        top_key = tl.max(key, axis=1)
        weakest = tl.min(best_key, axis=1)
    return best_key, best_index


@triton.jit
def topk_candidates(
    hidden,
    weight,
    bias,
    keys,
    indices,
    num_tokens,
    vocab_size,
    hidden_size,
    num_splits,
    tiles_per_split,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SLOTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    USE_TMA: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """The ``SLOTS`` largest logits of each (block of tokens, split of the vocabulary), in no order.

    ``hidden`` ``[T, D]``, ``weight`` ``[V, D]``: contiguous, or descriptors of tiles with ``USE_TMA``; ``bias`` fp32
    ``[V]``. Out: ``keys`` (order keys) and ``indices``, int32 ``[T, num_splits, SLOTS]``. The grid lies on axis 0
    alone, whose limit is 2^31 - 1 and not 65,535; neighbours share a split, and so its weights in L2.
    """
    num_blocks = tl.cdiv(num_tokens, BLOCK_T)
    row_begin = (tl.program_id(0) % num_blocks) * BLOCK_T
    split = tl.program_id(0) // num_blocks
    rows = row_begin + tl.arange(0, BLOCK_T)
    slots = tl.arange(0, SLOTS)
    best_key = tl.full((BLOCK_T, SLOTS), _NOTHING, tl.int32)
    # Below every real index, and each different: the slots fill one after another.
    best_index = tl.broadcast_to(-1 - slots[None, :], (BLOCK_T, SLOTS))

    for tile in range(split * tiles_per_split, tl.minimum((split + 1) * tiles_per_split, tl.cdiv(vocab_size, BLOCK_V))):
        tile_begin = tile * BLOCK_V
        logits = logits_tile(
            hidden,
            weight,
            bias,
            row_begin,
            tile_begin,
            num_tokens,
            vocab_size,
            hidden_size,
            1.0,
            0.0,
            BLOCK_T,
            BLOCK_V,
            BLOCK_D,
            HAS_BIAS,
            False,
            USE_TMA,
            EVEN_D,
            WIDEN,
            PRECISION,
        )
        inside = tile_begin + tl.arange(0, BLOCK_V) < vocab_size
        key = tl.where(inside[None, :], order_key(logits), _NOTHING)
        best_key, best_index = _absorb(key, tile_begin, best_key, best_index)

    at = (rows.to(tl.int64)[:, None] * num_splits + split) * SLOTS + slots[None, :]
    tl.store(keys + at, best_key, mask=(rows < num_tokens)[:, None])
    tl.store(indices + at, best_index, mask=(rows < num_tokens)[:, None])


@triton.jit
def _best_of_rows(
    keys, indices, rows, num_tokens, num_candidates, TOP_K: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr
):
    """Indices int32 ``[T, SLOTS]`` of the rows' ``TOP_K`` best, -1 where there are fewer; and the largest keys."""
    lanes = tl.arange(0, WIDTH)[None, :]
    slots = tl.arange(0, SLOTS)[None, :]
    at = rows.to(tl.int64)[:, None] * num_candidates + lanes
    inside = (rows < num_tokens)[:, None] & (lanes < num_candidates)
    key = tl.load(keys + at, mask=inside, other=-0x80000000)
    index = tl.load(indices + at, mask=inside, other=-1)
    chosen = tl.full((rows.shape[0], SLOTS), -1, tl.int32)
    largest = tl.max(key, axis=1)
    for rank in range(TOP_K):
        top = tl.max(key, axis=1)[:, None]
        first = tl.min(tl.where(key == top, index, 0x7FFFFFFF), axis=1)[:, None]
        # An empty slot has a negative index, and no two entries share one that is not.
        chosen = tl.where((slots == rank) & (top > _NOTHING), first, chosen)
        key = tl.where((key == top) & (index == first), _NOTHING, key)
    return chosen, largest


@triton.jit
def topk_overlap_rows(
    student_keys,
    student_indices,
    teacher_keys,
    teacher_indices,
    overlap,
    num_tokens,
    num_candidates,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """|TopK(s) ∩ TopK(t)| / k of a block of tokens, fp32 ``[T]``; NaN where either head has a NaN logit.

    Keys and indices int32 ``[T, num_candidates]`` from ``topk_candidates``; ``WIDTH`` a power of two >= that.
    """
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    student, student_largest = _best_of_rows(
        student_keys, student_indices, rows, num_tokens, num_candidates, TOP_K, SLOTS, WIDTH
    )
    teacher, teacher_largest = _best_of_rows(
        teacher_keys, teacher_indices, rows, num_tokens, num_candidates, TOP_K, SLOTS, WIDTH
    )
    common = (student[:, :, None] == teacher[:, None, :]) & (student >= 0)[:, :, None]
    share = tl.sum(tl.sum(common.to(tl.float32), axis=2), axis=1) / TOP_K
    is_nan = (student_largest == _NAN) | (teacher_largest == _NAN)
    tl.store(overlap + rows, tl.where(is_nan, float("nan"), share), mask=rows < num_tokens)


# A register slot per candidate: a tile, its keys and the best so far have to fit.
MAX_TOP_K = 32
# Fills the largest GPU several times over; few tokens are made up for by splits of the vocabulary.
_WANTED_PROGRAMS = 1024
# Candidates of a row that one warp of topk_overlap_rows holds in registers.
_MAX_CANDIDATES = 1024
# The interpreter runs whole tiles in NumPy: small ones for small tests, which replace them by larger ones.
_INTERPRETER_TILES = Tiles(16, 64, 32, 4, 1)


def topk_tiles(target: Target, slots: int, dtype: torch.dtype) -> Tiles:
    """One fixed choice per target: 128×128 where keys, slots and products fit the registers."""
    # A step over D is 128 bytes in every dtype: one row of a swizzled tile.
    block_d = 128 // dtype.itemsize
    if target.backend == "interpreter":
        return _INTERPRETER_TILES
    if target.backend == "hip":
        return Tiles(64, 128, block_d, 8, 2)
    if target.arch == 80 and dtype.itemsize == 4:
        return Tiles(64, 64, block_d, 8, 3)
    return Tiles(128, 128 if target.arch == 90 and slots <= 16 else 64, block_d, 8, 3)


def _row_block(target: Target) -> int:
    """Tokens of a program of ``topk_overlap_rows``: a warp's registers hold the candidates of one."""
    return _INTERPRETER_TILES.block_t if target.backend == "interpreter" else 1


def topk_slots(top_k: int) -> int:
    return max(2, triton.next_power_of_2(top_k))


def _constants(
    tiles: Tiles, hidden_size: int, slots: int, has_bias: bool, use_tma: bool, target: Target
) -> dict[str, object]:
    return {
        "BLOCK_T": tiles.block_t,
        "BLOCK_V": tiles.block_v,
        "BLOCK_D": tiles.block_d,
        "SLOTS": slots,
        "HAS_BIAS": has_bias,
        "USE_TMA": use_tma,
        "EVEN_D": hidden_size % tiles.block_d == 0,
        # Of fp32 heads: three TF32 products are as good as fp32's own, and spill nothing where FMAs spill kilobytes.
        "PRECISION": "tf32x3" if target.backend == "cuda" else "ieee",
        "WIDEN": target.backend == "interpreter",
    }


def topk_overlap(student: Head, teacher: Head, *, top_k: int) -> torch.Tensor:
    """Share of the top ``top_k`` that both heads have in common, fp32 ``[T]``; ties by lower index. (OVERLAP)

    Heads of a common T and V; D and dtype (fp32, bf16, fp16) may differ. -inf logits take part like any other value, a
    NaN logit makes the token's overlap NaN. Buffers: 2 heads × 8 bytes × T × splits × ``topk_slots(top_k)``, at most
    16 KiB a token and less than that for many tokens, whatever V is. Raises ValueError for ``top_k`` outside
    1..min(V, 32) and for fp64.
    """
    check_dtypes(student, teacher)
    num_tokens, vocab_size = student.hidden_TD.shape[0], student.weight_VD.shape[0]
    if not 1 <= top_k <= min(vocab_size, MAX_TOP_K):
        raise ValueError(f"top_k must lie in 1..{min(vocab_size, MAX_TOP_K)} on a GPU, was {top_k}")
    overlap_T = torch.empty(num_tokens, dtype=torch.float32, device=student.hidden_TD.device)
    if num_tokens == 0:
        return overlap_T
    slots = topk_slots(top_k)
    candidates = [tensor for head in (student, teacher) for tensor in _candidates(head, slots)]
    num_candidates = candidates[0].shape[1] * slots
    block_t = _row_block(target_of(overlap_T.device))
    topk_overlap_rows[(triton.cdiv(num_tokens, block_t),)](
        *candidates,
        overlap_T,
        num_tokens,
        num_candidates,
        TOP_K=top_k,
        SLOTS=slots,
        WIDTH=triton.next_power_of_2(num_candidates),
        BLOCK_T=block_t,
        num_warps=1,
    )
    return overlap_T


def _candidates(head: Head, slots: int, *, use_tma: bool | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and indices of one head, int32 ``[T, splits, slots]``."""
    hidden_TD, weight_VD = (tensor.contiguous() for tensor in (head.hidden_TD, head.weight_VD))
    bias_V = None if head.bias_V is None else head.bias_V.float().contiguous()
    (num_tokens, hidden_size), vocab_size = hidden_TD.shape, weight_VD.shape[0]
    target = target_of(hidden_TD.device)
    tiles = topk_tiles(target, slots, hidden_TD.dtype)
    if use_tma is None:
        use_tma = target.has_tma and all(fits_tma(tensor) for tensor in (hidden_TD, weight_VD))

    row_blocks, num_tiles = triton.cdiv(num_tokens, tiles.block_t), triton.cdiv(vocab_size, tiles.block_v)
    num_splits = max(1, min(_WANTED_PROGRAMS // row_blocks, num_tiles, _MAX_CANDIDATES // slots))
    tiles_per_split = triton.cdiv(num_tiles, num_splits)
    num_splits = triton.cdiv(num_tiles, tiles_per_split)
    keys = torch.empty((num_tokens, num_splits, slots), dtype=torch.int32, device=hidden_TD.device)
    indices = torch.empty_like(keys)
    topk_candidates[(row_blocks * num_splits,)](
        TensorDescriptor.from_tensor(hidden_TD, [tiles.block_t, tiles.block_d]) if use_tma else hidden_TD,
        TensorDescriptor.from_tensor(weight_VD, [tiles.block_v, tiles.block_d]) if use_tma else weight_VD,
        bias_V,
        keys,
        indices,
        num_tokens,
        vocab_size,
        hidden_size,
        num_splits,
        tiles_per_split,
        **_constants(tiles, hidden_size, slots, bias_V is not None, use_tma, target),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return keys, indices


def _candidates_spec(top_k: int) -> SpecBuilder:
    def build(target: Target, hidden_size: int, vocab_size: int, dtype: torch.dtype) -> CompileSpec:
        slots, element = topk_slots(top_k), TYPE_NAMES[dtype]
        tiles = topk_tiles(target, slots, dtype)
        head = (
            {
                "hidden": f"tensordesc<{element}[{tiles.block_t}, {tiles.block_d}]>",
                "weight": f"tensordesc<{element}[{tiles.block_v}, {tiles.block_d}]>",
            }
            if target.has_tma
            else {"hidden": f"*{element}", "weight": f"*{element}"}
        )
        known = (("vocab_size", vocab_size), ("hidden_size", hidden_size))
        sizes = ("num_tokens", "vocab_size", "hidden_size", "num_splits", "tiles_per_split")
        return compile_spec(
            topk_candidates,
            {**head, "bias": "*fp32", "keys": "*i32", "indices": "*i32", **dict.fromkeys(sizes, "i32")},
            # With a bias: the larger of the two variants.
            _constants(tiles, hidden_size, slots, True, target.has_tma, target),
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
            divisible=[name for name, size in known if size % 16 == 0],
            tensor_cores=True,
            tma=target.has_tma,
        )

    return build


def _overlap_rows_spec(target: Target, hidden_size: int, vocab_size: int, dtype: torch.dtype) -> CompileSpec:
    pointers = ("student_keys", "student_indices", "teacher_keys", "teacher_indices")
    return compile_spec(
        topk_overlap_rows,
        {**dict.fromkeys(pointers, "*i32"), "overlap": "*fp32", "num_tokens": "i32", "num_candidates": "i32"},
        {"TOP_K": MAX_TOP_K, "SLOTS": topk_slots(MAX_TOP_K), "WIDTH": _MAX_CANDIDATES, "BLOCK_T": _row_block(target)},
        num_warps=1,
        divisible=["num_candidates"],
    )


KERNELS: dict[str, SpecBuilder] = {
    "topk_candidates_10": _candidates_spec(10),
    "topk_candidates_32": _candidates_spec(32),
    "topk_overlap_rows": _overlap_rows_spec,
}
