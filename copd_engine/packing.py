"""Packed rows: sequences of mixed lengths and modalities behind one another, each prompt once.

The rollouts of a group share their prompt's rows: its tokens, images and videos are computed once, and every response
attends to them. M-RoPE positions are those of each sample alone, computed before packing. Which samples share a row is
decided in ``micro_batches.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from copd_engine.types import EncodedPrompt, PackedBatch


def pack(
    prompts: Sequence[EncodedPrompt],
    responses: Sequence[torch.Tensor],
    visual_token_ids: tuple[int, ...] = (),
    spatial_merge_size: int = 1,
    *,
    group_ids: Sequence[int] | None = None,
    term_ids: Sequence[int] | None = None,
    num_terms: int = 1,
    pad_to_multiple_of: int = 1,
) -> PackedBatch:
    """Pack ``prompts[b]`` followed by ``responses[b]`` (int64 ``[n]``) for all b into one row.

    The same :class:`EncodedPrompt` object given several times is packed once. With an empty response the row that
    predicts its first token is kept, with target -1, which is what a prefill needs. ``visual_token_ids``: the
    placeholder ids of images and of videos, in this order.

    ``group_ids``: of each sequence, by default its prompt's number. ``term_ids``: its loss term below ``num_terms``, by
    default 0. The row is filled up to a multiple of ``pad_to_multiple_of`` tokens with id 0, which nothing reads.

    Raises ValueError when a prompt's placeholders do not match its pixel inputs, for ids that are not one per sequence,
    and for a term outside ``num_terms``.
    """
    if len(prompts) != len(responses) or not prompts:
        raise ValueError(f"pack needs as many responses as prompts, at least one; got {len(responses)}, {len(prompts)}")
    number: dict[int, int] = {}
    unique: list[EncodedPrompt] = []
    for prompt in prompts:
        if id(prompt) not in number:
            number[id(prompt)] = len(unique)
            unique.append(prompt)
    prompt_of_B = torch.tensor([number[id(prompt)] for prompt in prompts])
    prompt_lengths_P = torch.tensor([prompt.num_tokens for prompt in unique])
    inputs = [response[:-1] for response in responses]
    response_lengths_B = torch.tensor([len(ids) for ids in inputs])
    cu_seqlens = torch.cat([torch.tensor([0]), prompt_lengths_P, response_lengths_B]).cumsum(0).int()
    num_padding = -int(cu_seqlens[-1]) % pad_to_multiple_of
    padding = torch.zeros(num_padding, dtype=torch.int64)
    next_position_B = torch.tensor([prompt.next_position for prompt in prompts])
    response_positions = (next_position_B.repeat_interleave(response_lengths_B) + _within(response_lengths_B)).expand(
        3, -1
    )
    rows_N, sequence_N = _predicting_rows(prompt_lengths_P, response_lengths_B, prompt_of_B)
    no_target = torch.tensor([-1])
    target_N = torch.cat([response if len(response) else no_target for response in responses])
    term_ids_B = _ids("term_ids", term_ids, torch.zeros_like(prompt_of_B))
    if not 0 <= int(term_ids_B.min()) <= int(term_ids_B.max()) < num_terms:
        raise ValueError(f"term_ids must lie in 0..{num_terms - 1}, got {sorted(set(term_ids_B.tolist()))}")
    return PackedBatch(
        input_ids_T=torch.cat([*(prompt.input_ids_T for prompt in unique), *inputs, padding]),
        position_ids_3T=torch.cat(
            [*(prompt.position_ids_3T for prompt in unique), response_positions, padding.expand(3, -1)], dim=1
        ),
        cu_seqlens=cu_seqlens,
        prompt_lengths_P=prompt_lengths_P,
        response_lengths_B=response_lengths_B,
        prompt_of_B=prompt_of_B,
        rows_N=rows_N,
        target_N=target_N,
        sequence_N=sequence_N,
        response_mask_N=target_N >= 0,
        group_ids_B=_ids("group_ids", group_ids, prompt_of_B),
        term_ids_B=term_ids_B,
        term_tokens=torch.bincount(term_ids_B[sequence_N[target_N >= 0]], minlength=num_terms),
        **_pack_media(unique, prompt_lengths_P, visual_token_ids, spatial_merge_size),
    )


def _ids(name: str, ids: Sequence[int] | None, default_B: torch.Tensor) -> torch.Tensor:
    if ids is None:
        return default_B
    if len(ids) != len(default_B):
        raise ValueError(f"{name} needs one id for each of {len(default_B)} sequences, got {len(ids)}")
    return torch.tensor(list(ids), dtype=torch.int64)


def _within(lengths_S: torch.Tensor) -> torch.Tensor:
    """0, 1, 2 ... within each of the segments of these lengths."""
    starts_S = torch.cumsum(lengths_S, 0) - lengths_S
    return torch.arange(int(lengths_S.sum())) - starts_S.repeat_interleave(lengths_S)


def _predicting_rows(
    prompt_lengths_P: torch.Tensor, response_lengths_B: torch.Tensor, prompt_of_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per response: its prompt's last row, then its own rows."""
    last_prompt_row_P = torch.cumsum(prompt_lengths_P, 0) - 1
    first_row_B = prompt_lengths_P.sum() + torch.cumsum(response_lengths_B, 0) - response_lengths_B
    counts_B = response_lengths_B + 1
    sequence_N = torch.repeat_interleave(torch.arange(len(counts_B)), counts_B)
    within_N = _within(counts_B)
    own_row_N = first_row_B[sequence_N] + within_N - 1
    return torch.where(within_N == 0, last_prompt_row_P[prompt_of_B[sequence_N]], own_row_N), sequence_N


def _pack_media(
    prompts: Sequence[EncodedPrompt],
    prompt_lengths_P: torch.Tensor,
    visual_token_ids: tuple[int, ...],
    spatial_merge_size: int,
) -> dict[str, Any]:
    """Pixel inputs of all prompts in the order of their tokens, and those tokens' rows."""
    starts = (torch.cumsum(prompt_lengths_P, 0) - prompt_lengths_P).tolist()
    placeholder_ids = torch.tensor(visual_token_ids, dtype=torch.int64)
    pixels: list[torch.Tensor] = []
    grids: list[torch.Tensor] = []
    rows: list[torch.Tensor] = []
    timestamps: list[tuple[float, ...]] = []
    for prompt, start in zip(prompts, starts, strict=True):
        prompt_rows = torch.isin(prompt.input_ids_T, placeholder_ids).nonzero().squeeze(1)
        prompt_pixels, prompt_grids = _media(
            prompt, prompt.input_ids_T[prompt_rows], visual_token_ids, spatial_merge_size
        )
        pixels += prompt_pixels
        grids += prompt_grids
        rows.append(prompt_rows + start)
        timestamps += prompt.video_timestamps
    if not pixels:
        return {}
    return {
        "pixel_values": torch.cat(pixels),
        "grid_thw": torch.cat(grids),
        "visual_rows_M": torch.cat(rows),
        "video_timestamps": tuple(timestamps),
    }


def _media(
    prompt: EncodedPrompt,
    placeholders_M: torch.Tensor,
    visual_token_ids: tuple[int, ...],
    spatial_merge_size: int,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Pixel inputs and grids of one prompt in the order of ``placeholders_M``, the ids of its image and video tokens.

    A video's frames stand apart, with their times between them, so its tokens are counted over the whole prompt.
    """
    sources = [
        (pixels, grids)
        for pixels, grids in (
            (prompt.pixel_values, prompt.image_grid_thw),
            (prompt.pixel_values_videos, prompt.video_grid_thw),
        )
        if pixels is not None and grids is not None
    ]
    size = sum(int(grids.prod(1).sum()) for _, grids in sources) // spatial_merge_size**2
    if size != len(placeholders_M):
        raise ValueError(
            f"prompt {prompt.example.uid!r} has {len(placeholders_M)} image and video tokens "
            f"but pixel inputs for {size}"
        )
    if len(sources) < 2:  # already in order
        return [pixels for pixels, _ in sources], [grids for _, grids in sources]
    ordered: list[tuple[int, torch.Tensor, torch.Tensor]] = []  # first token, pixels, grid
    for (pixels, grids), kind, name in zip(sources, visual_token_ids, ("image", "video"), strict=True):
        tokens_m = (placeholders_M == kind).nonzero().squeeze(1)
        patches = grids.prod(1)
        sizes = patches // spatial_merge_size**2
        if len(tokens_m) != int(sizes.sum()):
            raise ValueError(
                f"prompt {prompt.example.uid!r} has {len(tokens_m)} {name} tokens "
                f"but pixel inputs for {int(sizes.sum())}"
            )
        first_tokens = tokens_m[torch.cumsum(sizes, 0) - sizes].tolist()
        ordered += zip(first_tokens, pixels.split(patches.tolist()), grids.split(1), strict=True)
    ordered.sort(key=lambda medium: medium[0])
    return [pixels for _, pixels, _ in ordered], [grid for _, _, grid in ordered]
