"""Packed rows: sequences of mixed lengths and modalities behind one another, no padding, each prompt once.

The rollouts of a group share their prompt's rows: its tokens, images and videos are computed once, and every response
attends to them. M-RoPE positions are those of each sample alone, computed before packing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from copd_engine.types import EncodedPrompt, PackedBatch


def pack(
    prompts: Sequence[EncodedPrompt],
    responses: Sequence[torch.Tensor],
    visual_token_ids: tuple[int, ...] = (),
    spatial_merge_size: int = 1,
) -> PackedBatch:
    """Pack ``prompts[b]`` followed by ``responses[b]`` (int64 ``[n]``) for all b into one row.

    The same :class:`EncodedPrompt` object given several times is packed once. With an empty response the row that
    predicts its first token is kept, with target -1, which is what a prefill needs. ``visual_token_ids``: placeholder
    ids of images and videos. Raises ValueError when a prompt's placeholders do not match its pixel inputs.
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
    positions = [prompt.position_ids_3T for prompt in unique]
    positions += [
        torch.arange(prompt.next_position, prompt.next_position + len(ids)).expand(3, -1)
        for prompt, ids in zip(prompts, inputs, strict=True)
    ]
    rows_N, sequence_N = _predicting_rows(prompt_lengths_P, response_lengths_B, prompt_of_B)
    no_target = torch.tensor([-1])
    return PackedBatch(
        input_ids_T=torch.cat([*(prompt.input_ids_T for prompt in unique), *inputs]),
        position_ids_3T=torch.cat(positions, dim=1),
        prompt_lengths_P=prompt_lengths_P,
        response_lengths_B=response_lengths_B,
        prompt_of_B=prompt_of_B,
        rows_N=rows_N,
        target_N=torch.cat([response if len(response) else no_target for response in responses]),
        sequence_N=sequence_N,
        **_pack_media(unique, prompt_lengths_P, visual_token_ids, spatial_merge_size),
    )


def _predicting_rows(
    prompt_lengths_P: torch.Tensor, response_lengths_B: torch.Tensor, prompt_of_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per response: its prompt's last row, then its own rows."""
    last_prompt_row_P = torch.cumsum(prompt_lengths_P, 0) - 1
    first_row_B = prompt_lengths_P.sum() + torch.cumsum(response_lengths_B, 0) - response_lengths_B
    counts_B = response_lengths_B + 1
    sequence_N = torch.repeat_interleave(torch.arange(len(counts_B)), counts_B)
    within_N = torch.arange(len(sequence_N)) - (torch.cumsum(counts_B, 0) - counts_B)[sequence_N]
    own_row_N = first_row_B[sequence_N] + within_N - 1
    return torch.where(within_N == 0, last_prompt_row_P[prompt_of_B[sequence_N]], own_row_N), sequence_N


def _pack_media(
    prompts: Sequence[EncodedPrompt],
    prompt_lengths_P: torch.Tensor,
    visual_token_ids: tuple[int, ...],
    spatial_merge_size: int,
) -> dict[str, torch.Tensor]:
    """Pixel inputs of all prompts in order, and the rows of their tokens."""
    starts = (torch.cumsum(prompt_lengths_P, 0) - prompt_lengths_P).tolist()
    placeholder_ids = torch.tensor(visual_token_ids, dtype=torch.int64)
    pixels: list[torch.Tensor] = []
    grids: list[torch.Tensor] = []
    rows: list[torch.Tensor] = []
    for prompt, start in zip(prompts, starts, strict=True):
        prompt_rows = torch.isin(prompt.input_ids_T, placeholder_ids).nonzero().squeeze(1)
        prompt_pixels, prompt_grids = _media(prompt)
        size = sum(int(grid.prod()) for grid in prompt_grids) // spatial_merge_size**2
        if size != len(prompt_rows):
            raise ValueError(
                f"prompt {prompt.example.uid!r} has {len(prompt_rows)} image and video tokens "
                f"but pixel inputs for {size}"
            )
        pixels += prompt_pixels
        grids += prompt_grids
        rows.append(prompt_rows + start)
    if not pixels:
        return {}
    return {"pixel_values": torch.cat(pixels), "grid_thw": torch.stack(grids), "visual_rows_M": torch.cat(rows)}


def _media(prompt: EncodedPrompt) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Pixel inputs and grids of one prompt.

    A prompt that mixes images and videos would need them in the order of its tokens; it is refused.
    """
    if prompt.pixel_values is not None and prompt.pixel_values_videos is not None:
        raise ValueError(f"prompt {prompt.example.uid!r} mixes images and videos, which is not supported yet")
    for pixels, grids in (
        (prompt.pixel_values, prompt.image_grid_thw),
        (prompt.pixel_values_videos, prompt.video_grid_thw),
    ):
        if pixels is not None and grids is not None:
            return [pixels], list(grids)
    return [], []


def split_by_tokens(
    prompts: Sequence[EncodedPrompt], response_tokens: Sequence[int], max_tokens: int
) -> list[list[int]]:
    """Indexes of sequences per micro-batch, in order, each of at most ``max_tokens`` packed tokens.

    A prompt counts once per micro-batch. A sequence longer than the budget gets a micro-batch of its own.
    """
    batches: list[list[int]] = []
    used = 0
    known: set[int] = set()
    for index, (prompt, num_response) in enumerate(zip(prompts, response_tokens, strict=True)):
        cost = num_response + (0 if id(prompt) in known else prompt.num_tokens)
        if not batches or used + cost > max_tokens:
            batches.append([])
            used, known = 0, set()
            cost = num_response + prompt.num_tokens
        batches[-1].append(index)
        used += cost
        known.add(id(prompt))
    return batches
