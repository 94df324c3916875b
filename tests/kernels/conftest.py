"""Inputs, backends and the watch on the driver that the tests of the operations share."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from copd_kernels import _backend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.kernels.problems import BACKENDS, Backend, rows_by


class LargestTensor(TorchDispatchMode):
    """Largest number of elements of a new tensor; views are not new, and bytes are how Triton's interpreter sees
    storage."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = func(*args, **kwargs)
        for x in tree_leaves(result):
            if not isinstance(x, torch.Tensor) or x.dtype == torch.uint8:
                continue
            if x.untyped_storage().data_ptr() not in inputs:
                self.num_elements = max(self.num_elements, x.numel())
        return result


class DriverWatch:
    """What the operations ask of the driver, and the largest tensor that it makes. A mode around an operation would
    not see into its body, so this one is entered there."""

    def __init__(self) -> None:
        self.num_elements = 0
        self.wanted: list[tuple[bool, bool, bool]] = []
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> DriverWatch:
        find = _backend.driver
        self._patch.setattr(_backend, "driver", lambda device: _Watched(find(device), self))
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.undo()


class _Watched:
    def __init__(self, driver: types.ModuleType, watch: DriverWatch) -> None:
        self._driver, self._watch = driver, watch

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if "wanted" in options:
                self._watch.wanted.append(options["wanted"])
            with LargestTensor() as new:
                result = getattr(self._driver, name)(*args, **options)
            self._watch.num_elements = max(self._watch.num_elements, new.num_elements)
            return result

        return call


@pytest.fixture(params=BACKENDS, ids=lambda backend: backend.name)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Every dtype and every body of the row operations in turn."""
    with rows_by(request.param.rows):
        yield request.param


@pytest.fixture(params=[b for b in BACKENDS if b.dtype in (torch.float64, torch.float32)], ids=lambda b: b.name)
def exact_backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """The backends whose inputs hold any logits that a test chooses."""
    with rows_by(request.param.rows):
        yield request.param


@pytest.fixture
def largest_tensor() -> LargestTensor:
    return LargestTensor()


@pytest.fixture
def watch() -> DriverWatch:
    return DriverWatch()


@pytest.fixture
def randn() -> Callable[..., torch.Tensor]:
    """Seeded normal numbers: ``randn(3, 5, dtype=..., scale=...)``."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    return draw


@pytest.fixture
def randint() -> Callable[[int, int], torch.Tensor]:
    """Seeded targets: ``randint(vocab_size, num_tokens)``."""
    generator = torch.Generator().manual_seed(1)
    return lambda high, num: torch.randint(high, (num,), generator=generator)
