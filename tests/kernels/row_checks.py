"""What the tests of the row operations share: instruction sets, running statistics over tiles, and the fp64 truth."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from copd_kernels import _rows

INF, NAN = math.inf, math.nan
ISAS = ("avx512", "avx2", "portable")
ops = torch.ops.copd_kernels
needs_native = pytest.mark.skipif(not _rows.native_available(), reason="the CPU kernels were not built")


@pytest.fixture(autouse=True, params=ISAS, name="isa")
def every_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test of a file that imports this runs once per instruction set."""
    try:
        ops.set_isa(request.param)
    except ValueError:
        pytest.skip(f"{request.param} was not built or is not what this CPU has")
    yield request.param
    ops.set_isa("auto")


def empty_stats(num_rows: int, num_tokens: int) -> torch.Tensor:
    stats = torch.zeros(num_rows, num_tokens)
    for head in range(0, min(num_rows, 8), 4):
        stats[[head, head + 3]] = -INF
        stats[head + 1] = -1
    return stats


def tiles(num_columns: int, splits: tuple[int, ...]) -> list[tuple[int, int]]:
    edges = [0, *splits, num_columns]
    return list(itertools.pairwise(edges))


def single_stats(z: torch.Tensor, target: torch.Tensor, splits: tuple[int, ...] = ()) -> torch.Tensor:
    stats = empty_stats(4, len(z))
    for begin, end in tiles(z.shape[1], splits):
        ops.single_stats_(z[:, begin:end], begin, target, stats)
    return stats


def dual_stats(s: torch.Tensor, t: torch.Tensor, target: torch.Tensor, splits: tuple[int, ...] = ()) -> torch.Tensor:
    stats = empty_stats(12, len(s))
    for begin, end in tiles(s.shape[1], splits):
        ops.dual_stats_(s[:, begin:end], t[:, begin:end], begin, target, stats)
    return stats


def true_head(z: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Rows 0 to 3, fp64."""
    z = z.double()
    largest, argmax = z.max(-1)
    x = z - largest[:, None]
    e = x.exp()
    mean = torch.where(e == 0, 0, e * x).sum(-1) / e.sum(-1)
    tail = e.scatter(-1, argmax[:, None], 0).sum(-1)
    at_target = torch.where(target < 0, -INF, z.gather(-1, target.clamp(min=0)[:, None])[:, 0])
    return torch.stack([largest, tail, mean, at_target])


def true_gap(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Gap and excess, fp64, from log-probs: log1p(excess) is the KL."""
    s, t = s.double(), t.double()
    p = s.softmax(-1)
    possible = p > 0
    gap = torch.where(possible, p * (s - t), 0).sum(-1, keepdim=True)
    u = torch.where(possible, (s - t) - gap, 0)
    near = torch.where(possible, p * (u + torch.expm1(-u)), 0)
    # Where p is 0 the share of the excess is the teacher's mass alone.
    lost = torch.where(possible, 0, (t - s.logsumexp(-1, keepdim=True) + gap).exp())
    return torch.stack([gap[:, 0], (near + lost).sum(-1)])


def true_dual(s: torch.Tensor, t: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return torch.cat([true_head(s, target), true_head(t, target), true_gap(s, t), true_gap(t, s)])


def close_heads(num_tokens: int, vocab: int, gap: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    s = torch.randn(num_tokens, vocab, generator=generator) * 3
    return s, s + gap * torch.randn(num_tokens, vocab, generator=generator)


def assert_heads_match(stats: torch.Tensor, truth: torch.Tensor) -> None:
    """One head's four rows, in the words of the specification: lse, entropy, target log-prob."""
    stats = stats.double()
    assert torch.equal(stats[[0, 3]], truth[[0, 3]])
    torch.testing.assert_close(stats[1], truth[1], rtol=2e-6, atol=0)
    torch.testing.assert_close(stats[2], truth[2], rtol=4e-6, atol=1e-9)
    bound = 5e-6 * (truth[0] + truth[1].log1p()).abs().clamp(min=1)
    assert ((stats[1].log1p() - truth[1].log1p()).abs() <= bound).all()
    entropy, true_entropy = stats[1].log1p() - stats[2], truth[1].log1p() - truth[2]
    assert ((entropy - true_entropy).abs() <= bound).all()


COEFS = {
    "surrogate": [0.7, 0.0, -0.7, 0, 0, 0],
    "entropy": [0, 0.3, 0, 0, 0, 0],
    "reverse": [0, 0, 0, 1.3, 0, 0],
    "forward": [0, 0, 0, 0, 0.8, 0],
    "jsd": [0, 0, 0, 0, 0, 1.1],
    "all": [0.7, -0.3, 0.2, 1.3, 0.8, 1.1],
}
