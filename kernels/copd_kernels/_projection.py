"""What the linear_* operations share: checks, token chunks, logits of a chunk, and gradients through the projection.

Products are taken in the dtype of the inputs, statistics in fp32 (fp64 for fp64 inputs). Only one chunk of logits
exists at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

# Logits in one chunk: 64 MiB in fp32.
_CHUNK_ELEMENTS = 2**24


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_projection(
    hidden_TD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, *, prefix: str = ""
) -> None:
    """Raise ValueError unless hidden, weight and bias make logits. ``prefix`` as in ``student_hidden_TD``."""
    hidden, weight, bias = f"{prefix}hidden_TD", f"{prefix}weight_VD", f"{prefix}bias_V"
    if hidden_TD.dim() != 2:
        raise ValueError(f"{hidden} must be [T, D], was {list(hidden_TD.shape)}")
    if not hidden_TD.is_floating_point():
        raise ValueError(f"{hidden} must be a floating dtype, was {hidden_TD.dtype}")
    if weight_VD.dim() != 2 or weight_VD.shape[1] != hidden_TD.shape[1]:
        raise ValueError(f"{weight} must be [V, D] with D = {hidden_TD.shape[1]}, was {list(weight_VD.shape)}")
    if weight_VD.shape[0] == 0:
        raise ValueError(f"{weight} must have at least one row, was {list(weight_VD.shape)}")
    if weight_VD.dtype != hidden_TD.dtype:
        raise ValueError(f"{weight} must be {hidden_TD.dtype} like {hidden}, was {weight_VD.dtype}")
    if bias_V is None:
        return
    if bias_V.shape != weight_VD.shape[:1]:
        raise ValueError(f"{bias} must be [V] with V = {weight_VD.shape[0]}, was {list(bias_V.shape)}")
    if not bias_V.is_floating_point():
        raise ValueError(f"{bias} must be a floating dtype, was {bias_V.dtype}")


def check_target(target_T: torch.Tensor, num_tokens: int, vocab_size: int) -> None:
    if target_T.shape != (num_tokens,):
        raise ValueError(f"target_T must be [T] with T = {num_tokens}, was {list(target_T.shape)}")
    if target_T.dtype != torch.int64:
        raise ValueError(f"target_T must be int64, was {target_T.dtype}")
    if num_tokens == 0:
        return
    low, high = (int(bound) for bound in target_T.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"target_T must lie in 0..{vocab_size - 1} (the vocabulary), was {low}..{high}")


def check_per_token(name: str, values_T: torch.Tensor, num_tokens: int) -> None:
    if values_T.shape != (num_tokens,):
        raise ValueError(f"{name} must be [T] with T = {num_tokens}, was {list(values_T.shape)}")
    if not values_T.is_floating_point():
        raise ValueError(f"{name} must be a floating dtype, was {values_T.dtype}")
    if values_T.requires_grad:
        raise ValueError(f"{name} must not require grad: the loss has no gradient with respect to it")


def check_temperature(temperature: float) -> None:
    # Written so that NaN fails too.
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, was {temperature}")


def resolve_chunk_tokens(chunk_tokens: int | None, vocab_size: int) -> int:
    if chunk_tokens is None:
        return max(1, _CHUNK_ELEMENTS // vocab_size)
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be >= 1, was {chunk_tokens}")
    return chunk_tokens


def token_chunks(num_tokens: int, chunk_tokens: int) -> Iterator[slice]:
    for begin in range(0, num_tokens, chunk_tokens):
        yield slice(begin, min(begin + chunk_tokens, num_tokens))


def autocast_inputs(hidden_TD: torch.Tensor, weight_VD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs in the dtype that an enclosing ``torch.autocast`` asks of a matrix product."""
    device_type = hidden_TD.device.type
    if not torch.is_autocast_enabled(device_type):
        return hidden_TD, weight_VD
    dtype = torch.get_autocast_dtype(device_type)
    return hidden_TD.to(dtype), weight_VD.to(dtype)


def without_autocast(tensor: torch.Tensor) -> torch.autocast:
    """Autograd functions choose their dtypes themselves, in backward as in forward."""
    return torch.autocast(tensor.device.type, enabled=False)


def chunk_logits(
    hidden_CD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, temperature: float
) -> torch.Tensor:
    """Logits of one chunk of C tokens at the temperature, in the statistics dtype; a buffer of the caller's own."""
    logits_CV = (hidden_CD @ weight_VD.T).to(statistics_dtype(hidden_CD.dtype))
    if bias_V is not None:
        logits_CV += bias_V
    if temperature != 1.0:
        logits_CV /= temperature
    return logits_CV


class ProjectionGradient:
    """Gradients of hidden, weight and bias, summed over chunks of the gradient of the logits.

    The sums over tokens (weight, bias) are kept in the statistics dtype: thousands of bf16 additions would lose them.
    A gradient that is not ``wanted`` costs nothing and is None.
    """

    def __init__(
        self, hidden_TD: torch.Tensor, weight_VD: torch.Tensor, temperature: float, wanted: tuple[bool, bool, bool]
    ) -> None:
        self._hidden_TD, self._weight_VD, self._temperature = hidden_TD, weight_VD, temperature
        dtype = statistics_dtype(hidden_TD.dtype)
        self.hidden_TD = torch.empty_like(hidden_TD) if wanted[0] else None
        self.weight_VD = hidden_TD.new_zeros(weight_VD.shape, dtype=dtype) if wanted[1] else None
        self.bias_V = hidden_TD.new_zeros(weight_VD.shape[0], dtype=dtype) if wanted[2] else None

    def add(self, rows: slice, grad_logits_CV: torch.Tensor) -> None:
        """Add the chunk ``rows``; the gradient is with respect to the logits after the temperature. Overwrites it."""
        if self._temperature != 1.0:
            grad_logits_CV /= self._temperature
        if self.bias_V is not None:
            self.bias_V += grad_logits_CV.sum(0)
        grad_CV = grad_logits_CV.to(self._hidden_TD.dtype)
        if self.hidden_TD is not None:
            torch.mm(grad_CV, self._weight_VD, out=self.hidden_TD[rows])
        if self.weight_VD is None:
            return
        if self.weight_VD.dtype == grad_CV.dtype:
            self.weight_VD.addmm_(grad_CV.T, self._hidden_TD[rows])
        else:
            self.weight_VD += grad_CV.T @ self._hidden_TD[rows]
