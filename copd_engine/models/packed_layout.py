"""Which rows of a packed batch attend to which: worked out once per batch, used by the attention of every layer.

A prompt sees itself; a response sees its prompt and itself; both causally. Two tables say so, each for its kernel:

- :class:`SdpaPlan` for scaled dot-product attention. The longest response of each prompt and that prompt are one plain
  causal sequence, which needs no mask. The other responses attend in blocks of queries to their prompt and to
  themselves up to the block's end. Sequences of similar length share a call.
- :class:`VarlenPlan` for flash-attn: one call with every prompt and response as a segment.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import accumulate

import torch

from copd_engine.types import PackedBatch

#: Queries per masked call. 128 and 256 were equally fast on a CPU, 512 slower, a whole response of 3,000 1.6 times as
#: slow (fp32, 8 heads of 64; half of what it computes is masked).
BLOCK = 256
#: Where torch's kernels mask the corner of a rectangle themselves (``torch.nn.attention.bias.causal_lower_right``).
NO_MASK_DEVICES = ("cuda",)
#: Score pairs (query, key) that cost as much as one more call: small sequences are padded rather than called alone.
CALL_PAIRS = 4096
#: Beyond that, the share of a bucket's pairs that may be padding.
PADDING_SHARE = 1 / 16


@dataclass(frozen=True)
class PackedLayout:
    """The segments of a packed row: ``num_tokens`` rows T, of which those behind the last response are padding.

    Lengths in rows; ``prompt_of_B``: which prompt each response continues.
    """

    num_tokens: int
    prompt_lengths_P: tuple[int, ...]
    response_lengths_B: tuple[int, ...]
    prompt_of_B: tuple[int, ...]
    device: torch.device

    @classmethod
    def of(cls, batch: PackedBatch) -> PackedLayout:
        return cls(
            batch.num_tokens,
            tuple(batch.prompt_lengths_P.tolist()),
            tuple(batch.response_lengths_B.tolist()),
            tuple(batch.prompt_of_B.tolist()),
            batch.input_ids_T.device,
        )

    @property
    def num_rows(self) -> int:
        """Rows that belong to a sequence."""
        return sum(self.prompt_lengths_P) + sum(self.response_lengths_B)

    @property
    def num_pairs(self) -> int:
        """(query, key) pairs that attention needs."""
        return sum(map(_triangle, self.prompt_lengths_P)) + sum(
            _continuation(self.prompt_lengths_P[prompt], length)
            for prompt, length in zip(self.prompt_of_B, self.response_lengths_B, strict=True)
        )

    @cached_property
    def sdpa(self) -> SdpaPlan:
        return _plan_sdpa(self)

    @cached_property
    def varlen(self) -> VarlenPlan:
        return _plan_varlen(self)

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *accumulate((*self.prompt_lengths_P, *self.response_lengths_B))]

    def prompt_rows(self, p: int) -> torch.Tensor:
        return torch.arange(self._starts[p], self._starts[p + 1])

    def response_rows(self, b: int) -> torch.Tensor:
        return self.prompt_rows(len(self.prompt_lengths_P) + b)


@dataclass(frozen=True)
class SdpaPlan:
    """Calls of scaled dot-product attention and the rows that they take.

    ``whole``: (sequences, rows) of each causal call; ``whole_index`` int64 their rows, one call after the other, padded
    on the right, or None for the row as it stands. ``continuations``: (sequences, prompt rows, response rows) of the
    others; ``query_index`` their responses, padded on the right, ``key_index`` prompt and response.

    ``block``: queries per call of a continuation, None for all at once where torch needs no mask (CUDA). ``mask`` bool
    ``[block, widest]`` serves all blocks: its last ``q`` rows and last ``c`` columns let ``q`` queries see ``c`` keys,
    of which the last ``q`` are their own. ``output_index`` int64: where each packed row stands in the outputs of all
    calls behind one another.
    """

    whole: tuple[tuple[int, int], ...]
    whole_index: torch.Tensor | None
    continuations: tuple[tuple[int, int, int], ...]
    query_index: torch.Tensor
    key_index: torch.Tensor
    block: int | None
    mask: torch.Tensor
    output_index: torch.Tensor
    _masks: dict[torch.dtype, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)

    def mask_for(self, num_queries: int, num_keys: int, dtype: torch.dtype) -> torch.Tensor:
        """Additive mask ``[num_queries, num_keys]``: a view of one tensor, so backward keeps nothing per call."""
        if dtype not in self._masks:
            zeros = torch.zeros(self.mask.shape, dtype=dtype, device=self.mask.device)
            self._masks[dtype] = zeros.masked_fill_(~self.mask, float("-inf"))
        return self._masks[dtype][self.mask.shape[0] - num_queries :, self.mask.shape[1] - num_keys :]

    @property
    def num_pairs(self) -> int:
        """(query, key) pairs that the calls compute; a causal call counts as half of its square."""
        total = sum(num * _triangle(length) for num, length in self.whole)
        for num, prompt, length in self.continuations:
            if self.block is None:
                total += num * _continuation(prompt, length)
            else:
                total += num * sum((end - start) * (prompt + end) for start, end in blocks(length, self.block))
        return total


def blocks(length: int, block: int | None) -> list[tuple[int, int]]:
    """First and last + 1 query of each block."""
    step = block or length
    return [(start, min(start + step, length)) for start in range(0, length, step)]


def _triangle(length: int) -> int:
    return length * (length + 1) // 2


def _continuation(prompt: int, length: int) -> int:
    return length * prompt + _triangle(length)


def _plan_sdpa(layout: PackedLayout) -> SdpaPlan:
    lengths_P, lengths_B = layout.prompt_lengths_P, layout.response_lengths_B
    longest: dict[int, int] = {}  # prompt -> its longest response
    for b, prompt in enumerate(layout.prompt_of_B):
        if lengths_B[b] > 0 and (prompt not in longest or lengths_B[b] > lengths_B[longest[prompt]]):
            longest[prompt] = b
    # One mask serves all responses to prompts of one length.
    others: dict[int, list[int]] = {}
    for b, prompt in enumerate(layout.prompt_of_B):
        if lengths_B[b] > 0 and longest[prompt] != b:
            others.setdefault(lengths_P[prompt], []).append(b)
    outputs = _Outputs(layout)
    whole, whole_rows = _whole_calls(layout, longest, outputs)
    block = None if layout.device.type in NO_MASK_DEVICES else BLOCK
    continuations, query_rows, key_rows = _continuation_calls(layout, others, block, outputs)
    mask_rows = min(block or 0, max((length for _, _, length in continuations), default=0))
    mask_columns = max((prompt + length for _, prompt, length in continuations), default=0) if block else 0
    in_order = torch.equal(whole_rows, torch.arange(layout.num_rows))
    device = layout.device
    return SdpaPlan(
        whole=whole,
        whole_index=None if in_order else whole_rows.to(device),
        continuations=continuations,
        query_index=query_rows.to(device),
        key_index=key_rows.to(device),
        block=block,
        mask=torch.ones(mask_rows, mask_columns, dtype=torch.bool, device=device).tril(mask_columns - mask_rows),
        output_index=outputs.index.to(device),
    )


class _Outputs:
    """Where each packed row will stand in the outputs of all calls."""

    def __init__(self, layout: PackedLayout) -> None:
        self.index = torch.full((layout.num_rows,), -1)
        self._num = 0

    def add(self, rows: torch.Tensor, padded: int) -> None:
        """The next ``padded`` outputs are those of ``rows``, then of padding."""
        self.index[rows] = torch.arange(self._num, self._num + len(rows))
        self._num += padded


def _whole_calls(
    layout: PackedLayout, longest: dict[int, int], outputs: _Outputs
) -> tuple[tuple[tuple[int, int], ...], torch.Tensor]:
    """Each prompt with its longest response, if it has one."""
    rows_P = [
        torch.cat([layout.prompt_rows(p), layout.response_rows(longest[p])]) if p in longest else layout.prompt_rows(p)
        for p in range(len(layout.prompt_lengths_P))
    ]
    calls, index = [], []
    for bucket in _buckets(list(range(len(rows_P))), lambda p: len(rows_P[p]), _triangle):
        length = len(rows_P[bucket[0]])
        calls.append((len(bucket), length))
        for p in bucket:
            index.append(_padded(rows_P[p], length))
            outputs.add(rows_P[p], length)
    return tuple(calls), torch.cat(index)


def _continuation_calls(
    layout: PackedLayout, others: dict[int, list[int]], block: int | None, outputs: _Outputs
) -> tuple[tuple[tuple[int, int, int], ...], torch.Tensor, torch.Tensor]:
    """The other responses, by the length of their prompt."""
    calls = []
    queries = [torch.empty(0, dtype=torch.int64)]
    keys = [torch.empty(0, dtype=torch.int64)]
    for prompt, members in sorted(others.items()):
        pairs_of = partial(_continuation, prompt)
        for bucket in _buckets(members, lambda b: layout.response_lengths_B[b], pairs_of):
            length = layout.response_lengths_B[bucket[0]]
            calls.append((len(bucket), prompt, length))
            for b in bucket:
                own = _padded(layout.response_rows(b), length)
                queries.append(own)
                keys += [layout.prompt_rows(layout.prompt_of_B[b]), own]
            for start, end in blocks(length, block):
                for b in bucket:
                    outputs.add(layout.response_rows(b)[start:end], end - start)
    return tuple(calls), torch.cat(queries), torch.cat(keys)


def _padded(rows: torch.Tensor, length: int) -> torch.Tensor:
    """The last row again up to ``length``."""
    return torch.cat([rows, rows[-1:].expand(length - len(rows))])


def _buckets(members: list[int], length_of: Callable[[int], int], pairs_of: Callable[[int], int]) -> list[list[int]]:
    """Members of similar length together, the longest first; which bounds what padding them to one length costs.

    A bucket is closed when its padding would cost more than a call, and more than a share of its own work.
    """
    found: list[list[int]] = []
    longest = needed = wasted = 0
    for member in sorted(members, key=length_of, reverse=True):
        pairs = pairs_of(length_of(member))
        waste = longest - pairs
        if not found or wasted + waste > max(CALL_PAIRS, PADDING_SHARE * (needed + pairs)):
            found.append([])
            longest, needed, wasted, waste = pairs, 0, 0, 0
        found[-1].append(member)
        needed += pairs
        wasted += waste
    return found


@dataclass(frozen=True)
class VarlenPlan:
    """Arguments of one call of ``flash_attn_varlen_func`` with ``causal=True``.

    Queries are the first ``num_rows`` packed rows as they stand; keys and values are gathered by ``key_index`` int64
    (None: as they stand): each prompt, then prompt and response of each response. Segments without rows are left out.
    ``cu_seqlens_q``, ``cu_seqlens_k`` int32 ``[segments + 1]``. With fewer queries than keys a causal call lets the
    last query see all keys (flash-attn 2.1 and later), which is what a response needs.
    """

    num_rows: int
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    key_index: torch.Tensor | None = None


def _plan_varlen(layout: PackedLayout) -> VarlenPlan:
    prompts = list(layout.prompt_lengths_P)
    queries, keys = prompts.copy(), prompts.copy()
    index = [torch.arange(sum(prompts))]
    for b, (prompt, length) in enumerate(zip(layout.prompt_of_B, layout.response_lengths_B, strict=True)):
        if length > 0:
            queries.append(length)
            keys.append(prompts[prompt] + length)
            index += [layout.prompt_rows(prompt), layout.response_rows(b)]
    cu_q, cu_k = (torch.tensor([0, *lengths]).cumsum(0).to(layout.device, torch.int32) for lengths in (queries, keys))
    key_index = torch.cat(index).to(layout.device) if len(queries) > len(prompts) else None
    return VarlenPlan(layout.num_rows, cu_q, cu_k, max(queries), max(keys), key_index)
