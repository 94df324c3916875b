"""Key/value cache of the embedded rollout engine: filled from one packed prefill, then grown a column per step.

Prompts of a group share their prefill: the packed keys and values are gathered once, left-padded and repeated for
the group's members. Left padding lets every sequence write its next token to the same column.
"""

from __future__ import annotations

import torch


class PrefillCache:
    """Records the packed keys and values of a prefill; per layer ``[1, kv_heads, T, head_dim]``."""

    def __init__(self) -> None:
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = []

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.layers.append((key, value))
        return key, value

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


class DecodeCache:
    """Left-padded cache of B sequences with room for ``max_new_tokens`` more columns.

    ``mask_B11L`` is additive (0 or -inf) over all columns, in the keys' dtype.
    """

    def __init__(
        self,
        prefill: PrefillCache,
        lengths_P: torch.Tensor,
        repeats_P: torch.Tensor,
        max_new_tokens: int,
    ) -> None:
        longest = int(lengths_P.max())
        ends_P = torch.cumsum(lengths_P, 0)
        column_L = torch.arange(longest, device=lengths_P.device)
        # Column l of prompt p holds its token l - (longest - length): prompts end at the same column.
        offset_PL = column_L[None, :] - longest + ends_P[:, None]
        index_PL = torch.maximum(offset_PL, (ends_P - lengths_P)[:, None])
        self.filled = longest
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        for key, value in prefill.layers:
            self.keys.append(_gather(key, index_PL, repeats_P, max_new_tokens))
            self.values.append(_gather(value, index_PL, repeats_P, max_new_tokens))
        hidden_PL = column_L[None, :] < (longest - lengths_P)[:, None]
        mask_PL = torch.zeros(hidden_PL.shape, dtype=self.keys[0].dtype, device=lengths_P.device)
        mask_PL.masked_fill_(hidden_PL, float("-inf"))
        mask_BL = mask_PL.repeat_interleave(repeats_P, 0)
        self.mask_B11L = torch.nn.functional.pad(mask_BL, (0, max_new_tokens))[:, None, None, :]

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new token's column; returns all filled columns."""
        stop = self.filled + 1
        self.keys[layer_idx][:, :, self.filled : stop] = key
        self.values[layer_idx][:, :, self.filled : stop] = value
        return self.keys[layer_idx][:, :, :stop], self.values[layer_idx][:, :, :stop]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.filled

    @property
    def step_mask(self) -> torch.Tensor:
        """Mask for the token being written: all filled columns and its own."""
        return self.mask_B11L[..., : self.filled + 1]

    def advance(self) -> None:
        self.filled += 1

    def keep(self, rows: torch.Tensor) -> None:
        """Drop finished sequences; ``rows`` int64 indexes of those that go on."""
        self.keys = [key.index_select(0, rows) for key in self.keys]
        self.values = [value.index_select(0, rows) for value in self.values]
        self.mask_B11L = self.mask_B11L.index_select(0, rows)


def _gather(x_1HTd: torch.Tensor, index_PL: torch.Tensor, repeats_P: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
    x_THd = x_1HTd.squeeze(0).transpose(0, 1)
    x_PHLd = x_THd.index_select(0, index_PL.flatten()).unflatten(0, index_PL.shape).transpose(1, 2)
    num_sequences, longest = int(repeats_P.sum()), index_PL.shape[1]
    cache = x_1HTd.new_empty((num_sequences, x_PHLd.shape[1], longest + max_new_tokens, x_PHLd.shape[3]))
    cache[:, :, :longest] = x_PHLd.repeat_interleave(repeats_P, 0)
    return cache
