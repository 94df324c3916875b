"""Inputs and the memory probe that the tests of the linear_* operations share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestTensor(TorchDispatchMode):
    """Number of elements of the largest new tensor of any operation, forward and backward; views are not new."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        inputs = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in inputs:
                self.num_elements = max(self.num_elements, x.numel())
        return result


@pytest.fixture
def largest_tensor() -> LargestTensor:
    return LargestTensor()


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
