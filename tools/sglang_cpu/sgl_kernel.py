"""A stand-in for the package sgl_kernel, whose library needs a CUDA driver to be imported at all.

On a machine without a GPU sglang imports the module and calls none of its kernels. ``convert_weight_packed`` must stay
undefined: its presence switches the AMX kernels on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__version__ = "0.4.0"
__path__: list[str] = []

# Names of torch.ops that sglang's modules look up when they are imported.
for _name in (
    "fused_sigmoid_mul_cpu",
    "fused_qk_gemma_rmsnorm_cpu",
    "fused_qk_gemma_rmsnorm_with_gate_cpu",
    "fused_qkvzba_split_reshape_cat_contiguous_cpu",
):
    torch.library.define(f"sgl_kernel::{_name}", "(Tensor a, Tensor b) -> Tensor")


def __getattr__(name: str) -> Callable[..., Any]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"sgl_kernel.{name} needs a GPU: this is the stand-in of tools/sglang_cpu")

    return missing
