"""Group advantages over ragged groups."""

from __future__ import annotations

from typing import NamedTuple

import torch

from copd_kernels import _backend, reference
from copd_kernels._library import native_available


class GroupAdvantages(NamedTuple):
    """Per response: its advantage, and whether all rewards of its group are equal (the advantage is then exactly 0)."""

    advantages_B: torch.Tensor
    zero_variance_B: torch.Tensor


torch.library.define(
    "copd_kernels::group_advantages",
    "(Tensor rewards_B, Tensor group_ids_B, str mode, float eps) -> (Tensor advantages_B, Tensor zero_variance_B)",
)
# The body for every device without one of its own; csrc/group_advantages.cpp registers the CPU's.
torch.library.impl("copd_kernels::group_advantages", "CompositeExplicitAutograd", reference.group_advantages)
native_available()


def _cuda(
    rewards_B: torch.Tensor, group_ids_B: torch.Tensor, mode: str, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    found: tuple[torch.Tensor, torch.Tensor] = _backend.gpu_module("advantages", rewards_B.device).group_advantages(
        rewards_B, group_ids_B, mode, eps
    )
    return found


torch.library.impl("copd_kernels::group_advantages", "cuda", _cuda)


@torch.library.register_fake("copd_kernels::group_advantages")
def _fake(
    rewards_B: torch.Tensor, group_ids_B: torch.Tensor, mode: str, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.float64 if rewards_B.dtype == torch.float64 else torch.float32
    return rewards_B.new_empty(rewards_B.shape, dtype=dtype), rewards_B.new_empty(rewards_B.shape, dtype=torch.bool)


def group_advantages(
    rewards_B: torch.Tensor, group_ids_B: torch.Tensor, *, mode: str = "population", eps: float = 1e-6
) -> GroupAdvantages:
    """(r - mean of the group) / (std of the group + eps), one number per response: (GRPO-ADV), arXiv 2604.27083.

    ``rewards_B`` floating ``[B]``; ``group_ids_B`` int64 ``[B]``, non-negative and non-decreasing, so that the members
    of a group are adjacent; groups may differ in size. ``mode``: ``population`` divides by the std over G, ``sample``
    by the std over G - 1, ``none`` not at all (Dr.GRPO); ``rloo`` takes r - mean of the others of the group. Returns
    fp32 ``[B]`` (fp64 for fp64 rewards; sums are fp64 either way) and bool ``[B]``. A group of one, or of equal finite
    rewards, gets exactly 0. A group with a NaN or infinite reward gets NaN for the members that it affects. Rewards
    carry no grad.

    Raises ValueError on a wrong rank, size, dtype or mode, and on group ids out of order.
    """
    if group_ids_B.device != rewards_B.device:
        raise ValueError(f"group_ids_B must be on {rewards_B.device} like rewards_B, was on {group_ids_B.device}")
    return GroupAdvantages(*torch.ops.copd_kernels.group_advantages(rewards_B, group_ids_B, mode, eps))
