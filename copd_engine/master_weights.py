"""fp32 master weights of a model that computes in 16 bits.

A bf16 weight has 8 bits of precision: an update below 1/256 of it is lost in rounding, and at RL's learning rates
(1e-6) nearly every update is. The optimizer therefore steps fp32 copies, which are rounded into the model after each
step; gradients of several micro-batches are summed in fp32 too (Micikevicius et al., arXiv 1710.03740, section 3.1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn


class MasterWeights:
    """Master copies by name. A parameter that is fp32 (or wider) already is its own master: nothing is copied.

    From construction on, backward moves the gradients of 16-bit parameters into their masters' ``grad``, fp32. Clip and
    step ``tensors``, then call :meth:`round_into_model`.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = dict(parameters)
        self.tensors: dict[str, nn.Parameter] = {}
        for name, parameter in self._parameters.items():
            if parameter.dtype in (torch.float32, torch.float64):
                self.tensors[name] = parameter
            else:
                master = nn.Parameter(parameter.detach().float())
                parameter.register_post_accumulate_grad_hook(_into(master))
                self.tensors[name] = master

    @property
    def copies(self) -> frozenset[str]:
        """Names of the masters that are memory of their own."""
        return frozenset(name for name, master in self.tensors.items() if master is not self._parameters[name])

    @torch.no_grad()
    def round_into_model(self) -> None:
        """The model's weights become the masters, rounded to nearest."""
        for name, parameter in self._parameters.items():
            if self.tensors[name] is not parameter:
                parameter.copy_(self.tensors[name])


def _into(master: nn.Parameter) -> Callable[[torch.Tensor], None]:
    def move(parameter: torch.Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        if master.grad is None:
            master.grad = gradient.float()
        else:
            master.grad.add_(gradient)

    return move
