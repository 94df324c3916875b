"""The random stream of one request."""

from __future__ import annotations

from collections import deque

import torch

CHUNK = 32


class UniformStream:
    """Uniform numbers in [0, 1), fp64: those of ``torch.rand(n, generator=torch.Generator().manual_seed(seed))`` for
    any n, a few at a time."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._generator: torch.Generator | None = None
        self._numbers: deque[float] = deque()

    def next(self) -> float:
        if not self._numbers:
            if self._generator is None:  # 5 kB, so not before it is needed
                self._generator = torch.Generator().manual_seed(self._seed)
            self._numbers.extend(torch.rand(CHUNK, generator=self._generator, dtype=torch.float64).tolist())
        return self._numbers.popleft()
