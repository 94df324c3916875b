"""Each kernel as a function of tensors: grids, tile sizes, descriptors or pointers, and the buffers between kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from copd_kernels import statistics
from copd_kernels._types import Head
from copd_kernels.gpu import configs, gradient, merge, rows
from copd_kernels.gpu import statistics as tile_statistics
from copd_kernels.gpu.configs import Tiles
from copd_kernels.gpu.targets import Target, fits_tma

# Stored rows begin at multiples of this: whole cache lines, and what cuBLAS wants of a leading dimension.
_STRIDE = 64
# Programs of second_rows that fill the largest GPU.
_WANTED_PROGRAMS = 2048


class Scale(NamedTuple):
    """From the raw product to logits; softcap 0.0 for none."""

    temperature: float
    softcap: float


class Stored(NamedTuple):
    """Logits of a chunk ``[C, stride]``: z, or x and r (see ``dual_statistics_tile``); r is None for one head."""

    x: torch.Tensor
    r: torch.Tensor | None

    @property
    def is_centred(self) -> bool:
        return self.x.dtype == torch.float16


def padded(vocab_size: int) -> int:
    return triton.cdiv(vocab_size, _STRIDE) * _STRIDE


def itemsize_of(*heads: Head) -> int:
    return max(head.hidden_TD.dtype.itemsize for head in heads)


def gradient_dtype(head: Head) -> torch.dtype:
    """Of the gradient of the logits: bf16 for bf16 inputs, else fp32. Not fp16, in which probabilities times small
    differences underflow."""
    return torch.bfloat16 if head.hidden_TD.dtype == torch.bfloat16 else torch.float32


def stored_dtype(heads: tuple[Head, ...], *, with_second: bool) -> torch.dtype:
    """fp16 (centred) for 16-bit inputs: 6e-4 of the gradient, which is rounded to 2e-3 anyway. The second pass makes
    values of what is stored, and these have to be exact."""
    return torch.float16 if itemsize_of(*heads) == 2 and not with_second else torch.float32


def new_stored(num_tokens: int, heads: tuple[Head, ...], *, with_second: bool) -> Stored:
    """An empty workspace for that many tokens."""
    dtype = stored_dtype(heads, with_second=with_second)
    like, stride = heads[0].hidden_TD, padded(heads[0].weight_VD.shape[0])
    buffers = [torch.empty((num_tokens, stride), dtype=dtype, device=like.device) for _ in heads]
    return Stored(buffers[0], buffers[1] if len(heads) > 1 else None)


class Launcher:
    """Launches for heads of one device, dtype and scale. ``use_tma`` None: where the target and the shapes allow it."""

    def __init__(self, target: Target, scale: Scale, heads: tuple[Head, ...], *, use_tma: bool | None = None) -> None:
        self.target, self.scale, self.heads = target, scale, heads
        matrices = [matrix for head in heads for matrix in (head.hidden_TD, head.weight_VD)]
        self.use_tma = all(fits_tma(x) for x in matrices) and (target.has_tma if use_tma is None else use_tma)
        self.itemsize = itemsize_of(*heads)
        # By kernel: the statistics' tiles are those of the stored logits too.
        families = configs.FAMILIES[len(heads)]
        self.tiles, self.gradient_tiles = (configs.tiles_of(target, family, self.itemsize) for family in families)

    def _operands(self, tiles: Tiles, tokens: slice, columns: slice) -> list[torch.Tensor | TensorDescriptor | None]:
        operands: list[torch.Tensor | TensorDescriptor | None] = []
        for head in self.heads:
            hidden_CD, weight_VD = head.hidden_TD[tokens], head.weight_VD[columns]
            if self.use_tma:
                operands.append(TensorDescriptor.from_tensor(hidden_CD, [tiles.block_t, tiles.block_d]))
                operands.append(TensorDescriptor.from_tensor(weight_VD, [tiles.block_v, tiles.block_d]))
            else:
                operands += [hidden_CD, weight_VD]
            operands.append(None if head.bias_V is None else head.bias_V[columns])
        return operands

    def _sizes(self) -> list[int]:
        return [head.weight_VD.shape[1] for head in self.heads]

    def _scalars(self) -> list[float]:
        return [1.0 / self.scale.temperature, self.scale.softcap]

    def _options(self, tiles: Tiles) -> dict[str, object]:
        """Constants of a kernel that makes tiles of logits, and how it runs."""
        sizes = tuple(self._sizes())
        has_bias = [head.bias_V is not None for head in self.heads]
        names = ("HAS_BIAS",) if len(self.heads) == 1 else ("HAS_STUDENT_BIAS", "HAS_TEACHER_BIAS")
        constants = configs.tile_constants(
            self.target, tiles, sizes, use_tma=self.use_tma, has_softcap=self.scale.softcap != 0
        )
        return {
            **constants,
            **dict(zip(names, has_bias, strict=True)),
            "num_warps": tiles.num_warps,
            "num_stages": tiles.num_stages,
        }

    def _row_options(self) -> dict[str, object]:
        blocks = configs.row_blocks_of(self.target)
        return {"BLOCK_T": blocks.block_t, "TILE_V": self.tiles.block_v, "num_warps": blocks.num_warps}

    def _row_grid(self, num_tokens: int, vocab_size: int) -> tuple[int]:
        return (grid_size(num_tokens, vocab_size, configs.row_blocks_of(self.target).block_t, self.tiles.block_v),)

    def statistics(self, tokens: slice, target_C: torch.Tensor, stored: Stored | None) -> torch.Tensor:
        """Partial statistics fp32 ``[tiles, 4 or 12, C]`` of a chunk of tokens; fills ``stored``."""
        num_tokens, vocab_size, tiles = target_C.shape[0], self.heads[0].weight_VD.shape[0], self.tiles
        num_rows = statistics.NUM_SINGLE if len(self.heads) == 1 else statistics.NUM_DUAL
        partial = torch.empty(
            (triton.cdiv(vocab_size, tiles.block_v), num_rows, num_tokens), device=target_C.device, dtype=torch.float32
        )
        kernel = (
            tile_statistics.single_statistics_tile if len(self.heads) == 1 else tile_statistics.dual_statistics_tile
        )
        # Without a workspace nothing is written there: any pointer does.
        buffers = [partial] * len(self.heads) if stored is None else [x for x in stored if x is not None]
        kernel[(grid_size(num_tokens, vocab_size, tiles.block_t, tiles.block_v),)](
            *self._operands(tiles, tokens, slice(None)),
            target_C,
            partial,
            *buffers,
            padded(vocab_size),
            num_tokens,
            vocab_size,
            *self._sizes(),
            *self._scalars(),
            STORE=stored is not None,
            CENTRED=stored is not None and stored.is_centred,
            **self._options(tiles),
        )
        return partial

    def merge(self, partial: torch.Tensor) -> torch.Tensor:
        """Statistics ``[4 or 12, C]`` of the union of the tiles."""
        num_tiles, num_rows, num_tokens = partial.shape
        stats = torch.empty((num_rows, num_tokens), dtype=torch.float32, device=partial.device)
        blocks = configs.merge_blocks_of(self.target)
        merge.merge_tiles[(triton.cdiv(num_tokens, blocks.block_t),)](
            partial,
            stats,
            num_tiles,
            num_tokens,
            NUM_ROWS=num_rows,
            BLOCK_N=blocks.block_n,
            BLOCK_T=blocks.block_t,
            num_warps=blocks.num_warps,
        )
        return stats

    def gradient_of_stored(
        self, stored: Stored, partial: torch.Tensor, params: torch.Tensor, target_C: torch.Tensor, beta: float | None
    ) -> torch.Tensor:
        """Gradient ``[C, V]`` of the raw product in ``gradient_dtype``.

        It takes the memory of the stored logits where an entry has the same size. ``beta`` None: no JSD.
        """
        num_tokens, vocab_size = target_C.shape[0], self.heads[0].weight_VD.shape[0]
        x, dtype = stored.x, gradient_dtype(self.heads[0])
        grad = x.view(dtype) if x.element_size() == dtype.itemsize else torch.empty_like(x, dtype=dtype)
        is_dual = stored.r is not None
        kernel = rows.dual_gradient_rows if is_dual else rows.single_gradient_rows
        kernel[self._row_grid(num_tokens, vocab_size)](
            x,
            *([stored.r] if is_dual else []),
            partial,
            grad,
            params,
            target_C,
            x.stride(0),
            num_tokens,
            vocab_size,
            *self._scalars(),
            *([beta or 0.0] if is_dual else []),
            HAS_SOFTCAP=self.scale.softcap != 0,
            CENTRED=stored.is_centred,
            **({"WITH_JSD": beta is not None} if is_dual else {}),
            **self._row_options(),
        )
        return grad[:num_tokens, :vocab_size]

    def gradient(
        self, tokens: slice, columns: slice, params: torch.Tensor, target_C: torch.Tensor, beta: float | None
    ) -> torch.Tensor:
        """The same for a slice of the vocabulary, ``[C, slice]``, with the logits made again."""
        num_tokens, tiles = target_C.shape[0], self.gradient_tiles
        width = columns.stop - columns.start
        grad = torch.empty((num_tokens, padded(width)), dtype=gradient_dtype(self.heads[0]), device=target_C.device)
        is_dual = len(self.heads) == 2
        kernel = gradient.dual_gradient_tile if is_dual else gradient.single_gradient_tile
        kernel[(grid_size(num_tokens, width, tiles.block_t, tiles.block_v),)](
            *self._operands(tiles, tokens, columns),
            grad,
            params,
            # A target before the slice is a negative number, and no column.
            target_C - columns.start if columns.start else target_C,
            grad.stride(0),
            num_tokens,
            width,
            *self._sizes(),
            *self._scalars(),
            *([beta or 0.0] if is_dual else []),
            **({"WITH_JSD": beta is not None} if is_dual else {}),
            **self._options(tiles),
        )
        return grad[:, :width]

    def second_of_stored(self, stored: Stored, params: torch.Tensor, num_tokens: int, beta: float) -> torch.Tensor:
        """sum min(p, q), JSD_beta, E_p[log(p / m)] fp32 ``[3, C]``, of logits stored in fp32."""
        assert not stored.is_centred
        vocab_size = self.heads[0].weight_VD.shape[0]
        num_tiles = triton.cdiv(vocab_size, self.tiles.block_v)
        blocks = triton.cdiv(num_tokens, configs.row_blocks_of(self.target).block_t)
        tiles_per_part = triton.cdiv(num_tiles, max(1, min(num_tiles, _WANTED_PROGRAMS // blocks)))
        num_parts = triton.cdiv(num_tiles, tiles_per_part)
        second = torch.empty((num_parts, 3, num_tokens), dtype=torch.float32, device=params.device)
        rows.second_rows[(blocks * num_parts,)](
            stored.x,
            stored.r,
            second,
            params,
            stored.x.stride(0),
            num_tokens,
            vocab_size,
            tiles_per_part,
            beta,
            **self._row_options(),
        )
        return second.sum(0)

    def second(self, tokens: slice, params: torch.Tensor, num_tokens: int, beta: float) -> torch.Tensor:
        """The same with the logits made again."""
        vocab_size, tiles = self.heads[0].weight_VD.shape[0], self.gradient_tiles
        num_tiles = triton.cdiv(vocab_size, tiles.block_v)
        second = torch.empty((num_tiles, 3, num_tokens), dtype=torch.float32, device=params.device)
        gradient.second_tile[(grid_size(num_tokens, vocab_size, tiles.block_t, tiles.block_v),)](
            *self._operands(tiles, tokens, slice(None)),
            second,
            params,
            num_tokens,
            vocab_size,
            *self._sizes(),
            *self._scalars(),
            beta,
            **self._options(tiles),
        )
        return second.sum(0)


def grid_size(num_tokens: int, vocab_size: int, block_t: int, block_v: int) -> int:
    """Programs of a launch over tokens and vocabulary, all on axis 0: the other two end at 65,535."""
    return triton.cdiv(num_tokens, block_t) * triton.cdiv(vocab_size, block_v)


def single_params(stats_4C: torch.Tensor, coefs_3C: torch.Tensor) -> torch.Tensor:
    """What terms.py wants of one head, fp32 ``[5, C]``."""
    top, log_mass, entropy = _head_params(stats_4C)
    a, e, o = coefs_3C
    return torch.stack([top, log_mass, a + e * entropy, e, o])


def dual_params(
    stats_12C: torch.Tensor, second_3C: torch.Tensor | None = None, coefs_6C: torch.Tensor | None = None
) -> torch.Tensor:
    """What terms.py wants of two heads, fp32 ``[12, C]``; for the second pass there are no coefficients yet."""
    top, log_mass, entropy = _head_params(stats_12C)
    teacher_top, teacher_log_mass, _ = _head_params(stats_12C[4:8])
    none = torch.zeros_like(top)
    a, e, o, reverse, forward, jsd = [none] * 6 if coefs_6C is None else coefs_6C
    folded = a + e * entropy - (none if second_3C is None else jsd * second_3C[2])
    difference = statistics.lse_difference(stats_12C)
    teacher = [stats_12C[8], difference, teacher_top, teacher_log_mass]
    return torch.stack([top, log_mass, *teacher, folded, e, o, reverse, forward, jsd])


def _head_params(stats_4C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """max, log(1 + tail), entropy; 0 where no token is possible, so that log p is -inf there and not NaN."""
    is_empty = stats_4C[0] == -torch.inf
    log_mass = stats_4C[1].log1p()
    entropy = log_mass - stats_4C[2]
    top, log_mass, entropy = (x.masked_fill(is_empty, 0) for x in (stats_4C[0], log_mass, entropy))
    return top, log_mass, entropy
