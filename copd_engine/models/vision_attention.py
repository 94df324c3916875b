"""Attention of a vision tower over the packed patches of all images and frames, without a Python loop over images.

transformers calls an attention function once per image unless the function's name holds "flash"; then it calls it once
per layer with the tower's own ``cu_seqlens``. Hence the name, whatever computes it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

NAME = "copd_vision_flash"


def vision_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Every patch attends to all patches of its own segment (an image, a frame, a window).

    Query, key and value ``[1, heads, patches, head_dim]``; ``cu_seq_lens_q`` int32 ``[segments + 1]``, where each
    segment starts and the last one ends. Returns ``[1, patches, heads, head_dim]``. Segments of one length are one call
    of scaled dot-product attention: nothing is padded and no mask is made. ValueError without ``cu_seq_lens_q``.
    """
    if cu_seq_lens_q is None or attention_mask is not None or query.shape[0] != 1:
        raise ValueError(f"{NAME} is for vision towers that pack: one row, cu_seq_lens_q and no mask")
    starts_S = cu_seq_lens_q[:-1].long()
    lengths_S = cu_seq_lens_q[1:] - cu_seq_lens_q[:-1]
    lengths = sorted(set(lengths_S.tolist()) - {0})
    if len(lengths) == 1:
        return _attend(query, key, value, lengths[0], scaling).unsqueeze(0), None
    order_n = torch.cat(
        [
            (starts_S[lengths_S == length][:, None] + torch.arange(length, device=query.device)).flatten()
            for length in lengths
        ]
    )
    sizes = [length * int((lengths_S == length).sum()) for length in lengths]
    parts = zip(*(x.index_select(2, order_n).split(sizes, dim=2) for x in (query, key, value)), strict=True)
    outputs = [_attend(q, k, v, length, scaling) for (q, k, v), length in zip(parts, lengths, strict=True)]
    return torch.cat(outputs).index_select(0, order_n.argsort()).unsqueeze(0), None


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, length: int, scaling: float | None
) -> torch.Tensor:
    """``[1, heads, n, head_dim]`` in segments of ``length`` -> ``[n, heads, head_dim]``."""
    q, k, v = (x.squeeze(0).unflatten(1, (-1, length)).transpose(0, 1) for x in (query, key, value))
    return scaled_dot_product_attention(q, k, v, scale=scaling).transpose(1, 2).flatten(0, 1)


AttentionInterface.register(NAME, vision_attention)
