"""The clipped surrogate and the penalty to a reference policy: one elementwise launch over the tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from copd_kernels.gpu.logits import expm1, expm1_minus
from copd_kernels.gpu.specs import compile_spec
from copd_kernels.gpu.targets import CompileSpec, SpecBuilder, Target

KINDS = ("k1", "k2", "k3")
_BLOCK = 512


class Surrogate(NamedTuple):
    """Per token, fp32 ``[T]``. ``a_T`` and ``o_T`` are row coefficients of the gradient of the logits, p·a + o·onehot.

    ``clipped_T`` is bool; ``kl_T`` the estimate of the KL to the reference, 0 without one.
    """

    loss_T: torch.Tensor
    ratio_T: torch.Tensor
    clipped_T: torch.Tensor
    kl_T: torch.Tensor
    a_T: torch.Tensor
    o_T: torch.Tensor


@triton.jit
def surrogate_kernel(
    logp,
    advantage,
    old_logp,
    policy_weight,
    ref_logp,
    kl_weight,
    loss,
    ratio,
    clipped,
    kl,
    a,
    o,
    num_tokens,
    clip_low,
    clip_high,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Everything fp32 ``[T]`` but ``clipped``, uint8 ``[T]``; ``KIND`` indexes ``KINDS``, -1: no reference."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_tokens
    logp_T = tl.load(logp + at, mask=inside, other=0.0)
    advantage_T = tl.load(advantage + at, mask=inside, other=0.0)
    weight_T = tl.load(policy_weight + at, mask=inside, other=0.0)
    rho = tl.exp(logp_T - tl.load(old_logp + at, mask=inside, other=0.0))

    above = (rho > 1.0 + clip_high) & (advantage_T > 0.0)
    below = (rho < 1.0 - clip_low) & (advantage_T < 0.0)
    is_clipped = above | below
    # min(rho A, clip(rho) A) is the clipped product exactly where the gradient is cut; a NaN takes the other branch.
    kept = tl.where(above, 1.0 + clip_high, tl.where(below, 1.0 - clip_low, rho))
    loss_T = -weight_T * (kept * advantage_T)
    a_T = tl.where(is_clipped, 0.0, weight_T * (advantage_T * rho))

    kl_T = tl.zeros((BLOCK,), tl.float32)
    if KIND >= 0:
        kl_weight_T = tl.load(kl_weight + at, mask=inside, other=0.0)
        gap = tl.load(ref_logp + at, mask=inside, other=0.0) - logp_T
        if KIND == 0:
            kl_T = -gap
            slope = tl.full((BLOCK,), 1.0, tl.float32)
        elif KIND == 1:
            kl_T = 0.5 * gap * gap
            slope = -gap
        else:
            kl_T = expm1_minus(gap)
            slope = -expm1(gap)
        loss_T += kl_weight_T * kl_T
        a_T -= kl_weight_T * slope

    tl.store(loss + at, loss_T, mask=inside)
    tl.store(ratio + at, rho, mask=inside)
    tl.store(clipped + at, is_clipped.to(tl.uint8), mask=inside)
    tl.store(kl + at, kl_T, mask=inside)
    tl.store(a + at, a_T, mask=inside)
    # Both terms are functions of the target's log-prob alone, whose gradient is onehot - p.
    tl.store(o + at, -a_T, mask=inside)


def surrogate(
    logp_T: torch.Tensor,
    advantage_T: torch.Tensor,
    old_logp_T: torch.Tensor,
    policy_weight_T: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
    ref_logp_T: torch.Tensor | None = None,
    kl_weight_T: torch.Tensor | None = None,
    kind: str = "k3",
) -> Surrogate:
    """Loss, ratio, clip flag, KL to the reference and gradient coefficients of each token; inputs floating ``[T]``.

    rho = exp(logp - old); loss = -w·min(rho·A, clip(rho, 1 - clip_low, 1 + clip_high)·A) + kl_weight·kl, with kl by
    ``kind`` (Schulman, "Approximating KL divergence"): k1 logp - ref, k2 (logp - ref)²/2, k3 exp(ref - logp) - 1 -
    (ref - logp). Raises ValueError on an unknown kind, or one of reference and ``kl_weight_T`` without the other.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, was {kind!r}")
    if (ref_logp_T is None) != (kl_weight_T is None):
        raise ValueError("ref_logp_T and kl_weight_T must be given together")
    inputs = [
        None if tensor is None else tensor.float().contiguous()
        for tensor in (logp_T, advantage_T, old_logp_T, policy_weight_T, ref_logp_T, kl_weight_T)
    ]
    num_tokens = logp_T.shape[0]
    loss, ratio, kl, a, o = (torch.empty(num_tokens, dtype=torch.float32, device=logp_T.device) for _ in range(5))
    clipped = torch.empty(num_tokens, dtype=torch.uint8, device=logp_T.device)
    if num_tokens:
        surrogate_kernel[(triton.cdiv(num_tokens, _BLOCK),)](
            *inputs,
            loss,
            ratio,
            clipped,
            kl,
            a,
            o,
            num_tokens,
            clip_low,
            clip_high,
            KIND=-1 if ref_logp_T is None else KINDS.index(kind),
            BLOCK=_BLOCK,
            num_warps=4,
        )
    return Surrogate(loss, ratio, clipped.bool(), kl, a, o)


def _spec(target: Target, hidden_size: int, vocab_size: int, dtype: torch.dtype) -> CompileSpec:
    floats = ("logp", "advantage", "old_logp", "policy_weight", "ref_logp", "kl_weight")
    floats += ("loss", "ratio", "kl", "a", "o")
    return compile_spec(
        surrogate_kernel,
        {
            **dict.fromkeys(floats, "*fp32"),
            "clipped": "*u8",
            "num_tokens": "i32",
            "clip_low": "fp32",
            "clip_high": "fp32",
        },
        {"KIND": KINDS.index("k3"), "BLOCK": _BLOCK},
        num_warps=4,
    )


KERNELS: dict[str, SpecBuilder] = {"surrogate": _spec}
