"""Matrix products of the CPU driver: logits of one head, and the gradients that come of the gradient of its logits.

16-bit inputs. Logits are wanted in fp32, and ``torch.mm`` would round them to 16 bits. bf16 is multiplied by brgemm
into fp32 (csrc/bf16_products.cpp) where the CPU has AMX or avx512_bf16; what is left is converted to fp32, exactly,
tile by tile, and multiplied as such. fp32 is multiplied by torch, or by brgemm where that is faster
(csrc/fp32_products.cpp).
"""

from __future__ import annotations

import math
import types
from collections.abc import Iterator
from types import SimpleNamespace

import torch

from copd_kernels import _rows
from copd_kernels._types import Gradients, Head, Wanted

# One tile of fp32 logits or of converted weights.
TILE_BYTES = 6 * 2**20
TILE_TOKENS = 512
# Buffers from here on are pooled.
_POOLED_BYTES = 2**20
# Entries of the vocabulary that one product sums up. Some BLAS add one entry after another, and not to 0 but to what is
# there already: over 250,000 of them two digits are lost.
_LONGEST_SUM = 16384
# Products smaller than this (a·b·c of [a, b] @ [b, c]) are torch's: brgemm compiles a kernel for every new shape.
_SMALLEST_BRGEMM = 2**20
# Packed hidden states are kept up to here; beyond, they are made again for every tile.
_KEPT_BYTES = 32 * 2**20
# Entries of the gradient above this share of the row's scale are corrected for their rounding to bf16, so many at most
# of each row and tile: a flat row has no few that matter.
_CORRECTED_SHARE, _MOST_CORRECTED = 1 / 8, 32

_ATEN_ROWS = SimpleNamespace(**_rows._ATEN)


def row_ops(dtype: torch.dtype) -> SimpleNamespace | types.ModuleType:
    """The compiled bodies take fp32 alone."""
    return torch.ops.copd_kernels if dtype == torch.float32 else _ATEN_ROWS


def slices(size: int, step: int) -> Iterator[slice]:
    for begin in range(0, size, step):
        yield slice(begin, min(begin + step, size))


def empty(like: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """``like.new_empty``; large buffers come from a pool, and go back to it when their last tensor is gone."""
    # In this mode torch fills what is empty with NaN, so that it shows when somebody reads it.
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    poisoned = torch.are_deterministic_algorithms_enabled() and fills
    is_large = math.prod(shape) * dtype.itemsize >= _POOLED_BYTES
    if is_large and not poisoned and like.device.type == "cpu" and hasattr(torch.ops.copd_kernels, "pooled_empty"):
        pooled: torch.Tensor = torch.ops.copd_kernels.pooled_empty(shape, dtype)
        return pooled
    return like.new_empty(shape, dtype=dtype)


def empty_cache() -> int:
    """Give the memory back that the CPU operations keep between calls, at most 384 MiB; returns its bytes.

    Workspaces and weight gradients are taken from there: pages that are fresh from the system are cleared first.
    """
    return int(torch.ops.copd_kernels.empty_cache()) if hasattr(torch.ops.copd_kernels, "empty_cache") else 0


def tile_step(head: Head) -> int:
    """Vocabulary entries of a tile, a multiple of 64: as many weights as fit, or as many logits of a chunk."""
    most = min(TILE_BYTES // 4 // max(1, head.hidden_TD.shape[1]), TILE_BYTES // 4 // TILE_TOKENS)
    return max(64, most // 64 * 64)


def multiplies_bf16(head: Head, dtype: torch.dtype) -> bool:
    """Whether brgemm makes this head's logits; beside an fp64 policy they are fp64."""
    hidden_TD, weight_VD, _ = head
    if dtype != torch.float32 or not hidden_TD.dtype == weight_VD.dtype == torch.bfloat16:
        return False
    # Pairs of hidden dimensions stand side by side in what it takes.
    if hidden_TD.shape[1] == 0 or hidden_TD.shape[1] % 2:
        return False
    if row_ops(dtype) is _ATEN_ROWS or not hasattr(torch.ops.copd_kernels, "bf16_available"):
        return False
    return bool(torch.ops.copd_kernels.bf16_available())


def has_fp32_brgemm() -> bool:
    """Whether brgemm multiplies fp32 faster than torch does on this CPU."""
    if row_ops(torch.float32) is _ATEN_ROWS or not hasattr(torch.ops.copd_kernels, "fp32_available"):
        return False
    return bool(torch.ops.copd_kernels.fp32_available())


def _by_fp32_brgemm(a: torch.Tensor, b: torch.Tensor, size: int) -> bool:
    """Whether brgemm multiplies ``a`` and ``b``; ``size``: a·b·c of the product."""
    return size >= _SMALLEST_BRGEMM and a.dtype == b.dtype == torch.float32 and has_fp32_brgemm()


def logits_(hidden_CD: torch.Tensor, weight_vD: torch.Tensor, out_CV: torch.Tensor) -> None:
    """out = hidden @ weight.T; fp32 or fp64, ``out`` may be wider than the inputs."""
    if weight_vD.dtype != out_CV.dtype:
        out_CV.copy_(hidden_CD @ weight_vD.T)
    elif _by_fp32_brgemm(hidden_CD, weight_vD, hidden_CD.numel() * len(weight_vD)):
        torch.ops.copd_kernels.fp32_logits_(hidden_CD, weight_vD, out_CV)
    else:
        torch.mm(hidden_CD, weight_vD.T, out=out_CV)


def add_hidden_(out_CD: torch.Tensor, grad_CV: torch.Tensor, weight_vD: torch.Tensor, *, is_first: bool) -> None:
    """out = grad @ weight if ``is_first``, else out += that."""
    if _by_fp32_brgemm(grad_CV, weight_vD, grad_CV.numel() * weight_vD.shape[1]):
        torch.ops.copd_kernels.fp32_hidden_grad_(grad_CV, weight_vD, out_CD, not is_first)
        return
    for part in slices(len(weight_vD), _LONGEST_SUM):
        if not is_first or part.start > 0:
            out_CD += grad_CV[:, part] @ weight_vD[part]
        elif out_CD.dtype == weight_vD.dtype:
            torch.mm(grad_CV[:, part], weight_vD[part], out=out_CD)
        else:
            out_CD.copy_(grad_CV[:, part] @ weight_vD[part])


def add_weight_(out_vD: torch.Tensor, grad_CV: torch.Tensor, hidden_CD: torch.Tensor, *, is_first: bool) -> None:
    """out = grad.T @ hidden if ``is_first``, else out += that."""
    if _by_fp32_brgemm(grad_CV, hidden_CD, grad_CV.numel() * hidden_CD.shape[1]):
        torch.ops.copd_kernels.fp32_weight_grad_(grad_CV, hidden_CD, out_vD, not is_first)
    elif is_first:
        torch.mm(grad_CV.T, hidden_CD, out=out_vD)
    else:
        out_vD.addmm_(grad_CV.T, hidden_CD)


class Projection:
    """Logits of one head, whatever the dtype of its inputs; its last converted or packed tile of weights is kept."""

    def __init__(self, head: Head, temperature: float, softcap: float, dtype: torch.dtype) -> None:
        self.head, self._temperature, self._softcap = head, temperature, softcap
        self._rows = row_ops(dtype)
        self._bias_V = None if head.bias_V is None else head.bias_V.to(dtype)
        self.by_bf16 = multiplies_bf16(head, dtype)
        self._is_16_bit = head.hidden_TD.dtype in (torch.bfloat16, torch.float16)
        self._kept: tuple[slice, torch.Tensor] | None = None

    def weight(self, tile: slice) -> torch.Tensor:
        """Rows of the weight: packed for brgemm, or in the dtype of the products."""
        if not self._is_16_bit:
            return self.head.weight_VD[tile]
        if self._kept is None or self._kept[0] != tile:
            self._kept = None
            rows = self.head.weight_VD[tile]
            self._kept = tile, torch.ops.copd_kernels.bf16_pack(rows, True) if self.by_bf16 else rows.float()
        return self._kept[1]

    def hidden(self, rows: slice) -> torch.Tensor:
        hidden_CD = self.head.hidden_TD[rows]
        return hidden_CD.float() if self._is_16_bit and not self.by_bf16 else hidden_CD

    def logits_(self, rows: slice, tile: slice, out_CV: torch.Tensor) -> None:
        """Logits of a chunk of tokens and a tile of the vocabulary, into ``out_CV``."""
        step = tile_step(self.head) if self._is_16_bit else tile.stop - tile.start
        hidden_CD = self.hidden(rows)
        for part in slices(tile.stop - tile.start, max(1, step)):
            weight = self.weight(slice(tile.start + part.start, tile.start + part.stop))
            target = out_CV[:, part]
            if self.by_bf16:
                torch.ops.copd_kernels.bf16_product_(hidden_CD, weight, target, False)
            else:
                logits_(hidden_CD, weight, target)
        bias = None if self._bias_V is None else self._bias_V[tile]
        self._rows.prepare_(out_CV, bias, self._temperature, self._softcap)


class Gradient:
    """Gradients of hidden, weight and bias by fp32 (or fp64) products; sums stay in the statistics dtype until they are
    complete."""

    def __init__(self, projection: Projection, wanted: Wanted, dtype: torch.dtype) -> None:
        self._projection, self._dtype = projection, dtype
        hidden_TD, weight_VD, _ = projection.head
        self.hidden_TD = empty(hidden_TD, (*hidden_TD.shape,), dtype) if wanted[0] else None
        self.weight_VD = empty(weight_VD, (*weight_VD.shape,), weight_VD.dtype) if wanted[1] else None
        self.bias_V = weight_VD.new_zeros(weight_VD.shape[0], dtype=dtype) if wanted[2] else None
        self._tile_grad = hidden_TD.new_empty(0)

    def add_rows(self, rows: slice, grad_CV: torch.Tensor) -> None:
        """The gradient of a chunk's logits over the whole vocabulary; weights of the statistics dtype only."""
        weight_VD, hidden_CD = self._projection.head.weight_VD, self._projection.head.hidden_TD[rows]
        if self.hidden_TD is not None:
            add_hidden_(self.hidden_TD[rows], grad_CV, weight_VD, is_first=True)
        if self.weight_VD is not None:
            add_weight_(self.weight_VD, grad_CV, hidden_CD, is_first=rows.start == 0)
        if self.bias_V is not None:
            self.bias_V += grad_CV.sum(0)

    def begin_tile(self, tile: slice) -> None:
        """Before the chunks of a tile."""
        if self.weight_VD is not None:
            weight_vD = self._projection.weight(tile)
            self._tile_grad = empty(weight_vD, (*weight_vD.shape,), weight_vD.dtype)

    def add_tile(self, rows: slice, tile: slice, grad_CV: torch.Tensor, scale_C: torch.Tensor) -> None:
        """The gradient of a chunk's logits over a tile. ``scale_C``: about the largest of a row, over all tiles."""
        weight_vD, hidden_CD = self._projection.weight(tile), self._projection.hidden(rows)
        if self.bias_V is not None:
            self.bias_V[tile] += grad_CV.sum(0)
        grad_CV = grad_CV.to(weight_vD.dtype)
        if self.hidden_TD is not None:
            add_hidden_(self.hidden_TD[rows], grad_CV, weight_vD, is_first=tile.start == 0)
        if self.weight_VD is not None:
            add_weight_(self._tile_grad, grad_CV, hidden_CD, is_first=rows.start == 0)

    def end_tile(self, tile: slice) -> None:
        """After them: the gradient of the tile's weights is rounded once, when it is complete."""
        if self.weight_VD is not None:
            self.weight_VD[tile] = self._tile_grad

    def finish(self) -> Gradients:
        hidden_TD, _, bias_V = self._projection.head
        if self.weight_VD is not None and hidden_TD.shape[0] == 0:
            self.weight_VD.zero_()
        return (
            None if self.hidden_TD is None else self.hidden_TD.to(hidden_TD.dtype),
            self.weight_VD,
            None if self.bias_V is None else self.bias_V.to(hidden_TD.dtype if bias_V is None else bias_V.dtype),
        )


class Bf16Gradient(Gradient):
    """The same by brgemm: bf16 factors, fp32 sums.

    The gradient of the logits is rounded to bf16 on its way into the products, which alone would cost 1.5e-3 of the
    gradients (relative, Frobenius). Nearly all of that comes from the few largest entries of each row: what rounding
    took from these is added in fp32.
    """

    def __init__(self, projection: Projection, wanted: Wanted, dtype: torch.dtype) -> None:
        super().__init__(projection, wanted, dtype)
        self._packed_hidden: dict[int, torch.Tensor] = {}
        self._packed_weight = self._tile_grad

    def begin_tile(self, tile: slice) -> None:
        head, size = self._projection.head, tile.stop - tile.start
        if self.hidden_TD is not None:
            if tile.start == 0:
                self.hidden_TD.zero_()
            self._packed_weight = torch.ops.copd_kernels.bf16_pack(head.weight_VD[tile], False)
        if self.weight_VD is not None and self._tile_grad.shape[0] != size:
            self._tile_grad = empty(head.hidden_TD, (size, head.hidden_TD.shape[1]), self._dtype)

    def _hidden(self, rows: slice) -> torch.Tensor:
        """A chunk of hidden states, packed."""
        if rows.start in self._packed_hidden:
            return self._packed_hidden[rows.start]
        hidden_TD = self._projection.head.hidden_TD
        packed: torch.Tensor = torch.ops.copd_kernels.bf16_pack(hidden_TD[rows], False)
        if hidden_TD.nbytes <= _KEPT_BYTES:
            self._packed_hidden[rows.start] = packed
        return packed

    def add_tile(self, rows: slice, tile: slice, grad_CV: torch.Tensor, scale_C: torch.Tensor) -> None:
        ops, head = torch.ops.copd_kernels, self._projection.head
        num_tokens, size = grad_CV.shape
        if self.bias_V is not None:
            self.bias_V[tile] += grad_CV.sum(0)
        if self.hidden_TD is None and self.weight_VD is None:
            return
        # The products sum over pairs: a column of zeros makes the number even.
        rounded_CV = empty(head.hidden_TD, (num_tokens, size + size % 2), torch.bfloat16)
        rounded_CV[:, size:] = 0
        hits = torch.empty(num_tokens, _MOST_CORRECTED, dtype=torch.int32)
        ops.round_bf16_(grad_CV, _CORRECTED_SHARE * scale_C, rounded_CV[:, :size], hits)
        if self.hidden_TD is not None:
            ops.bf16_product_(rounded_CV, self._packed_weight, self.hidden_TD[rows], True)
            ops.correct_bf16_(grad_CV, hits, head.weight_VD[tile], self.hidden_TD[rows], False)
        if self.weight_VD is not None:
            transposed_VC = empty(rounded_CV, (size, num_tokens + num_tokens % 2), torch.bfloat16)
            transposed_VC[:, num_tokens:] = 0
            ops.bf16_transpose_(rounded_CV[:, :size], transposed_VC[:, :num_tokens])
            ops.bf16_product_(transposed_VC, self._hidden(rows), self._tile_grad, rows.start > 0)
            ops.correct_bf16_(grad_CV, hits, head.hidden_TD[rows], self._tile_grad, True)


def gradient_of(projection: Projection, wanted: Wanted, dtype: torch.dtype) -> Gradient:
    return (Bf16Gradient if projection.by_bf16 else Gradient)(projection, wanted, dtype)
