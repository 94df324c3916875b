"""Key/value cache of the embedded rollout engine: pages of a bounded memory, handed out as sequences grow.

The pages of a prompt are shared by all sequences that continue it; each sequence's own tokens begin on a page of their
own. Pages live in every layer under the same number.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from copd_engine.models.decode_layout import PAGE, DecodeLayout, call_bytes, plan_calls


def pages_of(num_tokens: int) -> int:
    """How many pages hold that many tokens."""
    return -(-num_tokens // PAGE)


class PagePool:
    """At most ``max_tokens`` tokens in pages of :data:`PAGE`, taken in steps as pages are handed out.

    Per layer ``[pages, 2 * kv_heads, PAGE, head_dim]``: a page's keys by head, then its values.
    """

    def __init__(self, max_tokens: int) -> None:
        self.num_pages = max_tokens // PAGE
        self.layers: list[torch.Tensor] = []
        self._free: list[int] = []  # a heap: low numbers first keep the memory small
        self._handed_out = 0  # pages 0 .. handed_out - 1 are free or in use, the others untouched
        self._unclean: list[int] = []

    @property
    def num_free(self) -> int:
        return self.num_pages - self.num_used

    @property
    def num_used(self) -> int:
        return self._handed_out - len(self._free)

    @property
    def bytes(self) -> int:
        """Memory of all layers now."""
        return sum(pages.nbytes for pages in self.layers)

    @property
    def page_bytes(self) -> int:
        """Keys and values of one page in one layer."""
        return self.layers[0][:1].nbytes

    def take(self, count: int) -> list[int]:
        """``count`` pages; they are 0 after the next :meth:`prepare`. There must be as many free ones."""
        assert count <= self.num_free, (count, self.num_free)
        taken = [heapq.heappop(self._free) for _ in range(min(count, len(self._free)))]
        fresh = count - len(taken)
        taken += range(self._handed_out, self._handed_out + fresh)
        self._handed_out += fresh
        self._unclean += taken
        return taken

    def give_back(self, pages: Sequence[int]) -> None:
        for page in pages:
            heapq.heappush(self._free, page)

    def prepare(self) -> None:
        """Memory for the pages handed out since the last call, and zeros in them.

        A page's last tokens are masked but read, and a NaN of whoever had the page before would get through the mask.
        """
        if not self._unclean:
            return
        for number, pages in enumerate(self.layers):
            if len(pages) < self._handed_out:  # one layer at a time: no second copy of the whole
                self.layers[number] = _grown(pages, min(self.num_pages, max(self._handed_out, 2 * len(pages))))
                del pages
        if self.layers:
            unclean = torch.tensor(self._unclean, device=self.layers[0].device)
            for pages in self.layers:
                pages.index_fill_(0, unclean, 0)
        self._unclean = []

    def write(self, layer: int, key_MHd: torch.Tensor, value_MHd: torch.Tensor, slot_N: torch.Tensor) -> None:
        """Write M tokens of one layer to their :func:`slots`."""
        x_MHd = torch.cat([key_MHd, value_MHd], dim=1)
        if layer == len(self.layers):
            self.layers.append(self._zeros(x_MHd))
        elif not _fits(self.layers[layer], x_MHd):  # a model of another kind; of the last one nothing is kept
            self.layers[layer] = self._zeros(x_MHd)
        head_dim = x_MHd.shape[2]
        self.layers[layer].view(-1, head_dim).index_copy_(0, slot_N, x_MHd.view(-1, head_dim))

    def _zeros(self, x_MHd: torch.Tensor) -> torch.Tensor:
        return x_MHd.new_zeros((self._handed_out, x_MHd.shape[1], PAGE, x_MHd.shape[2]))

    def release(self) -> None:
        """Give the memory back. No page may be in use."""
        assert self.num_used == 0, self.num_used
        self.layers, self._free, self._handed_out, self._unclean = [], [], 0, []


def _fits(pages: torch.Tensor, x_MHd: torch.Tensor) -> bool:
    same_kind = pages.dtype == x_MHd.dtype and pages.device == x_MHd.device
    return same_kind and pages.shape[1::2] == x_MHd.shape[1:]


def _grown(pages: torch.Tensor, size: int) -> torch.Tensor:
    grown = pages.new_empty((size, *pages.shape[1:]))
    grown[: len(pages)] = pages
    return grown


def slots(page_M: torch.Tensor, within_M: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of ``[pages * num_heads * PAGE, head_dim]`` that hold each head, of keys and of values, of these tokens of
    these pages, int64 ``[M * num_heads]``."""
    head_H = torch.arange(num_heads, device=page_M.device)
    return ((page_M[:, None] * num_heads + head_H) * PAGE + within_M[:, None]).flatten()


class PrefillCache:
    """Takes the keys and values of a packed prefill ``[1, kv_heads, T, head_dim]`` into ``pool``.

    ``segments``: (first row, last row + 1, pages) of what is kept; ``device``: the model's.
    """

    def __init__(
        self, pool: PagePool, segments: Sequence[tuple[int, int, Sequence[int]]], device: torch.device
    ) -> None:
        pool.prepare()
        self._pool = pool
        self._row_M, self._page_M, self._within_M = _places(segments).to(device)
        self._slot_N: torch.Tensor | None = None

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._slot_N is None:
            self._slot_N = slots(self._page_M, self._within_M, 2 * key.shape[1])
        key_MHd, value_MHd = (x[0].transpose(0, 1).index_select(0, self._row_M) for x in (key, value))
        self._pool.write(layer_idx, key_MHd, value_MHd, self._slot_N)
        return key, value

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


def _places(segments: Sequence[tuple[int, int, Sequence[int]]]) -> torch.Tensor:
    """Row, page and place within the page of each token of the segments, int64 ``[3, M]``."""
    start_S, stop_S = torch.tensor([segment[:2] for segment in segments], dtype=torch.int64).reshape(-1, 2).T
    length_S = stop_S - start_S
    token_M = torch.arange(int(length_S.sum())) - (length_S.cumsum(0) - length_S).repeat_interleave(length_S)
    num_pages_S = (length_S + PAGE - 1) // PAGE
    first_page_S = num_pages_S.cumsum(0) - num_pages_S
    used = [pages[: pages_of(stop - start)] for start, stop, pages in segments]
    page_N = torch.tensor([page for pages in used for page in pages], dtype=torch.int64)
    page_M = page_N[first_page_S.repeat_interleave(length_S) + token_M // PAGE]
    return torch.stack([start_S.repeat_interleave(length_S) + token_M, page_M, token_M % PAGE])


@dataclass(eq=False)
class CachedSequence:
    """Where a sequence's keys and values are: the prompt's pages, then pages of its own, on which ``num_tokens`` tokens
    stood when it was added to a :class:`DecodeCache`, which counts on from there."""

    prompt_pages: Sequence[int]
    prompt_tokens: int
    pages: list[int] = field(default_factory=list)
    num_tokens: int = 0

    @property
    def num_pages(self) -> int:
        return len(self.prompt_pages) + len(self.pages)


class DecodeCache:
    """The sequences that decode side by side. ``rows``: their order in every step, those with most pages first.

    A step is :meth:`advance`, then the model, whose attention finds what to read in :attr:`layout`.
    """

    def __init__(self, pool: PagePool) -> None:
        self.rows: list[CachedSequence] = []
        self.layout: DecodeLayout | None = None
        self._pool = pool
        self._pages_BP = self._mask_BL = torch.empty(0, 0)
        self._number_B = self._page_B = self._within_B = self._own_column_B = self._num_tokens_B = torch.empty(0)
        self._arranged_at: list[int] = []  # each row's tokens when the rows were arranged
        self._steps = 0  # since then
        self._next_page_at = 0  # the step in which a row begins its next page
        self._calls: tuple[tuple[int, int, int], ...] = ()
        self._buffers: dict[str, torch.Tensor] = {}
        self._slot_N: torch.Tensor | None = None

    def arrange(self, rows: Sequence[CachedSequence]) -> None:
        """Decode these sequences from now on; those that were here before keep their place in the tables."""
        pool = self._pool.layers[0]
        old = {id(row): number for number, row in enumerate(self.rows)}
        kept_tokens = [known + self._steps for known in self._arranged_at]
        self.rows = sorted(rows, key=lambda row: row.num_pages, reverse=True)
        origin = [old.get(id(row), -1) for row in self.rows]
        self._arranged_at = [
            row.num_tokens if number < 0 else kept_tokens[number] for row, number in zip(self.rows, origin, strict=True)
        ]
        own_column = [len(row.prompt_pages) * PAGE for row in self.rows]
        origin_B, self._own_column_B, self._num_tokens_B = torch.tensor(
            [origin, own_column, self._arranged_at], device=pool.device
        )
        self._number_B = torch.arange(len(self.rows), device=pool.device)
        self._steps = self._next_page_at = 0
        new = [number for number, known in enumerate(origin) if known < 0]
        if len(new) < len(self.rows):
            self._pages_BP, self._mask_BL = (x[origin_B] for x in (self._pages_BP, self._mask_BL))
        else:
            self._pages_BP = torch.empty(len(new), 0, dtype=torch.int64, device=pool.device)
            self._mask_BL = pool.new_empty(len(new), 0)
        self._fit(self.rows[0].num_pages)
        if new:
            self._enter(torch.tensor(new, device=pool.device), [self.rows[number] for number in new])

    def _fit(self, num_pages: int) -> None:
        """Tables of that many pages at least, and not of many more."""
        width = self._pages_BP.shape[1]
        if num_pages <= width <= 2 * num_pages + 2:
            return
        missing = num_pages + num_pages // 8 + 1 - width  # they grow seldom
        if missing > 0:
            self._pages_BP = torch.nn.functional.pad(self._pages_BP, (0, missing))
            self._mask_BL = torch.nn.functional.pad(self._mask_BL, (0, missing * PAGE), value=float("-inf"))
            # What is masked is read all the same, so it should be a page of the sequence's own.
            first_B1 = torch.tensor([[row.prompt_pages[0]] for row in self.rows], device=self._pages_BP.device)
            self._pages_BP[:, width:] = first_B1
        else:
            self._pages_BP = self._pages_BP[:, : width + missing]
            self._mask_BL = self._mask_BL[:, : (width + missing) * PAGE]

    def _enter(self, number_N: torch.Tensor, rows: Sequence[CachedSequence]) -> None:
        """Fill in the tables for these rows."""
        device, width = self._pages_BP.device, self._pages_BP.shape[1]
        table, bounds = [], []
        for row in rows:
            pages = [*row.prompt_pages, *row.pages]
            table.append(pages + pages[:1] * (width - len(pages)))
            start = len(row.prompt_pages) * PAGE
            bounds.append((row.prompt_tokens, start, start + row.num_tokens))
        self._pages_BP[number_N] = torch.tensor(table, device=device)
        prompt_N1, start_N1, stop_N1 = torch.tensor(bounds, device=device).T[:, :, None]
        column_L = torch.arange(width * PAGE, device=device)
        visible_NL = (column_L < prompt_N1) | ((column_L >= start_N1) & (column_L < stop_N1))
        mask_NL = self._mask_BL.new_zeros(visible_NL.shape).masked_fill_(~visible_NL, float("-inf"))
        self._mask_BL[number_N] = mask_NL

    def advance(self) -> None:
        """Make room for one more token of every row, on pages that the rows have already."""
        self._pool.prepare()
        known: dict[int, list[torch.Tensor]] = {}
        if self._steps == self._next_page_at:
            self._turn_pages()
        elif self.layout is not None:  # the same pages as in the last step
            known = self.layout._indexes
        self._within_B = self._num_tokens_B % PAGE
        self._mask_BL[self._number_B, self._own_column_B + self._num_tokens_B] = 0
        self._num_tokens_B = self._num_tokens_B + 1
        self._steps += 1
        self._slot_N = None
        self.layout = DecodeLayout(self._pages_BP, self._mask_BL, self._calls, self._buffers, known)

    def _turn_pages(self) -> None:
        """Enter the pages that rows begin in this step."""
        device = self._pages_BP.device
        num_tokens = [known + self._steps for known in self._arranged_at]
        columns = [len(row.prompt_pages) + num // PAGE for row, num in zip(self.rows, num_tokens, strict=True)]
        pages = [row.pages[num // PAGE] for row, num in zip(self.rows, num_tokens, strict=True)]
        self._fit(max(columns) + 1)
        self._page_B, column_B = torch.tensor([pages, columns], device=device)
        self._pages_BP[self._number_B, column_B] = self._page_B
        self._calls = plan_calls([column + 1 for column in columns], self._pool.page_bytes, call_bytes(device))
        self._next_page_at = self._steps + min(PAGE - num % PAGE for num in num_tokens)

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new tokens ``[B, kv_heads, 1, head_dim]``; returns the layer's pages, which hold both, twice."""
        if self._slot_N is None:
            self._slot_N = slots(self._page_B, self._within_B, 2 * key.shape[1])
        self._pool.write(layer_idx, key.squeeze(2), value.squeeze(2), self._slot_N)
        return self._pool.layers[layer_idx], self._pool.layers[layer_idx]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0
