"""The per-token part of the policy loss: clipped surrogate and KL to a reference, with their derivatives.

The gradient with respect to the logits has two coefficients: p times a, and o at the target.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

KL_ESTIMATORS = ("k1", "k2", "k3")


class Surrogate(NamedTuple):
    """Per token: loss, importance ratio, whether the clip cut the gradient, KL estimate, d loss / d log-prob."""

    loss_T: torch.Tensor
    ratio_T: torch.Tensor
    clipped_T: torch.Tensor
    kl_T: torch.Tensor
    grad_logp_T: torch.Tensor


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
    """-w min(rho A, clip(rho) A) (SURROGATE) plus a weighted KL estimate, Schulman's k1, k2 or k3. fp32 ``[T]``."""
    zeros_T = torch.zeros_like(logp_T)
    loss_T, grad_T, kl_T, ratio_T = zeros_T, zeros_T, zeros_T, torch.ones_like(logp_T)
    clipped_T = torch.zeros_like(logp_T, dtype=torch.bool)
    if advantage_T is not None and old_logp_T is not None and loss_weight_T is not None:
        ratio_T = (logp_T - old_logp_T).exp()
        # Where min() in (SURROGATE) takes the clipped branch, and that branch is constant.
        clipped_T = ((ratio_T > 1 + clip_high) & (advantage_T > 0)) | ((ratio_T < 1 - clip_low) & (advantage_T < 0))
        unclipped_T = ratio_T * advantage_T
        clamped_T = ratio_T.clamp(1 - clip_low, 1 + clip_high) * advantage_T
        loss_T = -loss_weight_T * torch.minimum(unclipped_T, clamped_T)
        grad_T = (-loss_weight_T * unclipped_T).masked_fill(clipped_T, 0)
    if reference_logp_T is not None and kl_weight_T is not None:
        gap_T = logp_T - reference_logp_T
        if kl_estimator == "k1":
            kl_T, slope_T = gap_T, torch.ones_like(gap_T)
        elif kl_estimator == "k2":
            kl_T, slope_T = gap_T.square() / 2, gap_T
        else:
            slope_T = -torch.expm1(-gap_T)
            kl_T = gap_T - slope_T
        loss_T = loss_T + kl_weight_T * kl_T
        grad_T = grad_T + kl_weight_T * slope_T
    return Surrogate(loss_T, ratio_T, clipped_T, kl_T, grad_T)
