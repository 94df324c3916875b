# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton has no types for what a kernel takes.
"""Group advantages of ragged, contiguous groups in one launch."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from copd_kernels.gpu.specs import compile_spec
from copd_kernels.gpu.targets import CompileSpec, SpecBuilder, Target, on_device

MODES = ("population", "sample", "none", "rloo")
_BLOCK = 256


@triton.jit
def group_advantages_kernel(
    rewards,
    group_ids,
    advantages,
    zero_variance,
    num_responses,
    eps,
    MODE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(r - mean of the group) / (std + eps); one program per response, of which the first of each group does the work.

    ``rewards`` floating ``[B]``; ``group_ids`` int64 ``[B]``, non-decreasing; ``advantages`` fp32 or fp64 ``[B]``;
    ``zero_variance`` uint8 ``[B]``. ``MODE`` indexes ``MODES``. Sums are fp64, in two passes (mean, then squares of
    the deviations): thousands of numbers, so their slower unit does not show.
    """
    begin = tl.program_id(0).to(tl.int64)
    group = tl.load(group_ids + begin)
    if (begin > 0) & (tl.load(group_ids + tl.maximum(begin - 1, 0)) == group):
        return

    # Members are adjacent: the end is the first response of another group, found by bisection.
    end, high = begin + 1, tl.zeros((), tl.int64) + num_responses
    while end < high:
        middle = (end + high) // 2
        if tl.load(group_ids + middle) == group:
            end = middle + 1
        else:
            high = middle

    lanes = tl.arange(0, BLOCK).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float64)
    lowest = tl.full((BLOCK,), float("inf"), tl.float64)
    highest = tl.full((BLOCK,), float("-inf"), tl.float64)
    num_broken = tl.zeros((BLOCK,), tl.int32)
    for block in range(begin, end, BLOCK):
        inside = block + lanes < end
        reward = tl.load(rewards + block + lanes, mask=inside, other=0.0).to(tl.float64)
        total += reward
        # Minima and maxima pass NaN over; NaN and infinities show in r - r.
        num_broken += (reward - reward != 0.0).to(tl.int32)
        lowest = tl.minimum(lowest, tl.where(inside, reward, float("inf")))
        highest = tl.maximum(highest, tl.where(inside, reward, float("-inf")))
    size = (end - begin).to(tl.float64)
    mean = tl.sum(total, axis=0) / size
    equal = (tl.min(lowest, axis=0) == tl.max(highest, axis=0)) & (tl.sum(num_broken, axis=0) == 0)

    scale = tl.full((), 1.0, tl.float64)
    if MODE == 3:
        # r_i - mean of the others = (r_i - mean) · n / (n - 1).
        scale = size / tl.maximum(size - 1.0, 1.0)
    elif MODE != 2:
        squares = tl.zeros((BLOCK,), tl.float64)
        for block in range(begin, end, BLOCK):
            inside = block + lanes < end
            deviation = tl.load(rewards + block + lanes, mask=inside, other=0.0).to(tl.float64) - mean
            squares += tl.where(inside, deviation * deviation, 0.0)
        freedom = tl.maximum(size - 1.0, 1.0) if MODE == 1 else size
        scale = 1.0 / (tl.sqrt(tl.sum(squares, axis=0) / freedom) + eps)

    for block in range(begin, end, BLOCK):
        inside = block + lanes < end
        deviation = tl.load(rewards + block + lanes, mask=inside, other=0.0).to(tl.float64) - mean
        # Chosen, not multiplied: a rounding of the mean would be divided by eps.
        tl.store(advantages + block + lanes, tl.where(equal, 0.0, deviation * scale), mask=inside)
        tl.store(zero_variance + block + lanes, equal.to(tl.uint8), mask=inside)


def _check(rewards_B: torch.Tensor, group_ids_B: torch.Tensor, mode: str, eps: float) -> None:
    if rewards_B.dim() != 1:
        raise ValueError(f"rewards_B must be [B], was {list(rewards_B.shape)}")
    if not rewards_B.is_floating_point():
        raise ValueError(f"rewards_B must be a floating dtype, was {rewards_B.dtype}")
    if rewards_B.requires_grad:
        raise ValueError("rewards_B must not require grad: advantages have no gradient")
    if group_ids_B.dtype != torch.int64:
        raise ValueError(f"group_ids_B must be int64, was {group_ids_B.dtype}")
    if group_ids_B.shape != rewards_B.shape:
        raise ValueError(
            f"group_ids_B must be [B] like rewards_B {list(rewards_B.shape)}, was {list(group_ids_B.shape)}"
        )
    if mode not in MODES:
        raise ValueError(f"mode must be 'population', 'sample', 'none' or 'rloo', was {mode!r}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be >= 0 and finite, was {eps}")
    if group_ids_B.device != rewards_B.device:
        raise ValueError(f"group_ids_B must be on {rewards_B.device} like rewards_B, was on {group_ids_B.device}")
    before_B = torch.cat([group_ids_B.new_zeros(1), group_ids_B])[:-1]
    out_of_order = (group_ids_B < before_B).nonzero()[:, 0]
    if out_of_order.numel():
        position = int(out_of_order[0])
        raise ValueError(
            "group_ids_B must be non-negative and non-decreasing, so that a group is one run; position "
            f"{position} holds {int(group_ids_B[position])} after {int(before_B[position])}"
        )


def group_advantages(
    rewards_B: torch.Tensor, group_ids_B: torch.Tensor, mode: str, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``copd_kernels.reference.group_advantages`` computes, and raises: ``(advantages_B, zero_variance_B)``.

    The order of the group ids is read back from the GPU, which waits for it: once a step, a few thousand numbers.
    """
    _check(rewards_B, group_ids_B, mode, eps)
    dtype = torch.promote_types(rewards_B.dtype, torch.float32)
    advantages_B = torch.empty(rewards_B.shape, dtype=dtype, device=rewards_B.device)
    zero_variance_B = torch.empty(rewards_B.shape, dtype=torch.uint8, device=rewards_B.device)
    num_responses = rewards_B.shape[0]
    if num_responses:
        with on_device(rewards_B.device):
            group_advantages_kernel[(num_responses,)](
                rewards_B.contiguous(),
                group_ids_B.contiguous(),
                advantages_B,
                zero_variance_B,
                num_responses,
                eps,
                MODE=MODES.index(mode),
                BLOCK=_BLOCK,
                num_warps=4,
            )
    return advantages_B, zero_variance_B.bool()


def _spec(target: Target, hidden_size: int, vocab_size: int, dtype: torch.dtype) -> CompileSpec:
    return compile_spec(
        group_advantages_kernel,
        {
            "rewards": "*fp32",
            "group_ids": "*i64",
            "advantages": "*fp32",
            "zero_variance": "*u8",
            "num_responses": "i32",
            "eps": "fp32",
        },
        {"MODE": MODES.index("population"), "BLOCK": _BLOCK},
        num_warps=4,
    )


KERNELS: dict[str, SpecBuilder] = {"group_advantages": _spec}
