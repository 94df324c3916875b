"""flash-attn, where it is installed: which version, and the choice between it and scaled dot-product attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

import torch

from copd_engine.types import UserError

Backend = Literal["flash", "sdpa"]
#: flash-attn has no kernels for other dtypes.
FLASH_DTYPES = (torch.bfloat16, torch.float16)


def resolve_attention(choice: str, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Backend:
    """What ``model.attention`` means on ``device`` for a model that computes in ``dtype``.

    auto: flash on CUDA in bf16 or fp16 where flash-attn is installed, else sdpa. UserError for ``flash`` where it
    cannot run.
    """
    if choice not in ("auto", "flash", "sdpa"):
        raise UserError(f"model.attention = {choice!r}: must be auto, flash or sdpa")
    if choice == "sdpa":
        return "sdpa"
    reason = None
    if device.type != "cuda":
        reason = f"flash-attn runs on CUDA, the model is on {device.type}: set model.attention=sdpa"
    elif flash_module(device) is None:
        reason = "flash-attn is not installed: pip install 'copd-engine[gpu]', or set model.attention=sdpa"
    elif dtype not in FLASH_DTYPES:
        name = str(dtype).removeprefix("torch.")
        reason = (
            f"flash-attn computes in bfloat16, the model in {name}: set model.dtype=bfloat16 or model.attention=sdpa"
        )
    if reason is None:
        return "flash"
    if choice == "flash":
        raise UserError(f"model.attention = 'flash': {reason}")
    return "sdpa"


def flash_module(device: torch.device) -> str | None:
    """The module that holds ``flash_attn_varlen_func``: flash-attn 3 on Hopper where installed, else 2, else None."""
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability(device)[0] == 9
    if hopper and find_spec("flash_attn_interface") is not None:
        return "flash_attn_interface"
    return "flash_attn" if find_spec("flash_attn") is not None else None


@cache
def varlen_kernel(device: torch.device) -> Callable[..., Any]:
    """``flash_attn_varlen_func`` of :func:`flash_module`. UserError where none is installed, or one too old."""
    name = flash_module(device)
    if name is None:
        raise UserError("flash-attn is not installed: pip install 'copd-engine[gpu]', or set model.attention=sdpa")
    module = import_module(name)
    if name == "flash_attn":
        check_version(module.__version__)
    kernel: Callable[..., Any] = module.flash_attn_varlen_func
    return kernel


def check_version(version: str) -> None:
    """UserError for a flash-attn 2 before 2.1, which aligns causal masks with a segment's first key: wrong numbers."""
    if tuple(map(int, version.split(".")[:2])) < (2, 1):
        raise UserError(f"flash-attn {version} is too old: install 2.1 or later, or set model.attention=sdpa")
