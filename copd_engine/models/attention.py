"""Attention over packed rows without a dense [T, T] mask.

Registered with transformers under one name; what it does depends on the layout that the caller passes through
the model's keyword arguments:

- :class:`PackedLayout`: prompts, then the responses that continue them; a response sees its prompt and itself.
- :class:`DecodeLayout`: one new token per sequence against a left-padded key/value cache.
- no layout: plain scaled dot-product attention (the vision tower calls it once per image or frame).

The tokens are gathered into padded batches for the attention call alone; all other layers work on packed tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from copd_engine.types import PackedBatch

NAME = "copd_varlen"
#: What transformers passes for local attention, Gemma's soft cap and attention sinks.
UNSUPPORTED = ("sliding_window", "softcap", "s_aux")


@dataclass(frozen=True)
class PackedLayout:
    """Which packed row stands where in two padded batches, prompts and responses.

    ``prompt_index_PL`` (right-padded) feeds causal attention without a mask: a real token never sees the padding
    behind it. For responses, ``query_index_BR`` (right-padded) attends to ``key_index_BC``: the prompt, left-padded
    so that all end at the same column, then the response; ``mask_B1RC`` bool says what may be seen. ``unpad_T``:
    where packed token t stands in the concatenation of both flattened batches. Index tensors int64; the response part
    is None when there are no response rows.
    """

    prompt_index_PL: torch.Tensor
    unpad_T: torch.Tensor
    query_index_BR: torch.Tensor | None = None
    key_index_BC: torch.Tensor | None = None
    mask_B1RC: torch.Tensor | None = None

    @classmethod
    def of(cls, batch: PackedBatch) -> PackedLayout:
        prompt_index_PL, real_PL = _right_padded(batch.prompt_lengths_P, first_row=0)
        unpad_prompts_T = real_PL.flatten().nonzero().squeeze(1)
        if int(batch.response_lengths_B.sum()) == 0:
            return cls(prompt_index_PL, unpad_prompts_T)
        num_prompt_rows = int(batch.prompt_lengths_P.sum())
        query_index_BR, real_BR = _right_padded(batch.response_lengths_B, first_row=num_prompt_rows)
        lengths_B = batch.prompt_lengths_P[batch.prompt_of_B]
        ends_B = torch.cumsum(batch.prompt_lengths_P, 0)[batch.prompt_of_B]
        longest = prompt_index_PL.shape[1]
        column_L = torch.arange(longest, device=lengths_B.device)
        seen_BL = column_L[None, :] >= (longest - lengths_B)[:, None]
        prompt_rows_BL = torch.maximum(ends_B[:, None] - longest + column_L, (ends_B - lengths_B)[:, None])
        num_queries = query_index_BR.shape[1]
        causal_RR = torch.ones(num_queries, num_queries, dtype=torch.bool, device=lengths_B.device).tril()
        mask_BRC = torch.cat(
            [seen_BL[:, None, :].expand(-1, num_queries, -1), causal_RR.expand(len(lengths_B), -1, -1)], dim=2
        )
        return cls(
            prompt_index_PL=prompt_index_PL,
            unpad_T=torch.cat([unpad_prompts_T, prompt_index_PL.numel() + real_BR.flatten().nonzero().squeeze(1)]),
            query_index_BR=query_index_BR,
            key_index_BC=torch.cat([prompt_rows_BL, query_index_BR], dim=1),
            mask_B1RC=mask_BRC[:, None],
        )


def _right_padded(lengths_S: torch.Tensor, first_row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Row index ``[S, longest]`` of segments that follow one another from ``first_row``, and which entries are real.

    Behind a segment's end stands its last row, or the first row of all for an empty segment.
    """
    starts_S = first_row + torch.cumsum(lengths_S, 0) - lengths_S
    column_L = torch.arange(int(lengths_S.max()), device=lengths_S.device)
    last_S = (starts_S + lengths_S - 1).clamp(min=first_row)
    return torch.minimum(starts_S[:, None] + column_L, last_S[:, None]), column_L < lengths_S[:, None]


@dataclass(frozen=True)
class DecodeLayout:
    """``mask_B11L`` additive fp mask over the cache's columns: 0 where a key may be seen, -inf on padding."""

    mask_B11L: torch.Tensor


def varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    layout: PackedLayout | DecodeLayout | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Query ``[batch, heads, tokens, head_dim]``, key and value likewise with their own number of heads.

    Returns ``[batch, tokens, heads, head_dim]``. Raises ValueError for a batch of packed rows, a
    causal module without a layout, and variants of attention that would otherwise be dropped in silence.
    """
    if layout is None and attention_mask is not None:
        raise ValueError(f"{NAME} takes a layout, not an attention_mask of shape {tuple(attention_mask.shape)}")
    if layout is None and getattr(module, "is_causal", False):
        # transformers makes no mask for an attention it does not know: every token would see the ones behind it.
        raise ValueError(f"{NAME} needs a layout in a decoder: call the policy, not its module")
    unsupported = [name for name in UNSUPPORTED if options.get(name) is not None]
    if unsupported:
        raise ValueError(f"{NAME} does not support {', '.join(unsupported)}, which this model's attention asks for")
    grouped = query.shape[1] != key.shape[1]
    if isinstance(layout, PackedLayout):
        if query.shape[0] != 1:
            raise ValueError(f"packed attention takes one row, got a batch of {query.shape[0]}")
        index = layout.prompt_index_PL
        padded_query, padded_key, padded_value = (_to_padded(x, index) for x in (query, key, value))
        out = scaled_dot_product_attention(
            padded_query, padded_key, padded_value, is_causal=True, scale=scaling, enable_gqa=grouped
        )
        flat = [out.transpose(1, 2).flatten(0, 1)]
        if layout.query_index_BR is not None and layout.key_index_BC is not None:
            out = scaled_dot_product_attention(
                _to_padded(query, layout.query_index_BR),
                _to_padded(key, layout.key_index_BC),
                _to_padded(value, layout.key_index_BC),
                attn_mask=layout.mask_B1RC,
                scale=scaling,
                enable_gqa=grouped,
            )
            flat.append(out.transpose(1, 2).flatten(0, 1))
        return torch.cat(flat).index_select(0, layout.unpad_T).unsqueeze(0), None
    mask = layout.mask_B11L if isinstance(layout, DecodeLayout) else None
    out = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=grouped)
    return out.transpose(1, 2), None


def _to_padded(x_1HTd: torch.Tensor, index_BL: torch.Tensor) -> torch.Tensor:
    """``[1, heads, T, head_dim]`` -> ``[B, heads, L, head_dim]``."""
    x_THd = x_1HTd.squeeze(0).transpose(0, 1)
    return x_THd.index_select(0, index_BL.flatten()).unflatten(0, index_BL.shape).transpose(1, 2)


AttentionInterface.register(NAME, varlen_attention)
