"""Log-prob, entropy and lse of chosen tokens from hidden states and lm_head."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from copd_kernels import _projection as projection


class LogProb(NamedTuple):
    """Per token: log-prob of the target, entropy of the whole distribution (nats), log-sum-exp of the logits."""

    logp_T: torch.Tensor
    entropy_T: torch.Tensor
    lse_T: torch.Tensor


class _LinearLogProb(torch.autograd.Function):
    """Keeps the per-token statistics only; backward projects each chunk again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        target_T: torch.Tensor,
        temperature: float,
        chunk_tokens: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        num_tokens = hidden_TD.shape[0]
        dtype = projection.statistics_dtype(hidden_TD.dtype)
        logp_T, entropy_T, lse_T = hidden_TD.new_empty((3, num_tokens), dtype=dtype).unbind()
        with projection.without_autocast(hidden_TD):
            for rows in projection.token_chunks(num_tokens, chunk_tokens):
                logits_CV = projection.chunk_logits(hidden_TD[rows], weight_VD, bias_V, temperature)
                lse_C = logits_CV.logsumexp(-1)
                logp_CV = logits_CV.sub_(lse_C[:, None])
                logp_T[rows] = logp_CV.gather(-1, target_T[rows, None]).squeeze(-1)
                lse_T[rows] = lse_C
                # entr(p) = -p log p, and 0 at p = 0.
                entropy_T[rows] = torch.special.entr(logp_CV.exp_()).sum(-1)
        ctx.save_for_backward(hidden_TD, weight_VD, bias_V, target_T, entropy_T, lse_T)
        ctx.temperature, ctx.chunk_tokens = temperature, chunk_tokens
        ctx.set_materialize_grads(False)
        return logp_T, entropy_T, lse_T

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logp_T: torch.Tensor | None, grad_entropy_T: torch.Tensor | None, grad_lse_T: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        hidden_TD, weight_VD, bias_V, target_T, entropy_T, lse_T = ctx.saved_tensors
        zeros_T = torch.zeros_like(lse_T)
        grad_logp_T = zeros_T if grad_logp_T is None else grad_logp_T
        grad_lse_T = zeros_T if grad_lse_T is None else grad_lse_T
        gradient = projection.ProjectionGradient(hidden_TD, weight_VD, ctx.temperature, ctx.needs_input_grad[:3])
        with projection.without_autocast(hidden_TD):
            for rows in projection.token_chunks(hidden_TD.shape[0], ctx.chunk_tokens):
                logits_CV = projection.chunk_logits(hidden_TD[rows], weight_VD, bias_V, ctx.temperature)
                logp_CV = logits_CV.sub_(lse_T[rows, None])
                grad_CV = logp_CV.exp()
                # d lse = p, d logp = onehot - p, d entropy = -p (log p + entropy)
                if grad_entropy_T is None:
                    grad_CV *= (grad_lse_T[rows] - grad_logp_T[rows])[:, None]
                else:
                    # exp() is exactly 0 far above this bound: it only keeps 0 * -inf from becoming NaN.
                    factor_CV = logp_CV.clamp_(min=-1e4).add_(entropy_T[rows, None]).mul_(-grad_entropy_T[rows, None])
                    grad_CV *= factor_CV.add_((grad_lse_T[rows] - grad_logp_T[rows])[:, None])
                grad_CV.scatter_add_(-1, target_T[rows, None], grad_logp_T[rows, None])
                gradient.add(rows, grad_CV)
        grad_weight_VD = None if gradient.weight_VD is None else gradient.weight_VD.to(weight_VD.dtype)
        grad_bias_V = None if gradient.bias_V is None else gradient.bias_V.to(bias_V.dtype)
        return gradient.hidden_TD, grad_weight_VD, grad_bias_V, None, None, None


def linear_logprob(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    target_T: torch.Tensor,
    *,
    bias_V: torch.Tensor | None = None,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
) -> LogProb:
    """Statistics of ``softmax((hidden @ weight.T + bias) / temperature)``: log pi(y_t) of (RATIO), arXiv 2604.27083.

    ``hidden_TD`` ``[T, D]`` and ``weight_VD`` ``[V, D]`` of one floating dtype, in which the products are taken;
    ``target_T`` int64 ``[T]`` in 0..V-1; ``bias_V`` ``[V]``. Returns fp32 ``[T]`` tensors (fp64 for fp64 inputs), each
    differentiable once with respect to hidden, weight and bias. ``chunk_tokens`` tokens are projected at a time
    (default: about 2^24 logits), so memory does not grow with T·V. NaN in a hidden row gives NaN for that token.

    Raises ValueError on a wrong rank, size or dtype, a target outside the vocabulary, or temperature <= 0.
    """
    hidden_TD, weight_VD = projection.autocast_inputs(hidden_TD, weight_VD)
    projection.check_projection(hidden_TD, weight_VD, bias_V)
    projection.check_target(target_T, hidden_TD.shape[0], weight_VD.shape[0])
    projection.check_temperature(temperature)
    chunk = projection.resolve_chunk_tokens(chunk_tokens, weight_VD.shape[0])
    return LogProb(*_LinearLogProb.apply(hidden_TD, weight_VD, bias_V, target_T, temperature, chunk))
