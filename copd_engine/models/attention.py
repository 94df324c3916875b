"""Attention over packed rows without a dense [T, T] mask, registered with transformers under names of our own.

:data:`NAME` computes with scaled dot-product attention on any device, :data:`FLASH_NAME` with flash-attn 2 or 3. What
they do depends on the layout that the caller passes through the model's keyword arguments:

- :class:`PackedLayout`: prompts, then the responses that continue them; a response sees its prompt and itself.
- :class:`DecodeLayout`: one new token per sequence against the pages of a key/value cache.
- no layout: plain scaled dot-product attention.

:data:`VISION_FLASH_NAME` is flash-attn for vision towers, to which transformers hands the whole row in one call when
the attention's name holds "flash"; the same over scaled dot-product attention stands in ``vision_attention.py``.

Why not flex_attention, whose block masks say the same: transformers 5.19 refuses it for Qwen3-VL and Qwen2.5-VL
(``_supports_flex_attn`` is False; ``set_attn_implementation`` raises ValueError), though not for Qwen3-VL-MoE and the
text models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface

from copd_engine.models.decode_layout import PAGE, DecodeLayout
from copd_engine.models.flash import varlen_kernel
from copd_engine.models.packed_layout import PackedLayout, SdpaPlan, VarlenPlan, blocks

NAME = "copd_varlen"
# Without "flash" in it: set_attn_implementation would look for a kernel of that name on the hub.
FLASH_NAME = "copd_varlen_fa"
VISION_FLASH_NAME = "copd_vision_flash_attn"
#: What transformers passes for local attention, Gemma's soft cap and attention sinks.
UNSUPPORTED = ("sliding_window", "softcap", "s_aux")


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
    """Query ``[batch, heads, tokens, head_dim]``, key and value likewise with their own number of heads, or with a
    :class:`DecodeLayout` both as the pages ``[pages, 2 * kv_heads, PAGE, head_dim]`` that hold the two.

    Returns ``[batch, tokens, heads, head_dim]``, 0 on padding rows. Raises ValueError for a batch of packed rows, a
    causal module without a layout, and variants of attention that would otherwise be dropped in silence.
    """
    _check(NAME, module, query, attention_mask, layout, options)
    if isinstance(layout, PackedLayout):
        return sdpa_packed(query, key, value, layout.sdpa, scaling), None
    if isinstance(layout, DecodeLayout):
        return sdpa_paged(query, key, layout, scaling), None
    return _sdpa(query, key, value, scaling), None


def flash_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    layout: PackedLayout | DecodeLayout | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """As :func:`varlen_attention`; packed rows and decode steps by one call of flash-attn, in bf16 or fp16 on CUDA."""
    _check(FLASH_NAME, module, query, attention_mask, layout, options)
    if isinstance(layout, PackedLayout):
        return varlen_packed(varlen_kernel(query.device), query, key, value, layout.varlen, scaling), None
    if isinstance(layout, DecodeLayout):
        return varlen_paged(varlen_kernel(query.device), query, key, layout, scaling), None
    return _sdpa(query, key, value, scaling), None


def flash_vision_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Every patch sees its own segment of ``cu_seq_lens_q`` int32 ``[segments + 1]`` (an image, a frame, a window).

    Query, key and value ``[1, heads, patches, head_dim]``; returns ``[1, patches, heads, head_dim]``.
    """
    if cu_seq_lens_q is None or max_length_q is None or attention_mask is not None or query.shape[0] != 1:
        raise ValueError(f"{VISION_FLASH_NAME} takes one row with cu_seq_lens_q and max_length_q, and no mask")
    plan = VarlenPlan(query.shape[2], cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
    return varlen_packed(varlen_kernel(query.device), query, key, value, plan, scaling, causal=False), None


def _check(
    name: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    attention_mask: torch.Tensor | None,
    layout: PackedLayout | DecodeLayout | None,
    options: dict[str, Any],
) -> None:
    if layout is None and attention_mask is not None:
        raise ValueError(f"{name} takes a layout, not an attention_mask of shape {tuple(attention_mask.shape)}")
    if layout is None and getattr(module, "is_causal", False):
        # transformers makes no mask for an attention it does not know: every token would see the ones behind it.
        raise ValueError(f"{name} needs a layout in a decoder: call the policy, not its module")
    unsupported = [option for option in UNSUPPORTED if options.get(option) is not None]
    if unsupported:
        raise ValueError(f"{name} does not support {', '.join(unsupported)}, which this model's attention asks for")
    if isinstance(layout, PackedLayout) and (query.shape[0] != 1 or query.shape[2] != layout.num_tokens):
        raise ValueError(
            f"packed attention takes one row of {layout.num_tokens} tokens, "
            f"got a batch of {query.shape[0]} of {query.shape[2]} tokens"
        )


def _sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None) -> torch.Tensor:
    grouped = query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=grouped).transpose(1, 2)


def sdpa_paged(
    query: torch.Tensor, pages: torch.Tensor, layout: DecodeLayout, scaling: float | None = None
) -> torch.Tensor:
    """Attention of ``[B, heads, 1, head_dim]`` to pages ``[pages, 2 * kv_heads, PAGE, head_dim]`` of keys and values.

    Returns ``[B, 1, heads, head_dim]``.
    """
    num_rows, num_heads, _, head_dim = query.shape
    num_both = pages.shape[1]
    # The query heads that share a key are that key's queries: nothing is repeated.
    query_BHGd = query.reshape(num_rows, num_both // 2, 2 * num_heads // num_both, head_dim)
    rows = pages.view(-1, PAGE * head_dim)
    outputs: list[torch.Tensor] = []
    for start, stop, width, index, mask in layout.gathers(num_both):
        k, v = layout.gather(rows, index).view(stop - start, num_both, width * PAGE, head_dim).chunk(2, dim=1)
        outputs.append(scaled_dot_product_attention(query_BHGd[start:stop], k, v, attn_mask=mask, scale=scaling))
    out_BHGd = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return out_BHGd.reshape(num_rows, 1, num_heads, head_dim)


def sdpa_packed(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: SdpaPlan, scaling: float | None = None
) -> torch.Tensor:
    """Attention of ``[1, heads, T, head_dim]`` by the calls of ``plan`` -> ``[1, T, heads, head_dim]``."""
    query_THd, key_TKd, value_TKd = rows = [x.squeeze(0).transpose(0, 1) for x in (query, key, value)]
    num_rows = len(plan.output_index)
    num_groups = query.shape[1] // key.shape[1]
    # On CUDA torch's one kernel that takes fp32 and fewer key heads makes a dense matrix of scores.
    needs_equal_heads = num_groups > 1 and query.is_cuda and query.dtype == torch.float32
    outputs: list[torch.Tensor] = []
    index = plan.whole_index
    taken = [x[:num_rows] if index is None else x.index_select(0, index) for x in rows]
    at = 0
    for num, length in plan.whole:
        # Torch aligns a causal mask with the first key, so a padded row sees its own past alone.
        q, k, v = (_batch(x, at, num, length) for x in taken)
        if needs_equal_heads:
            k, v = (x.repeat_interleave(num_groups, dim=1) for x in (k, v))
        out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=k.shape[1] < q.shape[1])
        outputs.append(out.transpose(1, 2).flatten(0, 1))
        at += num * length
    if plan.continuations:
        query_NHd = query_THd.index_select(0, plan.query_index)
        key_NKd, value_NKd = (x.index_select(0, plan.key_index) for x in (key_TKd, value_TKd))
        query_at = key_at = 0
        for num, prompt, length in plan.continuations:
            q = _batch(query_NHd, query_at, num, length)
            k, v = (_batch(x, key_at, num, prompt + length) for x in (key_NKd, value_NKd))
            if num_groups > 1:  # once: with enable_gqa every block would keep a copy for backward
                k, v = (x.repeat_interleave(num_groups, dim=1) for x in (k, v))
            for start, end in blocks(length, plan.block):
                num_keys = prompt + end
                mask = (
                    causal_lower_right(length, num_keys)
                    if plan.block is None
                    else plan.mask_for(end - start, num_keys, query.dtype)
                )
                out = scaled_dot_product_attention(
                    q[:, :, start:end], k[:, :, :num_keys], v[:, :, :num_keys], attn_mask=mask, scale=scaling
                )
                outputs.append(out.transpose(1, 2).flatten(0, 1))
            query_at += num * length
            key_at += num * (prompt + length)
    out_THd = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    if index is not None or plan.continuations:
        out_THd = out_THd.index_select(0, plan.output_index)
    return pad(out_THd, (0, 0, 0, 0, 0, query.shape[2] - num_rows)).unsqueeze(0)


def _batch(x_NHd: torch.Tensor, first: int, num: int, length: int) -> torch.Tensor:
    """``num`` sequences of ``length`` rows from row ``first`` on -> ``[num, heads, length, head_dim]``."""
    return x_NHd[first : first + num * length].unflatten(0, (num, length)).transpose(1, 2)


def varlen_packed(
    kernel: Callable[..., Any],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: VarlenPlan,
    scaling: float | None = None,
    causal: bool = True,
) -> torch.Tensor:
    """Attention of ``[1, heads, T, head_dim]`` by one call of ``kernel`` -> ``[1, T, heads, head_dim]``.

    ``kernel`` has the signature of ``flash_attn.flash_attn_varlen_func``, whose causal mask is aligned with the last
    key of each segment.
    """
    query_THd, key_TKd, value_TKd = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    if plan.key_index is not None:
        key_TKd, value_TKd = (x.index_select(0, plan.key_index) for x in (key_TKd, value_TKd))
    else:
        key_TKd, value_TKd = (x[: plan.num_rows] for x in (key_TKd, value_TKd))
    out = kernel(
        query_THd[: plan.num_rows],
        key_TKd,
        value_TKd,
        plan.cu_seqlens_q,
        plan.cu_seqlens_k,
        plan.max_seqlen_q,
        plan.max_seqlen_k,
        softmax_scale=scaling,
        causal=causal,
    )
    # Early versions of flash-attn 3 return the log-sum-exp as well.
    out_THd = out[0] if isinstance(out, tuple) else out
    return pad(out_THd, (0, 0, 0, 0, 0, query.shape[2] - plan.num_rows)).unsqueeze(0)


def varlen_paged(
    kernel: Callable[..., Any],
    query: torch.Tensor,
    pages: torch.Tensor,
    layout: DecodeLayout,
    scaling: float | None = None,
) -> torch.Tensor:
    """As :func:`sdpa_paged`, by one call of ``kernel``, see :func:`varlen_packed`.

    The visible tokens are gathered without padding. Kernels that read pages by themselves want pages of 256 tokens
    (flash-attn 2), of which a short response would waste most.
    """
    num_both, head_dim = pages.shape[1], pages.shape[3]
    index_N, starts, longest = layout.varlen(num_both)
    key, value = layout.gather(pages.view(-1, head_dim), index_N).view(-1, num_both, head_dim).chunk(2, dim=1)
    one = torch.arange(len(starts), dtype=torch.int32, device=starts.device)
    out = kernel(query.squeeze(2), key, value, one, starts, 1, longest, softmax_scale=scaling, causal=True)
    return (out[0] if isinstance(out, tuple) else out).unsqueeze(1)


AttentionInterface.register(NAME, varlen_attention)
AttentionInterface.register(FLASH_NAME, flash_attention)
AttentionInterface.register(VISION_FLASH_NAME, flash_vision_attention)
