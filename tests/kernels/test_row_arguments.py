"""The rest of the C++ row operations: preparation, top-k, threads, strides, empty inputs and errors."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tests.kernels.row_checks import (
    COEFS,
    INF,
    NAN,
    close_heads,
    dual_stats,
    empty_stats,
    every_isa,  # noqa: F401 (a fixture)
    needs_native,
    ops,
    single_stats,
    tiles,
)

pytestmark = needs_native


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("cap", "temp"), [(0.0, 1.0), (0.0, 0.7), (30.0, 1.0), (5.0, 1.3)])
def test_prepare(with_bias: bool, cap: float, temp: float) -> None:
    raw, _ = close_heads(3, 37, 0.0)
    raw[0, 0], raw[1, 1] = -INF, 1e-4
    bias = torch.linspace(-2, 2, 37)
    bias[5] = -INF
    x = raw.double() + (bias.double() if with_bias else 0)
    expected = (torch.where(x == -INF, x, cap * torch.tanh(x / cap)) if cap else x) / temp
    ops.prepare_(raw, bias if with_bias else None, temp, cap)
    torch.testing.assert_close(raw.double(), expected, rtol=1e-6, atol=3e-7)


@pytest.mark.parametrize("k", [1, 5, 40])
def test_topk_over_tiles_with_ties(k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    z = torch.randint(-5, 6, (4, 700), generator=generator).float()
    z[1] = -INF
    z[1, [600, 3]] = 2.0
    z[2, 100] = NAN
    z[3] = torch.arange(700.0)
    values, indices = torch.full((4, k), -INF), torch.full((4, k), -1)
    # The order of the tiles must not matter either.
    for begin, end in reversed(tiles(700, (1, 20, 333))):
        ops.topk_(z[:, begin:end], begin, values, indices)
    true_values, true_indices = z.nan_to_num(nan=-INF, neginf=-INF).sort(dim=-1, descending=True, stable=True)
    assert torch.equal(values, true_values[:, :k])
    assert torch.equal(indices, true_indices[:, :k])


def test_topk_of_fewer_entries_than_places() -> None:
    values, indices = torch.full((1, 4), -INF), torch.full((1, 4), -1)
    ops.topk_(torch.tensor([[1.0, -INF, 2.0]]), 10, values, indices)
    assert values.tolist() == [[2.0, 1.0, -INF, -INF]]
    assert indices.tolist() == [[12, 10, 11, -1]]


def run_everything(s: torch.Tensor, t: torch.Tensor) -> list[torch.Tensor]:
    target = torch.arange(len(s))
    single, dual, second = single_stats(s, target), dual_stats(s, t, target), torch.zeros(3, len(s))
    ops.second_(s, t, dual, 0.4, second)
    ds, dz = s.clone(), s.clone()
    coefs = torch.tensor(COEFS["all"])[:, None].expand(6, len(s)).contiguous()
    ops.dual_grad_(ds, t, 0, target, dual, second, coefs, 0.4, 0.9, 50.0)
    ops.single_grad_(dz, 0, target, single, coefs[:3], 0.9, 50.0)
    values, indices = torch.full((len(s), 7), -INF), torch.full((len(s), 7), -1)
    ops.topk_(s, 0, values, indices)
    return [single, dual, second, ds, dz, values, indices]


def test_bitwise_the_same_on_repeat_and_for_any_number_of_threads() -> None:
    s, t = close_heads(13, 4100, 0.1)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            assert ops.num_row_threads() == threads
            results.append(run_everything(s, t))
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], others, strict=True))


def test_row_stride_and_tokens_as_slices() -> None:
    s, t = close_heads(5, 1000, 0.1)
    target = torch.arange(5)
    expected = dual_stats(s[:, 100:777].clone(), t[:, 100:777].clone(), target - 100)
    stats = empty_stats(12, 9)
    ops.dual_stats_(s[:, 100:777], t[:, 100:777], 0, target - 100, stats[:, 2:7])
    assert torch.equal(stats[:, 2:7], expected)
    assert torch.equal(stats[:, [0, 1, 7, 8]], empty_stats(12, 4))
    # Gradients stay inside their slice.
    work = s.clone()
    ops.single_grad_(work[:, 100:777], 100, target, stats[:4, 2:7], torch.ones(3, 9)[:, 2:7], 1.0, 0.0)
    assert torch.equal(work[:, :100], s[:, :100])
    assert torch.equal(work[:, 777:], s[:, 777:])
    assert not torch.equal(work[:, 100:777], s[:, 100:777])


@pytest.mark.parametrize(("num_tokens", "vocab"), [(0, 5), (3, 0), (0, 0)])
def test_nothing_to_do(num_tokens: int, vocab: int) -> None:
    z, target = torch.zeros(num_tokens, vocab), torch.zeros(num_tokens, dtype=torch.int64)
    stats, second = empty_stats(12, num_tokens), torch.zeros(3, num_tokens)
    ops.prepare_(z, torch.zeros(vocab), 0.5, 3.0)
    ops.dual_stats_(z, z.clone(), 0, target, stats)
    ops.single_stats_(z, 0, target, stats[:4])
    ops.second_(z, z.clone(), stats, 0.5, second)
    ops.single_grad_(z, 0, target, stats[:4], second, 1.0, 0.0)
    ops.dual_grad_(z, z.clone(), 0, target, stats, second, torch.zeros(6, num_tokens), 0.5, 1.0, 0.0)
    ops.topk_(z, 0, torch.zeros(num_tokens, 3), torch.zeros(num_tokens, 3, dtype=torch.int64))
    ops.topk_(torch.zeros(2, 5), 0, torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.int64))
    assert torch.equal(stats, empty_stats(12, num_tokens))
    assert torch.equal(second, torch.zeros(3, num_tokens))


Z, TARGET, STATS, SECOND = torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64), torch.zeros(12, 2), torch.zeros(3, 2)
ERRORS = {
    "dtype": (partial(ops.prepare_, Z.double(), None, 1.0, 0.0), "z must be Float, was Double"),
    "rank": (partial(ops.prepare_, Z[0], None, 1.0, 0.0), r"z must have 2 dimensions, was \[5\]"),
    "columns": (partial(ops.prepare_, Z.T, None, 1.0, 0.0), r"z must have adjacent columns, had strides \[1, 5\]"),
    "bias": (partial(ops.prepare_, Z, torch.zeros(4), 1.0, 0.0), r"bias must be \[5\], was \[4\]"),
    "temperature": (partial(ops.prepare_, Z, None, 0.0, 0.0), "temperature must be positive, was 0"),
    "softcap": (partial(ops.prepare_, Z, None, 1.0, -1.0), "softcap must not be negative .*, was -1"),
    "target": (partial(ops.single_stats_, Z, 0, TARGET.int(), STATS[:4]), "target must be Long, was Int"),
    "tokens": (partial(ops.single_stats_, Z, 0, TARGET[:1], STATS[:4]), r"target must be \[2\], was \[1\]"),
    "v_begin": (partial(ops.single_stats_, Z, -1, TARGET, STATS[:4]), "v_begin must not be negative, was -1"),
    "stats": (partial(ops.single_stats_, Z, 0, TARGET, STATS), r"stats must be \[4, 2\], was \[12, 2\]"),
    "dual": (partial(ops.dual_stats_, Z, Z, 0, TARGET, STATS[:4]), r"stats must be \[12, 2\], was \[4, 2\]"),
    "teacher": (partial(ops.dual_stats_, Z, Z[:, :4], 0, TARGET, STATS), r"t must be \[2, 5\], was \[2, 4\]"),
    "beta": (partial(ops.second_, Z, Z, STATS, 1.5, SECOND), "beta must be between 0 and 1, was 1.5"),
    "second": (partial(ops.second_, Z, Z, STATS, 0.5, STATS), r"second must be \[3, 2\], was \[12, 2\]"),
    "coefs": (
        partial(ops.dual_grad_, Z, Z, 0, TARGET, STATS, SECOND, SECOND, 0.5, 1.0, 0.0),
        r"coefs must be \[6, 2\], was \[3, 2\]",
    ),
    "indices": (partial(ops.topk_, Z, 0, Z, Z), "indices must be Long, was Float"),
    "places": (partial(ops.topk_, Z, 0, Z, TARGET[:, None]), r"indices must be \[2, 5\], was \[2, 1\]"),
}


@pytest.mark.parametrize("case", list(ERRORS))
def test_errors_name_the_argument(case: str) -> None:
    call, match = ERRORS[case]
    with pytest.raises(ValueError, match=match):
        call()
