"""What the drivers and the row operations pass to each other."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Head(NamedTuple):
    """A projection to logits: hidden states ``[T, D]``, lm_head weight ``[V, D]``, bias ``[V]`` or None."""

    hidden_TD: torch.Tensor
    weight_VD: torch.Tensor
    bias_V: torch.Tensor | None


# Which of hidden, weight and bias need a gradient, and these gradients, None where not wanted.
Wanted = tuple[bool, bool, bool]
Gradients = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
