"""Which rows of a packed batch attend to which: worked out once per batch, used by the attention of every layer.

A prompt sees itself; a response sees its prompt and itself; both causally. Two tables say so, each for its kernel:

- :class:`SdpaPlan` for scaled dot-product attention. The longest response of each prompt and that prompt are one plain
  causal sequence, which needs no mask. The other responses attend in blocks of queries to their prompt and to
  themselves up to the block's end. Sequences of similar length share a call.
- :class:`VarlenPlan` for flash-attn: one call with every prompt and response as a segment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from copd_engine.types import PackedBatch

#: Queries per masked call. 128 and 256 were equally fast on a CPU, 512 slower, a whole response of 3,000 1.6 times as
#: slow (fp32, 8 heads of 64; half of what it computes is masked).
BLOCK = 256
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

    def _starts(self) -> tuple[list[int], list[int]]:
        """First row of each prompt and of each response."""
        starts = [0]
        for length in (*self.prompt_lengths_P, *self.response_lengths_B):
            starts.append(starts[-1] + length)
        return starts[: len(self.prompt_lengths_P)], starts[len(self.prompt_lengths_P) : -1]


@dataclass(frozen=True)
class SdpaPlan:
    """Calls of scaled dot-product attention and the rows that they take.

    ``whole``: (sequences, rows) of each causal call; ``whole_index`` int64 their rows, one call after the other, padded
    on the right, or None for the row as it stands. ``continuations``: (sequences, prompt rows, response rows) of the
    others; ``query_index`` their responses, padded on the right, ``key_index`` prompt and response.
    ``mask`` bool ``[block, widest]`` serves all their calls: its last ``q`` rows and last ``c`` columns let ``q``
    queries see ``c`` keys of which the last ``q`` are their own. ``output_index`` int64: where each packed row stands
    in the outputs of all calls behind one another.
    """

    whole: tuple[tuple[int, int], ...]
    whole_index: torch.Tensor | None
    continuations: tuple[tuple[int, int, int], ...]
    query_index: torch.Tensor
    key_index: torch.Tensor
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
        return sum(num * _triangle(length) for num, length in self.whole) + sum(
            num * (end - start) * (prompt + end)
            for num, prompt, length in self.continuations
            for start, end in blocks(length)
        )


def blocks(length: int) -> list[tuple[int, int]]:
    """First and last + 1 query of each block."""
    return [(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK)]


def _triangle(length: int) -> int:
    return length * (length + 1) // 2


def _continuation(prompt: int, length: int) -> int:
    return length * prompt + _triangle(length)


def _plan_sdpa(layout: PackedLayout) -> SdpaPlan:
    lengths_P, lengths_B = layout.prompt_lengths_P, layout.response_lengths_B
    prompt_starts, response_starts = layout._starts()
    longest: dict[int, int] = {}  # prompt -> its longest response
    for b, prompt in enumerate(layout.prompt_of_B):
        if lengths_B[b] > 0 and (prompt not in longest or lengths_B[b] > lengths_B[longest[prompt]]):
            longest[prompt] = b
    # A sequence is a prompt and the response that continues it, or -1.
    sequences = [(p, longest.get(p, -1)) for p in range(len(lengths_P))]
    others: dict[int, list[tuple[int, int]]] = {}  # prompt length -> sequences: one mask serves them
    for b, prompt in enumerate(layout.prompt_of_B):
        if lengths_B[b] > 0 and longest[prompt] != b:
            others.setdefault(lengths_P[prompt], []).append((prompt, b))

    def response_rows(b: int) -> int:
        return lengths_B[b] if b >= 0 else 0

    device = layout.device
    whole: list[tuple[int, int]] = []
    index: list[torch.Tensor] = []
    output_index = torch.empty(layout.num_rows, dtype=torch.int64)
    num_outputs = 0

    def rows_of(p: int, b: int, padded: int) -> torch.Tensor:
        """Prompt and response, then the last row again up to ``padded`` rows."""
        prompt = torch.arange(prompt_starts[p], prompt_starts[p] + lengths_P[p])
        response = torch.arange(response_starts[b], response_starts[b] + response_rows(b)) if b >= 0 else prompt[:0]
        rows = torch.cat([prompt, response])
        return torch.cat([rows, rows[-1:].expand(padded - len(rows))])

    for bucket in _buckets(sequences, lambda s: lengths_P[s[0]] + response_rows(s[1]), _triangle):
        length = max(lengths_P[p] + response_rows(b) for p, b in bucket)
        whole.append((len(bucket), length))
        for p, b in bucket:
            rows = rows_of(p, b, length)
            index.append(rows)
            num_rows = lengths_P[p] + response_rows(b)
            output_index[rows[:num_rows]] = torch.arange(num_outputs, num_outputs + num_rows)
            num_outputs += length
    whole_index = torch.cat(index)
    continuations: list[tuple[int, int, int]] = []
    queries: list[torch.Tensor] = [torch.empty(0, dtype=torch.int64)]
    keys: list[torch.Tensor] = [torch.empty(0, dtype=torch.int64)]
    for prompt_length, members in sorted(others.items()):

        def pairs(length: int, prompt_length: int = prompt_length) -> int:
            return _continuation(prompt_length, length)

        for bucket in _buckets(members, lambda s: response_rows(s[1]), pairs):
            length = max(response_rows(b) for _, b in bucket)
            continuations.append((len(bucket), prompt_length, length))
            for p, b in bucket:
                rows = rows_of(p, b, prompt_length + length)
                keys.append(rows)
                queries.append(rows[prompt_length:])
            for start, end in blocks(length):
                for _, b in bucket:
                    num_rows = max(0, min(end, response_rows(b)) - start)
                    first = response_starts[b] + start
                    output_index[first : first + num_rows] = torch.arange(num_outputs, num_outputs + num_rows)
                    num_outputs += end - start
    block = min(BLOCK, max((length for _, _, length in continuations), default=0))
    widest = max((prompt + length for _, prompt, length in continuations), default=0)
    identity = len(whole_index) == layout.num_rows and torch.equal(whole_index, torch.arange(layout.num_rows))
    return SdpaPlan(
        whole=tuple(whole),
        whole_index=None if identity else whole_index.to(device),
        continuations=tuple(continuations),
        query_index=torch.cat(queries).to(device),
        key_index=torch.cat(keys).to(device),
        mask=torch.ones(block, widest, dtype=torch.bool, device=device).tril(widest - block),
        output_index=output_index.to(device),
    )


def _buckets(
    sequences: Sequence[tuple[int, int]],
    length_of: Callable[[tuple[int, int]], int],
    pairs_of: Callable[[int], int],
) -> list[list[tuple[int, int]]]:
    """Sequences of similar length together, the longest first; which bounds what padding them to one length costs.

    A bucket is closed when its padding would cost more than a call, and more than a share of its own work.
    """
    found: list[list[tuple[int, int]]] = []
    longest = needed = wasted = 0
    for sequence in sorted(sequences, key=length_of, reverse=True):
        pairs = pairs_of(length_of(sequence))
        waste = longest - pairs
        if not found or wasted + waste > max(CALL_PAIRS, PADDING_SHARE * (needed + pairs)):
            found.append([])
            longest, needed, wasted, waste = pairs, 0, 0, 0
        found[-1].append(sequence)
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
    prompt_starts, response_starts = layout._starts()
    queries = list(layout.prompt_lengths_P)
    keys = list(layout.prompt_lengths_P)
    index = [torch.arange(sum(layout.prompt_lengths_P))]
    for prompt, start, length in zip(layout.prompt_of_B, response_starts, layout.response_lengths_B, strict=True):
        if length > 0:
            prompt_length = layout.prompt_lengths_P[prompt]
            queries.append(length)
            keys.append(prompt_length + length)
            first = prompt_starts[prompt]
            index += [torch.arange(first, first + prompt_length), torch.arange(start, start + length)]
    cu_q, cu_k = (torch.tensor([0, *lengths]).cumsum(0).to(layout.device, torch.int32) for lengths in (queries, keys))
    key_index = torch.cat(index).to(layout.device) if len(queries) > len(layout.prompt_lengths_P) else None
    return VarlenPlan(layout.num_rows, cu_q, cu_k, max(queries), max(keys), key_index)
