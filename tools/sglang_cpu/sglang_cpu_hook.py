"""Lets the real sglang run on a machine without a GPU; loaded at the start of every Python process by a .pth file.

Costs nothing until torchvision or sglang is imported, and does nothing where there is a GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


class _BeforeImport(MetaPathFinder):
    """Runs a function once before a package is imported; that somebody looks whether it is there does nothing."""

    def __init__(self, before: dict[str, Callable[[], None]]) -> None:
        self._before = before

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname in self._before else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            before = self._before.pop(fullname, None)
            if before is not None:
                before()
            execute(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _define_torchvision_operators() -> None:
    """The schemas of torchvision's compiled library, which does not load beside a torch without CUDA."""
    import torch

    if torch.version.cuda is not None or torch.version.hip is not None:
        return
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def _drop_pin_memory() -> None:
    """sglang's LoRA pins host memory without asking whether there is a GPU to pin it for."""
    import torch
    from torch.utils import _device

    if torch.cuda.is_available():
        return
    _device._device_constructors()  # keeps the originals in its cache, by which torch knows them

    def without(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs.pop("pin_memory", None)
            return function(*args, **kwargs)

        return call

    for name in ("tensor", "empty", "zeros", "ones", "full", "arange", "empty_like", "zeros_like", "ones_like"):
        setattr(torch, name, without(getattr(torch, name)))
    torch.Tensor.pin_memory = lambda self, device=None: self  # type: ignore[method-assign]


sys.meta_path.insert(0, _BeforeImport({"torchvision": _define_torchvision_operators, "sglang": _drop_pin_memory}))
