# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton has no types for what a kernel takes.
"""The clipped surrogate and the penalty to a reference policy: one elementwise launch over the tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from copd_kernels._surrogate import KL_ESTIMATORS, Surrogate
from copd_kernels.gpu.logits import expm1, expm1_minus
from copd_kernels.gpu.specs import compile_spec
from copd_kernels.gpu.targets import CompileSpec, SpecBuilder, Target, on_device

_BLOCK = 512


@triton.jit
def surrogate_kernel(
    logp,
    advantage,
    old_logp,
    loss_weight,
    reference_logp,
    kl_weight,
    loss,
    ratio,
    clipped,
    kl,
    grad_logp,
    num_tokens,
    clip_low,
    clip_high,
    HAS_POLICY: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Everything fp32 ``[T]`` but ``clipped``, uint8 ``[T]``; ``ESTIMATOR`` indexes ``KL_ESTIMATORS``, -1: no KL."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_tokens
    logp_T = tl.load(logp + at, mask=inside, other=0.0)
    loss_T = tl.zeros((BLOCK,), tl.float32)
    grad_T = tl.zeros((BLOCK,), tl.float32)
    kl_T = tl.zeros((BLOCK,), tl.float32)
    rho = tl.full((BLOCK,), 1.0, tl.float32)
    is_clipped = tl.zeros((BLOCK,), tl.int1)
    if HAS_POLICY:
        advantage_T = tl.load(advantage + at, mask=inside, other=0.0)
        weight_T = tl.load(loss_weight + at, mask=inside, other=0.0)
        rho = tl.exp(logp_T - tl.load(old_logp + at, mask=inside, other=0.0))
        above = (rho > 1.0 + clip_high) & (advantage_T > 0.0)
        below = (rho < 1.0 - clip_low) & (advantage_T < 0.0)
        is_clipped = above | below
        # min(rho A, clip(rho) A) is the clipped product exactly where the gradient is cut; NaN takes the other branch.
        kept = tl.where(above, 1.0 + clip_high, tl.where(below, 1.0 - clip_low, rho))
        loss_T = -weight_T * (kept * advantage_T)
        grad_T = tl.where(is_clipped, 0.0, -weight_T * (advantage_T * rho))
    if ESTIMATOR >= 0:
        kl_weight_T = tl.load(kl_weight + at, mask=inside, other=0.0)
        gap = logp_T - tl.load(reference_logp + at, mask=inside, other=0.0)
        if ESTIMATOR == 0:
            kl_T = gap
            slope = tl.full((BLOCK,), 1.0, tl.float32)
        elif ESTIMATOR == 1:
            kl_T = 0.5 * gap * gap
            slope = gap
        else:
            kl_T = expm1_minus(-gap)
            slope = -expm1(-gap)
        loss_T += kl_weight_T * kl_T
        grad_T += kl_weight_T * slope

    tl.store(loss + at, loss_T, mask=inside)
    tl.store(ratio + at, rho, mask=inside)
    tl.store(clipped + at, is_clipped.to(tl.uint8), mask=inside)
    tl.store(kl + at, kl_T, mask=inside)
    tl.store(grad_logp + at, grad_T, mask=inside)


def surrogate(
    logp_T: torch.Tensor,
    advantage_T: torch.Tensor | None,
    old_logp_T: torch.Tensor | None,
    loss_weight_T: torch.Tensor | None,
    reference_logp_T: torch.Tensor | None,
    kl_weight_T: torch.Tensor | None,
    *,
    clip_low: float,
    clip_high: float,
    kl_estimator: str,
) -> Surrogate:
    """:func:`copd_kernels._surrogate.surrogate` in one launch; everything fp32 ``[T]``."""
    has_policy = advantage_T is not None and old_logp_T is not None and loss_weight_T is not None
    has_kl = reference_logp_T is not None and kl_weight_T is not None
    inputs = [
        None if values_T is None else values_T.float().contiguous()
        for values_T in (logp_T, advantage_T, old_logp_T, loss_weight_T, reference_logp_T, kl_weight_T)
    ]
    num_tokens = logp_T.shape[0]
    loss, ratio, kl, grad_logp = (torch.empty(num_tokens, dtype=torch.float32, device=logp_T.device) for _ in range(4))
    clipped = torch.empty(num_tokens, dtype=torch.uint8, device=logp_T.device)
    if num_tokens:
        with on_device(logp_T.device):
            surrogate_kernel[(triton.cdiv(num_tokens, _BLOCK),)](
                *inputs,
                loss,
                ratio,
                clipped,
                kl,
                grad_logp,
                num_tokens,
                clip_low,
                clip_high,
                HAS_POLICY=has_policy,
                ESTIMATOR=KL_ESTIMATORS.index(kl_estimator) if has_kl else -1,
                BLOCK=_BLOCK,
                num_warps=4,
            )
    return Surrogate(loss, ratio, clipped.bool(), kl, grad_logp)


def _spec(target: Target, hidden_size: int, vocab_size: int, dtype: torch.dtype) -> CompileSpec:
    floats = ["logp", "advantage", "old_logp", "loss_weight", "reference_logp", "kl_weight"]
    floats += ["loss", "ratio", "kl", "grad_logp"]
    return compile_spec(
        surrogate_kernel,
        {
            **dict.fromkeys(floats, "*fp32"),
            "clipped": "*u8",
            "num_tokens": "i32",
            "clip_low": "fp32",
            "clip_high": "fp32",
        },
        {"HAS_POLICY": True, "ESTIMATOR": KL_ESTIMATORS.index("k3"), "BLOCK": _BLOCK},
        num_warps=4,
    )


KERNELS: dict[str, SpecBuilder] = {"surrogate": _spec}
