"""The random stream of one request."""

from __future__ import annotations

from collections.abc import Iterator

import torch

CHUNK = 32


def uniform_stream(seed: int) -> Iterator[float]:
    """Numbers in [0, 1): those of fp64 ``torch.rand(n, generator=torch.Generator().manual_seed(seed))`` for any n.

    A few are drawn at a time; in between the generator is kept, which takes 5 kB.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.rand(CHUNK, generator=generator, dtype=torch.float64).tolist()
