"""Which driver computes, and what every operation does around it: cut the vocabulary, compact and scatter tokens."""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable

import torch

from copd_kernels import _checks, _driver, _surrogate
from copd_kernels._surrogate import Surrogate
from copd_kernels._types import Gradients, Head


def gpu_module(name: str, device: torch.device) -> types.ModuleType:
    """A module of Triton kernels. Triton is imported here, when a GPU's tensors come, and not before."""
    try:
        return importlib.import_module(f"copd_kernels.gpu.{name}")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"copd_kernels on {device} needs {error.name}; install copd-engine[gpu]") from error


def driver(device: torch.device) -> types.ModuleType:
    """The Triton driver for CUDA (and ROCm) tensors, else the one of the CPU."""
    return gpu_module("driver", device) if device.type == "cuda" else _driver


def surrogate(device: torch.device) -> Callable[..., Surrogate]:
    """:func:`copd_kernels._surrogate.surrogate`, or one launch that computes the same."""
    if device.type != "cuda":
        return _surrogate.surrogate
    fused: Callable[..., Surrogate] = gpu_module("surrogate", device).surrogate
    return fused


def autocast_head(head: Head) -> Head:
    """The head in the dtype that an enclosing ``torch.autocast`` asks of a matrix product."""
    device_type = head.hidden_TD.device.type
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        return head
    if head.hidden_TD.dtype == torch.float64:
        # As torch.mm does: autocast leaves fp64 alone.
        return head
    dtype = torch.get_autocast_dtype(device_type)
    return Head(head.hidden_TD.to(dtype), head.weight_VD.to(dtype), head.bias_V)


class Tokens:
    """The tokens that count. The others cost nothing: they are left out, and hold 0 in every result."""

    def __init__(self, mask_T: torch.Tensor | None) -> None:
        self._index = None if mask_T is None else mask_T.nonzero()[:, 0]
        self._num_tokens = 0 if mask_T is None else mask_T.shape[0]

    def take(self, values_T: torch.Tensor) -> torch.Tensor:
        """Rows of ``[T, ...]``."""
        return values_T.contiguous() if self._index is None else values_T.index_select(0, self._index)

    def take_last(self, values_FT: torch.Tensor) -> torch.Tensor:
        return values_FT.contiguous() if self._index is None else values_FT.index_select(-1, self._index)

    def put(self, values_T: torch.Tensor) -> torch.Tensor:
        """Back to ``[T, ...]``."""
        if self._index is None:
            return values_T
        return values_T.new_zeros(self._num_tokens, *values_T.shape[1:]).index_copy_(0, self._index, values_T)

    def put_last(self, values_FT: torch.Tensor) -> torch.Tensor:
        if self._index is None:
            return values_FT
        return values_FT.new_zeros(*values_FT.shape[:-1], self._num_tokens).index_copy_(-1, self._index, values_FT)

    def head(self, head: Head, vocab_size: int, *, name: str) -> Head:
        """The head without tokens that do not count and vocabulary entries that do not exist."""
        hidden_TD = self.take(head.hidden_TD)
        _checks.check_finite(name, hidden_TD)
        bias_V = None if head.bias_V is None else head.bias_V[:vocab_size]
        return Head(hidden_TD, head.weight_VD[:vocab_size].contiguous(), bias_V)


def pad_gradients(
    gradients: Gradients, tokens: Tokens, weight_VD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients in the shapes of the inputs: 0 for what was left out, empty for what is not wanted."""
    hidden, weight, bias = gradients
    padding = weight_VD.shape[0] - (weight if weight is not None else bias if bias is not None else weight_VD).shape[0]
    if padding and weight is not None:
        weight = torch.nn.functional.pad(weight, (0, 0, 0, padding))
    if padding and bias is not None:
        bias = torch.nn.functional.pad(bias, (0, padding))
    # An operation may not return one tensor twice, so every absent gradient is an empty tensor of its own.
    return (
        weight_VD.new_empty(0) if hidden is None else tokens.put(hidden),
        weight_VD.new_empty(0) if weight is None else weight,
        weight_VD.new_empty(0) if bias is None else bias,
    )


def fake_gradients(head: Head, wanted: list[bool]) -> tuple[torch.Tensor, ...]:
    """Shapes and dtypes of :func:`pad_gradients`."""
    empty = head.weight_VD.new_empty
    return tuple(
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if want and tensor is not None else empty(0)
        for tensor, want in zip(head, wanted, strict=True)
    )


def wanted_gradients(head: Head) -> list[bool]:
    """Which gradients backward will be asked for; inside an operation grad mode is off, so it is read outside."""
    grad = torch.is_grad_enabled()
    return [grad and tensor is not None and tensor.requires_grad for tensor in head]
