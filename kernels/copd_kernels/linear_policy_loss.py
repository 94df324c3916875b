"""The trainer's operation: the clipped surrogate from hidden states and lm_head, gradients computed in forward."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from copd_kernels import _projection as projection


class PolicyLoss(NamedTuple):
    """The scalar loss, and per token without grad: log-prob, entropy, ratio, whether the clip cut it, its loss."""

    loss: torch.Tensor
    logp_T: torch.Tensor
    entropy_T: torch.Tensor
    ratio_T: torch.Tensor
    clipped_T: torch.Tensor
    loss_T: torch.Tensor


class _LinearPolicyLoss(torch.autograd.Function):
    """One projection per chunk serves the statistics and the gradients; backward only scales."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        target_T: torch.Tensor,
        advantage_T: torch.Tensor,
        old_logp_T: torch.Tensor,
        loss_weight_T: torch.Tensor,
        clip_low: float,
        clip_high: float,
        temperature: float,
        chunk_tokens: int,
        wanted: tuple[bool, bool, bool],
    ) -> tuple[torch.Tensor, ...]:
        num_tokens = hidden_TD.shape[0]
        dtype = projection.statistics_dtype(hidden_TD.dtype)
        advantage_T, old_logp_T, loss_weight_T = (x.to(dtype) for x in (advantage_T, old_logp_T, loss_weight_T))
        logp_T, entropy_T, ratio_T = hidden_TD.new_empty((3, num_tokens), dtype=dtype).unbind()
        clipped_T = hidden_TD.new_empty(num_tokens, dtype=torch.bool)
        gradient = projection.ProjectionGradient(hidden_TD, weight_VD, temperature, wanted)
        with projection.without_autocast(hidden_TD):
            for rows in projection.token_chunks(num_tokens, chunk_tokens):
                logits_CV = projection.chunk_logits(hidden_TD[rows], weight_VD, bias_V, temperature)
                logp_CV = logits_CV.sub_(logits_CV.logsumexp(-1, keepdim=True))
                logp_C = logp_CV.gather(-1, target_T[rows, None]).squeeze(-1)
                ratio_C = (logp_C - old_logp_T[rows]).exp()
                advantage_C = advantage_T[rows]
                # Where min() in (SURROGATE) takes the clipped branch, and that branch is constant.
                clipped_C = ((ratio_C > 1 + clip_high) & (advantage_C > 0)) | (
                    (ratio_C < 1 - clip_low) & (advantage_C < 0)
                )
                prob_CV = logp_CV.exp_()
                logp_T[rows], ratio_T[rows], clipped_T[rows] = logp_C, ratio_C, clipped_C
                entropy_T[rows] = torch.special.entr(prob_CV).sum(-1)
                if any(wanted):
                    # d loss / d logits = -w A rho (onehot - p)
                    scale_C = (loss_weight_T[rows] * advantage_C * ratio_C).masked_fill_(clipped_C, 0)
                    grad_CV = prob_CV.mul_(scale_C[:, None])
                    grad_CV.scatter_add_(-1, target_T[rows, None], -scale_C[:, None])
                    gradient.add(rows, grad_CV)
        unclipped_T = ratio_T * advantage_T
        surrogate_T = torch.minimum(unclipped_T, ratio_T.clamp(1 - clip_low, 1 + clip_high) * advantage_T)
        loss_T = -loss_weight_T * surrogate_T
        ctx.save_for_backward(gradient.hidden_TD, gradient.weight_VD, gradient.bias_V)
        ctx.dtypes = (hidden_TD.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype)
        ctx.mark_non_differentiable(logp_T, entropy_T, ratio_T, clipped_T, loss_T)
        return loss_T.sum(), logp_T, entropy_T, ratio_T, clipped_T, loss_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor, *_: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        gradients = (
            None if gradient is None else (gradient * grad_loss).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*gradients, *(None,) * 9)


def linear_policy_loss(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    target_T: torch.Tensor,
    *,
    advantage_T: torch.Tensor,
    old_logp_T: torch.Tensor,
    loss_weight_T: torch.Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    bias_V: torch.Tensor | None = None,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
) -> PolicyLoss:
    """``-sum_t w_t min(rho_t A_t, clip(rho_t, 1 - clip_low, 1 + clip_high) A_t)``: (SURROGATE), arXiv 2604.27083.

    rho_t = exp(logp_t - old_logp_t) is (RATIO). ``advantage_T`` is any per-token advantage, (GRPO-ADV) or (OPD-ADV);
    ``loss_weight_T`` holds the normalisation, 1 / (G |y_i|) times the weight of the term. Both, like ``old_logp_T``,
    are floating ``[T]`` without grad. The other arguments are those of :func:`copd_kernels.linear_logprob`.

    Returns the scalar ``loss`` in fp32 (fp64 for fp64 inputs), differentiable once with respect to hidden, weight and
    bias, and detached ``[T]`` tensors: ``logp_T``, ``entropy_T``, ``ratio_T`` and ``loss_T`` (whose sum is the loss) of
    its dtype, ``clipped_T`` bool, True where the token's gradient is cut: rho > 1 + clip_high with A > 0, or
    rho < 1 - clip_low with A < 0. A frozen weight costs nothing. NaN in a hidden row gives a NaN loss.

    Raises ValueError on a wrong rank, size or dtype, a per-token argument that requires grad, a target outside the
    vocabulary, temperature <= 0, clip_low outside [0, 1] or clip_high < 0.
    """
    hidden_TD, weight_VD = projection.autocast_inputs(hidden_TD, weight_VD)
    projection.check_projection(hidden_TD, weight_VD, bias_V)
    num_tokens = hidden_TD.shape[0]
    projection.check_target(target_T, num_tokens, weight_VD.shape[0])
    projection.check_per_token("advantage_T", advantage_T, num_tokens)
    projection.check_per_token("old_logp_T", old_logp_T, num_tokens)
    projection.check_per_token("loss_weight_T", loss_weight_T, num_tokens)
    projection.check_temperature(temperature)
    if not 0 <= clip_low <= 1:
        raise ValueError(f"clip_low must lie in [0, 1], was {clip_low}")
    if not clip_high >= 0:
        raise ValueError(f"clip_high must be >= 0, was {clip_high}")
    # Inside forward grad mode is off, so what will be asked of backward has to be read here.
    wanted = tuple(
        torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden_TD, weight_VD, bias_V)
    )
    chunk = projection.resolve_chunk_tokens(chunk_tokens, weight_VD.shape[0])
    outputs = _LinearPolicyLoss.apply(
        hidden_TD,
        weight_VD,
        bias_V,
        target_T,
        advantage_T,
        old_logp_T,
        loss_weight_T,
        clip_low,
        clip_high,
        temperature,
        chunk,
        wanted,
    )
    return PolicyLoss(*outputs)
