"""Liger's Triton kernels (arXiv 2410.10989) for RMSNorm, SwiGLU and RoPE of a model's layers, on CUDA.

The only file that replaces functions of other packages. Norms and MLPs are replaced in the given model alone. RoPE is a
function of transformers' module that all models of a type share: its replacement runs Liger on CUDA tensors and
transformers' own elsewhere. Liger's loss is never used, because the loss is this project's own kernel. Expert MLPs of
mixture-of-experts models keep transformers' grouped matrix products.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import sys
from typing import Any, Literal

import torch
from torch import nn

from copd_engine.types import UserError


def resolve_liger(choice: Literal["auto"] | bool, device: torch.device) -> bool:
    """Whether a model on ``device`` runs Liger's kernels; UserError where ``choice`` is true and it cannot."""
    installed = importlib.util.find_spec("liger_kernel") is not None
    if choice is True and device.type != "cuda":
        raise UserError(f"model.liger = true: its kernels run on CUDA, the device is {str(device)!r}")
    if choice is True and not installed:
        raise UserError("model.liger = true needs the package liger-kernel: install the extra 'gpu'")
    return choice is True or (choice == "auto" and installed and device.type == "cuda")


def apply_liger(module: nn.Module, backbone: nn.Module) -> str:
    """Replace norms and MLPs of ``module`` and its ``backbone``'s RoPE; returns what was replaced, in words."""
    from liger_kernel.transformers import LigerSwiGLUMLP
    from liger_kernel.transformers.monkey_patch import _patch_rms_norm_module, _patch_swiglu_module

    num_norms = num_mlps = 0
    for part in module.modules():
        if type(part).__name__.endswith("RMSNorm"):
            _patch_rms_norm_module(part)
            num_norms += 1
        elif _is_swiglu(part):
            _patch_swiglu_module(part, LigerSwiGLUMLP)
            num_mlps += 1
    _replace_rope(sys.modules[type(backbone).__module__])
    version = importlib.metadata.version("liger-kernel")
    return f"Liger {version}: {num_norms} RMSNorm, {num_mlps} SwiGLU, RoPE"


def _is_swiglu(part: nn.Module) -> bool:
    names = ("gate_proj", "up_proj", "down_proj")
    if not all(isinstance(getattr(part, name, None), nn.Module) for name in names):
        return False
    probe, activation = torch.linspace(-3, 3, 7), getattr(part, "act_fn", None)
    return callable(activation) and torch.equal(activation(probe), nn.functional.silu(probe))


@functools.cache  # once per module of transformers, or a second model would wrap the replacement
def _replace_rope(modeling: Any) -> None:
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    plain = modeling.apply_rotary_pos_emb

    @functools.wraps(plain)
    def rope(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1) -> Any:
        if q.is_cuda and unsqueeze_dim == 1:
            return liger_rotary_pos_emb(q, k, cos, sin)
        return plain(q, k, cos, sin, unsqueeze_dim)

    modeling.apply_rotary_pos_emb = rope
