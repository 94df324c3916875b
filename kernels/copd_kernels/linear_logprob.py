"""Log-prob, entropy and lse of chosen tokens from hidden states and lm_head."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from copd_kernels import _backend, _checks, _driver, statistics
from copd_kernels._types import Head


class LogProb(NamedTuple):
    """Per token: log-prob of the target, entropy of the whole distribution (nats), log-sum-exp of the logits."""

    logp_T: torch.Tensor
    entropy_T: torch.Tensor
    lse_T: torch.Tensor


@torch.library.custom_op("copd_kernels::linear_logprob", mutates_args=())
def _linear_logprob(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    target_T: torch.Tensor,
    mask_T: torch.Tensor | None,
    vocab_size: int,
    temperature: float,
    softcap: float,
    chunk_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``[3, T]``: log-prob, entropy, lse; and the statistics ``[4, T]`` that backward wants."""
    tokens = _backend.Tokens(mask_T)
    head = tokens.head(Head(hidden_TD, weight_VD, bias_V), vocab_size, name="hidden_TD")
    target_T = tokens.take(target_T)
    _checks.check_target_values(target_T, vocab_size)
    stats_4T = _backend.driver(hidden_TD.device).single_statistics(
        head, target_T, temperature=temperature, softcap=softcap, chunk_tokens=chunk_tokens
    )
    return tokens.put_last(torch.stack(statistics.head_finals(stats_4T))), tokens.put_last(stats_4T)


@_linear_logprob.register_fake
def _(
    hidden_TD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, *_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = _driver.statistics_dtype(Head(hidden_TD, weight_VD, bias_V))
    num_tokens = hidden_TD.shape[0]
    return hidden_TD.new_empty((3, num_tokens), dtype=dtype), hidden_TD.new_empty((4, num_tokens), dtype=dtype)


@torch.library.custom_op("copd_kernels::linear_logprob_backward", mutates_args=())
def _linear_logprob_backward(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    target_T: torch.Tensor,
    mask_T: torch.Tensor | None,
    stats_4T: torch.Tensor,
    grad_3T: torch.Tensor,
    vocab_size: int,
    temperature: float,
    softcap: float,
    chunk_tokens: int,
    wanted: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens = _backend.Tokens(mask_T)
    head = tokens.head(Head(hidden_TD, weight_VD, bias_V), vocab_size, name="hidden_TD")
    logp, entropy, lse = tokens.take_last(grad_3T)
    # d lse = p, d logp = onehot - p, d entropy = -p (log p + entropy)
    coefs_3T = torch.stack([lse - logp, -entropy, logp])
    gradients = _backend.driver(hidden_TD.device).single_gradient(
        head,
        tokens.take(target_T),
        tokens.take_last(stats_4T),
        coefs_3T,
        temperature=temperature,
        softcap=softcap,
        wanted=tuple(wanted),
        chunk_tokens=chunk_tokens,
    )
    return _backend.pad_gradients(gradients, tokens, weight_VD)


@_linear_logprob_backward.register_fake
def _(
    hidden_TD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, *arguments: Any
) -> tuple[torch.Tensor, ...]:
    return _backend.fake_gradients(Head(hidden_TD, weight_VD, bias_V), arguments[-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *tensors, vocab_size, temperature, softcap, chunk_tokens = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])
    ctx.arguments = (vocab_size, temperature, softcap, chunk_tokens)


def _backward(ctx: Any, grad_3T: torch.Tensor, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:3])
    gradients = _linear_logprob_backward(*ctx.saved_tensors, grad_3T, *ctx.arguments, wanted)
    return (*(gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)), *(None,) * 6)


_linear_logprob.register_autograd(_backward, setup_context=_setup_context)


def linear_logprob(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    target_T: torch.Tensor,
    *,
    bias_V: torch.Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    mask_T: torch.Tensor | None = None,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
) -> LogProb:
    """Statistics of softmax(cap(hidden @ weight.T + bias) / temperature): log pi(y_t) of (RATIO), arXiv 2604.27083.

    ``hidden_TD`` ``[T, D]`` and ``weight_VD`` ``[V, D]`` of one floating dtype; products are summed up in fp32 (fp64
    for fp64 inputs) and never rounded to 16 bits. ``target_T`` int64 ``[T]`` in 0..V-1; ``bias_V`` ``[V]``;
    ``softcap`` c: cap(x) = c tanh(x / c), before the temperature. ``mask_T`` bool ``[T]``: tokens where it is False
    cost nothing, their targets may be anything, and their results are 0. ``vocab_size``: rows of the weight from there
    on are padding, with probability 0. ``chunk_tokens``: tokens that are projected at a time; no buffer is [T, V].

    Returns fp32 ``[T]`` tensors (fp64 for fp64 inputs), each differentiable once with respect to hidden, weight and
    bias; backward projects again. Log-probs are never positive. Under ``torch.autocast`` inputs are taken in its dtype.

    Raises ValueError on a wrong rank, size, dtype or device, a target outside the vocabulary, temperature or softcap
    <= 0, and, on a CPU, hidden states that are not finite (on a GPU these give NaN for their token).
    """
    head = _backend.autocast_head(Head(hidden_TD, weight_VD, bias_V))
    _checks.check_head(head, vocab_size)
    _checks.check_target(target_T, hidden_TD)
    _checks.check_mask(mask_T, hidden_TD)
    _checks.check_scale(temperature, softcap)
    _checks.check_chunk_tokens(chunk_tokens)
    columns_3T, _ = _linear_logprob(
        *head,
        target_T,
        mask_T,
        vocab_size or weight_VD.shape[0],
        float(temperature),
        float(softcap or 0),
        chunk_tokens or 0,
    )
    return LogProb(*columns_3T.unbind())
