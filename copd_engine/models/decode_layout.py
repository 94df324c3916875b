"""Which pages of the key/value cache each sequence of a decode step reads, and in which calls.

Sequences differ in length. They stand in the order of their pages, and neighbours share a call as long as padding them
to the longest of them costs less than another call. What a call gathers is bounded too: on a CPU it should still be in
the cache when attention reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

#: Tokens of a page. A page belongs to one prompt or to one sequence.
PAGE = 16
#: Keys and values that a call gathers. 1 and 2 MB were equally fast on a CPU with 1 MB of L2 cache per core; 134 MB
#: at once took 1.6 times as long, where torch could reuse the memory, and 5 times as long where it could not.
CPU_CALL_BYTES = 2 << 20
#: A GPU wants all at once; this bounds the copy.
GPU_CALL_BYTES = 256 << 20
#: Padding that costs as much as one more call.
PADDING_BYTES = 512 << 10
#: Beyond that, the share of a call's pages that may be padding.
PADDING_SHARE = 1 / 16


@dataclass(frozen=True)
class DecodeLayout:
    """One new token of each of B sequences against their pages.

    ``pages_BP`` int64: the pages of each sequence in order, then any page of its own; ``mask_BL`` additive, 0 or -inf,
    ``[B, P * PAGE]``: which tokens of them it sees. ``calls``: (first row, last row + 1, pages) of each call.
    ``_buffers``: memory that the steps share.
    """

    pages_BP: torch.Tensor
    mask_BL: torch.Tensor
    calls: tuple[tuple[int, int, int], ...]
    _buffers: dict[str, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)
    _indexes: dict[int, list[torch.Tensor]] = field(default_factory=dict, repr=False, compare=False)
    _gathers: dict[int, list[tuple[int, int, int, torch.Tensor, torch.Tensor]]] = field(
        default_factory=dict, repr=False, compare=False
    )
    _varlen: dict[int, tuple[torch.Tensor, torch.Tensor, int]] = field(default_factory=dict, repr=False, compare=False)

    def gathers(self, num_heads: int) -> list[tuple[int, int, int, torch.Tensor, torch.Tensor]]:
        """The calls, each with the rows that it takes of ``[pages * num_heads, PAGE * head_dim]``, int64
        ``[rows * num_heads * pages]``, and its mask ``[rows, 1, 1, pages * PAGE]``."""
        if num_heads not in self._gathers:
            if num_heads not in self._indexes:
                head_H1 = torch.arange(num_heads, device=self.pages_BP.device)[:, None]
                self._indexes[num_heads] = [
                    (self.pages_BP[start:stop, None, :width] * num_heads + head_H1).flatten()
                    for start, stop, width in self.calls
                ]
            self._gathers[num_heads] = [
                (start, stop, width, index, self.mask_BL[start:stop, None, None, : width * PAGE])
                for (start, stop, width), index in zip(self.calls, self._indexes[num_heads], strict=True)
            ]
        return self._gathers[num_heads]

    def gather(self, rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """``rows.index_select(0, index)`` in memory that the next gather overwrites.

        Fresh memory for each call can cost as much as all the rest: the system hands it out page by page.
        """
        buffer = self._buffers.get("rows")
        if buffer is None or len(buffer) < len(index) or buffer.shape[1:] != rows.shape[1:]:
            self._buffers["rows"] = buffer = rows.new_empty(len(index), *rows.shape[1:])
        return torch.index_select(rows, 0, index, out=buffer[: len(index)])

    def varlen(self, num_heads: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        """For flash-attn: int64 ``[S * num_heads]``, the rows of ``[pages * num_heads * PAGE, head_dim]`` that hold the
        S visible tokens, one sequence after the other; where each begins, int32 ``[B + 1]``; the longest length."""
        if num_heads not in self._varlen:
            device = self.pages_BP.device
            within_L = torch.arange(PAGE, device=device).repeat(self.pages_BP.shape[1])
            visible_BL = self.mask_BL[:, : len(within_L)] == 0
            length_B = visible_BL.sum(1)
            first_S = (self.pages_BP.repeat_interleave(PAGE, 1) * (num_heads * PAGE) + within_L)[visible_BL]
            index_SH = first_S[:, None] + torch.arange(num_heads, device=device) * PAGE
            starts = torch.nn.functional.pad(length_B.cumsum(0), (1, 0)).int()
            self._varlen[num_heads] = index_SH.flatten(), starts, int(length_B.max())
        return self._varlen[num_heads]


def call_bytes(device: torch.device) -> int:
    return CPU_CALL_BYTES if device.type == "cpu" else GPU_CALL_BYTES


def plan_calls(num_pages: Sequence[int], page_bytes: int, call_bytes: int) -> tuple[tuple[int, int, int], ...]:
    """Calls over sequences of ``num_pages`` pages, best in falling order; ``page_bytes``: one layer's keys and values.

    A call is closed when it would gather more than ``call_bytes``, or when its padding costs more than a call and more
    than a share of its own pages.
    """
    calls: list[tuple[int, int, int]] = []
    start = width = total = 0
    for row, count in enumerate(num_pages):
        wider = max(width, count)
        gathered = (row + 1 - start) * wider
        padding = gathered - total - count
        too_padded = padding * page_bytes > PADDING_BYTES and padding > PADDING_SHARE * gathered
        if row > start and (gathered * page_bytes > call_bytes or too_padded):
            calls.append((start, row, width))
            start, wider, total = row, count, 0
        width, total = wider, total + count
    return (*calls, (start, len(num_pages), width))
