"""The CPU driver: products by torch, statistics and gradients by the row operations, one workspace at a time.

Two ways through the [T, V] plane:

* **rows**: a chunk of tokens against the whole vocabulary. The logits of the chunk exist once, serve the statistics and
  then become the gradient: 1 unit per head forward, 2 for the gradients. Weight gradients add up over chunks, in place
  for fp32 weights.
* **tiles**: a tile of the vocabulary against chunks of tokens, vocabulary outside. No buffer grows with V, a weight is
  converted once per pass, and its gradient is complete, and rounded once, when its tile is done; the gradient projects
  again (1 unit per head more). For 16-bit weights, whose gradients cannot be summed up in place.

Products: _products.py. Statistics are fp32 (fp64 for fp64 inputs).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from copd_kernels import _products, statistics
from copd_kernels._products import Gradient, Projection, gradient_of, slices
from copd_kernels._types import Gradients, Head, Wanted

# The most that the way by rows takes for its workspace, all heads together: 512 tokens of two heads at V = 32,768.
# Fewer tokens at a time make torch.mm slower, and fp32 weights and their gradients are read and written once per chunk.
ROWS_BYTES = 128 * 2**20
# brgemm is content with less, as long as it is so many tokens.
_FEW_ROWS_BYTES, _FEW_TOKENS = 40 * 2**20, 128

# The heads have their dtype already; products of fp32 or fp64 sums stay what they are.
_without_autocast = torch.autocast("cpu", enabled=False)

Coefficients = Callable[[slice, torch.Tensor, torch.Tensor | None], torch.Tensor]


def statistics_dtype(*heads: Head | None) -> torch.dtype:
    fp64 = any(head is not None and head.hidden_TD.dtype == torch.float64 for head in heads)
    return torch.float64 if fp64 else torch.float32


def _rows_step(num_tokens: int, row_bytes: int, workspace_bytes: int) -> int:
    """Tokens of a chunk by rows: chunks of equal size, in multiples of 16, that fit the workspace."""
    most = max(16, workspace_bytes // row_bytes // 16 * 16)
    num_chunks = max(1, -(-num_tokens // most))
    return min(most, -(-num_tokens // num_chunks // 16) * 16) if num_tokens else most


def _scale(stats_FT: torch.Tensor, coefs_FT: torch.Tensor) -> torch.Tensor:
    """About the largest entry of each row of the gradient, ``[T]``: which entries are large is all that hangs on it."""
    log_top_T = -stats_FT[statistics.TAIL].log1p()
    entropy_T = -log_top_T - stats_FT[statistics.MEAN]
    slope_T = coefs_FT[0].abs() + coefs_FT[1].abs() * (log_top_T + entropy_T).abs()
    if len(stats_FT) == statistics.NUM_DUAL:
        # The gap deviates from its mean by about sqrt(2 KL).
        kl_T, _ = statistics.divergences(stats_FT)
        slope_T = slope_T + coefs_FT[3:].abs().sum(0) * (2 * kl_T).sqrt()
    return log_top_T.exp() * slope_T


class _Pass:
    """One walk over the [T, V] plane of one head, or of a student's and a teacher's."""

    def __init__(
        self,
        student: Head,
        teacher: Head | None,
        target_T: torch.Tensor | None,
        temperature: float,
        softcap: float,
        chunk_tokens: int,
        v_begin: int = 0,
    ) -> None:
        self.student, self.teacher, self.v_begin = student, teacher, v_begin
        self.temperature, self.softcap, self.chunk_tokens = temperature, softcap, chunk_tokens
        self.num_tokens, self.vocab_size = student.hidden_TD.shape[0], student.weight_VD.shape[0]
        self.dtype = statistics_dtype(student, teacher)
        self.rows = _products.row_ops(self.dtype)
        self.by_brgemm = self.dtype == torch.float32 and _products.has_fp32_brgemm()
        self.target_T = (
            torch.full((self.num_tokens,), -1, dtype=torch.int64, device=student.hidden_TD.device)
            if target_T is None
            else target_T
        )
        self.heads = [
            Projection(head, temperature, softcap, self.dtype) for head in (student, teacher) if head is not None
        ]

    def rows_step(self) -> int:
        row_bytes = self.vocab_size * self.dtype.itemsize * len(self.heads)
        workspace_bytes = max(_FEW_ROWS_BYTES, _FEW_TOKENS * row_bytes) if self.by_brgemm else ROWS_BYTES
        return self.chunk_tokens or _rows_step(self.num_tokens, row_bytes, min(ROWS_BYTES, workspace_bytes))

    def tile_tokens(self) -> int:
        return self.chunk_tokens or _products.TILE_TOKENS

    def buffers(self, num_rows: int, num_columns: int) -> list[torch.Tensor]:
        size = (min(num_rows, self.num_tokens), min(num_columns, self.vocab_size))
        return [_products.empty(self.student.hidden_TD, size, self.dtype) for _ in self.heads]

    def empty_statistics(self, num_tokens: int) -> torch.Tensor:
        num_rows = statistics.NUM_SINGLE if self.teacher is None else statistics.NUM_DUAL
        return statistics.empty_statistics(num_rows, num_tokens, like=self.student.hidden_TD, dtype=self.dtype)

    def logits(self, buffers: list[torch.Tensor], rows: slice, tile: slice) -> list[torch.Tensor]:
        chunk = [buffer[: rows.stop - rows.start, : tile.stop - tile.start] for buffer in buffers]
        for head, out_CV in zip(self.heads, chunk, strict=True):
            head.logits_(rows, tile, out_CV)
        return chunk

    def add_statistics(self, chunk: list[torch.Tensor], rows: slice, tile: slice, stats_FC: torch.Tensor) -> None:
        begin = self.v_begin + tile.start
        if self.teacher is None:
            self.rows.single_stats_(chunk[0], begin, self.target_T[rows], stats_FC)
        else:
            self.rows.dual_stats_(chunk[0], chunk[1], begin, self.target_T[rows], stats_FC)

    def second(self, chunk: list[torch.Tensor], stats_FC: torch.Tensor, beta: float) -> torch.Tensor:
        second_3C = stats_FC.new_zeros(3, stats_FC.shape[1])
        self.rows.second_(chunk[0], chunk[1], stats_FC, beta, second_3C)
        return second_3C

    def gradient_(
        self,
        chunk: list[torch.Tensor],
        rows: slice,
        tile: slice,
        stats_FC: torch.Tensor,
        second_3C: torch.Tensor | None,
        coefs: torch.Tensor,
        beta: float,
    ) -> torch.Tensor:
        begin, target_C = self.v_begin + tile.start, self.target_T[rows]
        scale = (self.temperature, self.softcap)
        if self.teacher is None:
            self.rows.single_grad_(chunk[0], begin, target_C, stats_FC, coefs, *scale)
        else:
            second_3C = stats_FC.new_zeros(3, stats_FC.shape[1]) if second_3C is None else second_3C
            self.rows.dual_grad_(chunk[0], chunk[1], begin, target_C, stats_FC, second_3C, coefs, beta, *scale)
        return chunk[0]

    def overlap(self, chunk: list[torch.Tensor], rows: slice, top_k: int) -> torch.Tensor:
        """Share ``[C]`` of the top k that both heads have in common; the chunk holds the whole vocabulary."""
        indices = []
        for logits_CV in chunk:
            values_Ck = logits_CV.new_full((len(logits_CV), top_k), -torch.inf)
            indices_Ck = torch.full((len(logits_CV), top_k), -1, dtype=torch.int64, device=logits_CV.device)
            self.rows.topk_(logits_CV, 0, values_Ck, indices_Ck)
            indices.append(indices_Ck)
        common = (indices[0][:, :, None] == indices[1][:, None, :]).sum((1, 2))
        return common.to(self.dtype) / top_k

    def by_rows(
        self,
        *,
        second_beta: float | None = None,
        top_k: int = 0,
        coefficients: Coefficients | None = None,
        wanted: Wanted = (False, False, False),
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, Gradients]:
        """Statistics, and on the same logits second pass, overlap and gradient."""
        whole = slice(0, self.vocab_size)
        step = self.rows_step()
        buffers = self.buffers(step, self.vocab_size)
        gradient = Gradient(self.heads[0], wanted, self.dtype)
        stats, seconds, overlaps = [self.empty_statistics(0)], [self.empty_statistics(0)[:3]], []
        for rows in slices(self.num_tokens, step):
            chunk = self.logits(buffers, rows, whole)
            stats_FC = self.empty_statistics(rows.stop - rows.start)
            self.add_statistics(chunk, rows, whole, stats_FC)
            second_3C = None if second_beta is None else self.second(chunk, stats_FC, second_beta)
            if top_k:
                overlap_C = self.overlap(chunk, rows, top_k)
                # Comparisons with NaN are False: without this a broken row would read as "no overlap".
                overlaps.append(overlap_C + 0 * (stats_FC[1] + stats_FC[5]))
            if coefficients is not None:
                coefs = coefficients(rows, stats_FC, second_3C)
                if any(wanted):
                    grad_CV = self.gradient_(chunk, rows, whole, stats_FC, second_3C, coefs, second_beta or 0.5)
                    gradient.add_rows(rows, grad_CV)
            stats.append(stats_FC)
            if second_3C is not None:
                seconds.append(second_3C)
        overlap_T = torch.cat(overlaps) if overlaps else self.empty_statistics(0)[0]
        return (
            torch.cat(stats, -1),
            None if second_beta is None else torch.cat(seconds, -1),
            overlap_T if top_k else None,
            gradient.finish(),
        )

    def overlap_by_rows(self, top_k: int) -> torch.Tensor:
        """Overlap alone, fp32 ``[T]``."""
        whole, step = slice(0, self.vocab_size), self.rows_step()
        buffers, overlaps = self.buffers(step, self.vocab_size), [self.empty_statistics(0)[0].float()]
        for rows in slices(self.num_tokens, step):
            chunk = self.logits(buffers, rows, whole)
            overlap_C = self.overlap(chunk, rows, top_k).float()
            # Comparisons with NaN are False: without this a broken row would read as "no overlap".
            broken_C = torch.stack([logits_CV.sum(-1).isnan() for logits_CV in chunk]).any(0)
            overlaps.append(overlap_C.masked_fill(broken_C, torch.nan))
        return torch.cat(overlaps)

    def statistics_by_tiles(self) -> torch.Tensor:
        chunks = list(slices(self.num_tokens, self.tile_tokens()))
        stats = [self.empty_statistics(rows.stop - rows.start) for rows in chunks]
        step = min(_products.tile_step(projection.head) for projection in self.heads)
        buffers = self.buffers(self.tile_tokens(), step)
        for tile in slices(self.vocab_size, step):
            for rows, stats_FC in zip(chunks, stats, strict=True):
                self.add_statistics(self.logits(buffers, rows, tile), rows, tile, stats_FC)
        return torch.cat([self.empty_statistics(0), *stats], -1)

    def gradient_by_tiles(
        self,
        stats_FT: torch.Tensor,
        second_3T: torch.Tensor | None,
        coefs: torch.Tensor,
        beta: float,
        wanted: Wanted,
    ) -> Gradients:
        """Logits again, their gradient in their place, and the products; statistics of the whole vocabulary."""
        gradient = gradient_of(self.heads[0], wanted, self.dtype)
        if not any(wanted):
            return gradient.finish()
        scale_T = _scale(stats_FT, coefs)
        chunks = [
            (
                rows,
                stats_FT[:, rows].contiguous(),
                None if second_3T is None else second_3T[:, rows].contiguous(),
                coefs[:, rows].contiguous(),
            )
            for rows in slices(self.num_tokens, self.tile_tokens())
        ]
        step = min(_products.tile_step(projection.head) for projection in self.heads)
        buffers = self.buffers(self.tile_tokens(), step)
        for tile in slices(self.vocab_size, step):
            gradient.begin_tile(tile)
            for rows, stats_FC, second_3C, coefs_C in chunks:
                chunk = self.logits(buffers, rows, tile)
                grad_CV = self.gradient_(chunk, rows, tile, stats_FC, second_3C, coefs_C, beta)
                gradient.add_tile(rows, tile, grad_CV, scale_T[rows])
            gradient.end_tile(tile)
        return gradient.finish()


@_without_autocast
def single_statistics(
    head: Head,
    target_T: torch.Tensor | None,
    *,
    temperature: float,
    softcap: float,
    chunk_tokens: int = 0,
    v_begin: int = 0,
) -> torch.Tensor:
    """Statistics ``[4, T]`` of one head. 1 unit."""
    return _Pass(head, None, target_T, temperature, softcap, chunk_tokens, v_begin).statistics_by_tiles()


@_without_autocast
def dual_statistics(
    student: Head,
    teacher: Head,
    target_T: torch.Tensor | None,
    *,
    temperature: float,
    softcap: float,
    second_beta: float | None = None,
    top_k: int = 0,
    chunk_tokens: int = 0,
    v_begin: int = 0,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Statistics ``[12, T]`` of two heads; second pass ``[3, T]`` and overlap ``[T]`` where asked for. 2 units."""
    plane = _Pass(student, teacher, target_T, temperature, softcap, chunk_tokens, v_begin)
    if second_beta is None and top_k == 0:
        return plane.statistics_by_tiles(), None, None
    return plane.by_rows(second_beta=second_beta, top_k=top_k)[:3]


@_without_autocast
def single_gradient(
    head: Head,
    target_T: torch.Tensor | None,
    stats_4T: torch.Tensor,
    coefs_3T: torch.Tensor,
    *,
    temperature: float,
    softcap: float,
    wanted: Wanted,
    chunk_tokens: int = 0,
    v_begin: int = 0,
) -> Gradients:
    """Gradients of one head from merged statistics and coefficients. 1 unit again, and 1 for each product."""
    return _Pass(head, None, target_T, temperature, softcap, chunk_tokens, v_begin).gradient_by_tiles(
        stats_4T, None, coefs_3T, 0.5, wanted
    )


@_without_autocast
def dual_gradient(
    student: Head,
    teacher: Head,
    target_T: torch.Tensor | None,
    stats_12T: torch.Tensor,
    second_3T: torch.Tensor | None,
    coefs_6T: torch.Tensor,
    *,
    beta: float,
    temperature: float,
    softcap: float,
    wanted: Wanted,
    chunk_tokens: int = 0,
    v_begin: int = 0,
) -> Gradients:
    """Gradients of the student's head. 2 units again, and 1 for each product."""
    plane = _Pass(student, teacher, target_T, temperature, softcap, chunk_tokens, v_begin)
    return plane.gradient_by_tiles(stats_12T, second_3T, coefs_6T, beta, wanted)


@_without_autocast
def fused(
    student: Head,
    teacher: Head | None,
    target_T: torch.Tensor | None,
    *,
    coefficients: Coefficients,
    second_beta: float | None,
    top_k: int,
    temperature: float,
    softcap: float,
    wanted: Wanted,
    chunk_tokens: int = 0,
    low_memory: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, Gradients]:
    """Statistics, ``coefficients(rows, stats, second)`` of them, and the gradients that these make.

    One projection per head (by rows); two (by tiles) for ``low_memory``, and for a gradient of 16-bit weights.
    """
    plane = _Pass(student, teacher, target_T, temperature, softcap, chunk_tokens)
    by_tiles = low_memory or student.weight_VD.dtype != plane.dtype
    if not (by_tiles and any(wanted)):
        return plane.by_rows(second_beta=second_beta, top_k=top_k, coefficients=coefficients, wanted=wanted)
    if second_beta is None and top_k == 0:
        stats, second, overlap = plane.statistics_by_tiles(), None, None
    else:
        stats, second, overlap, _ = plane.by_rows(second_beta=second_beta, top_k=top_k)
    coefs = coefficients(slice(0, plane.num_tokens), stats, second)
    return stats, second, overlap, plane.gradient_by_tiles(stats, second, coefs, second_beta or 0.5, wanted)


@_without_autocast
def topk_overlap(student: Head, teacher: Head, *, top_k: int, chunk_tokens: int = 0) -> torch.Tensor:
    """Overlap of the top k, fp32 ``[T]``. 2 units."""
    plane = _Pass(student, teacher, None, 1.0, 0.0, chunk_tokens)
    return plane.overlap_by_rows(top_k)
