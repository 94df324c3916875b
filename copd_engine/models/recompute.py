"""Gradient checkpointing: layers keep their input and compute their activations again in backward.

transformers does it for layers in training mode. Our models stay in eval mode (no dropout), so the layers' own flag is
raised for the duration of a forward; the modules inside them stay in eval mode.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer


def enable_recompute(module: nn.Module) -> None:
    """Mark every decoder and vision layer of ``module``; it acts within :func:`recompute_layers` only."""
    for layer in module.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.gradient_checkpointing = True
            # Nothing is random in a layer, so no generator's state needs to be kept.
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


@contextmanager
def recompute_layers(module: nn.Module, active: bool) -> Iterator[None]:
    """Marked layers called inside save their input alone if ``active``, and run as always otherwise.

    transformers drops the key/value cache of such a layer, so ``active`` must be false where one is passed.
    """
    marked = [m for m in module.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing]
    try:
        for layer in marked:
            layer.training = active
        yield
    finally:
        for layer in marked:
            layer.training = False
