"""The online rule of statistics.py: parts of a vocabulary, in any number and order, merge to the whole's statistics."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from copd_kernels import _rows, statistics
from hypothesis import given
from hypothesis import strategies as st

BOUND = {torch.float64: 1e-12, torch.float32: 2e-6}


def by_hand(student: list[float], teacher: list[float], target: int) -> list[float]:
    """The twelve rows by their definitions, entry by entry, for a set where both heads allow something."""

    def head(z: list[float]) -> tuple[list[float], list[float]]:
        top = max(z)
        first = z.index(top)
        weights = [math.exp(x - top) for x in z]
        total = math.fsum(weights)
        tail = math.fsum(w for v, w in enumerate(weights) if v != first)
        mean = math.fsum(w * (x - top) for w, x in zip(weights, z, strict=True) if w) / total
        at_target = z[target] if 0 <= target < len(z) else -math.inf
        return [top, tail, mean, at_target], [w / total for w in weights]

    def gap(p: list[float], s: list[float], t: list[float]) -> list[float]:
        c = math.fsum(w * (x - y) for w, x, y in zip(p, s, t, strict=True) if w)
        b = 0.0
        for w, x, y in zip(p, s, t, strict=True):
            u = x - y - c
            b += w * (u + math.expm1(-u) if abs(u) > 1e-3 else u * u / 2 - u**3 / 6 + u**4 / 24 - u**5 / 120)
        return [c, b]

    (own, p), (other, q) = head(student), head(teacher)
    return [*own, *other, *gap(p, student, teacher), *gap(q, teacher, student)]


def whole(student: torch.Tensor, teacher: torch.Tensor, v_begin: int, target: torch.Tensor) -> torch.Tensor:
    """Statistics of one set by the ATen body of the row operation."""
    stats = statistics.empty_statistics(12, len(student), like=student, dtype=student.dtype)
    _rows.dual_stats_aten(student, teacher, v_begin, target, stats)
    return stats


def split(student, teacher, target, cuts: list[int]) -> list[torch.Tensor]:
    bounds = sorted({0, *cuts, student.shape[1]})
    return [
        whole(student[:, a:b].contiguous(), teacher[:, a:b].contiguous(), a, target)
        for a, b in itertools.pairwise(bounds)
    ]


def truth(student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both KL in fp64 by the centred formula, which has digits at any size. Excluded on both sides counts nothing."""
    p, q = student.double().log_softmax(-1), teacher.double().log_softmax(-1)
    result = []
    for a, b in ((p, q), (q, p)):
        delta = torch.where(a == -math.inf, 0, a - b)
        terms = torch.where(
            delta.abs() < 1e-3, delta.square() * (0.5 - delta / 6 + delta.square() / 24), delta + torch.expm1(-delta)
        )
        # sum p (delta + exp(-delta) - 1) leaves out the other's mass on what this one excludes.
        missing = torch.where(a == -math.inf, b.exp(), 0).sum(-1)
        result.append((a.exp() * terms).sum(-1) + missing)
    return result[0], result[1]


@given(
    rows=st.lists(st.tuples(st.floats(-20, 20), st.floats(-20, 20)), min_size=1, max_size=30), target=st.integers(0, 40)
)
def test_meaning_of_every_row(rows: list[tuple[float, float]], target: int) -> None:
    student, teacher = ([pair[i] for pair in rows] for i in range(2))
    got = whole(*(torch.tensor([x], dtype=torch.float64) for x in (student, teacher)), 0, torch.tensor([target]))
    expected = torch.tensor(by_hand(student, teacher, target), dtype=torch.float64)
    torch.testing.assert_close(got[:, 0], expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@given(
    seed=st.integers(0, 2**31),
    vocab_size=st.integers(1, 60),
    cuts=st.lists(st.integers(0, 60), max_size=8),
    gap=st.sampled_from([0.0, 3e-4, 1e-2, 0.3, 3.0, 30.0]),
    excluded=st.sampled_from([None, "both", "student", "teacher"]),
    empty_parts=st.integers(0, 2),
    nested=st.booleans(),
)
def test_any_split_in_any_order(dtype, seed, vocab_size, cuts, gap, excluded, empty_parts, nested) -> None:
    """Merged parts against the set as one and against KL by definition in fp64."""
    generator = torch.Generator().manual_seed(seed)
    student = (4 * torch.randn(3, vocab_size, generator=generator, dtype=torch.float64)).to(dtype)
    teacher = student + (gap * torch.randn(3, vocab_size, generator=generator, dtype=torch.float64)).to(dtype)
    if excluded is not None and vocab_size > 1:
        # Runs of -inf, so that whole parts are empty for a head; never everything.
        off = torch.rand(3, vocab_size, generator=generator) < 0.5
        off[:, seed % vocab_size] = False
        student = student.masked_fill(off & (excluded != "teacher"), -math.inf)
        teacher = teacher.masked_fill(off & (excluded != "student"), -math.inf)
    target = torch.randint(vocab_size, (3,), generator=generator)
    parts = split(student, teacher, target, [cut for cut in cuts if cut < vocab_size])
    parts += [statistics.empty_statistics(12, 3, like=student, dtype=dtype)] * empty_parts
    parts = [parts[i] for i in torch.randperm(len(parts), generator=generator)]
    if nested:
        merged = parts[0]
        for part in parts[1:]:
            merged = statistics.merge_statistics(torch.stack([merged, part]))
    else:
        merged = statistics.merge_statistics(torch.stack(parts))
    one = whole(student, teacher, 0, target)
    bound, scale = BOUND[dtype], 30
    # Max and target are copies; the rest are sums.
    assert torch.equal(merged[[0, 3, 4, 7]], one[[0, 3, 4, 7]])
    torch.testing.assert_close(merged[[1, 5]], one[[1, 5]], rtol=bound * 5, atol=0)
    torch.testing.assert_close(merged[[2, 6, 8, 10]], one[[2, 6, 8, 10]], rtol=bound * 5, atol=bound * scale)
    kl = truth(student, teacher)
    for got, expected in zip(statistics.divergences(merged), kl, strict=True):
        assert (got >= 0).all()
        # From infinite down to 1e-7.
        if dtype == torch.float64:
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-13)
        else:
            # fp32: section 3, 1e-4 down to 1e-5; below that relative to the size of the gaps, which are rounded at 1.
            torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-9)
    for first in (0, 4):
        finals = statistics.head_finals(merged[first : first + 4])
        logits = (student, teacher)[first // 4].double()
        torch.testing.assert_close(finals.lse_T.double(), logits.logsumexp(-1), rtol=5e-6, atol=5e-6)
        assert (finals.logp_T <= 0).all()
        assert (finals.entropy_T >= 0).all()
    single = statistics.merge_statistics(torch.stack([part[:4] for part in parts]))
    torch.testing.assert_close(single, statistics.merge_statistics(torch.stack(parts))[:4], rtol=0, atol=0)


@pytest.mark.parametrize("gap", [1e-3, 3e-4, 1e-4])
@pytest.mark.parametrize("parts", [2, 16, 1000])
def test_many_parts_at_a_tiny_kl(gap: float, parts: int, randn) -> None:
    """fp32 statistics of up to a thousand shards: KL from 5e-7 down to 5e-9 keeps four digits."""
    student = randn(2, 20_000, dtype=torch.float32, scale=2.0)
    teacher = student + randn(2, 20_000, dtype=torch.float32, scale=gap)
    merged = statistics.merge_statistics(
        torch.stack(split(student, teacher, torch.tensor([1, 2]), list(range(0, 20_000, 20_000 // parts))))
    )
    for got, expected in zip(statistics.divergences(merged), truth(student, teacher), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@given(low=st.floats(-400, -1), high=st.floats(-300, 300), order=st.booleans())
def test_parts_that_underflow(dtype, low: float, high: float, order: bool) -> None:
    """A part without student mass in fp32 that holds the teacher's: KL is high - low of the logits or what is left."""
    student, teacher = torch.tensor([[0.0, low]], dtype=dtype), torch.tensor([[0.0, high]], dtype=dtype)
    parts = split(student, teacher, torch.tensor([0]), [1])
    merged = statistics.merge_statistics(torch.stack(parts[::-1] if order else parts))
    log_p, log_q = student.double().log_softmax(-1), teacher.double().log_softmax(-1)
    for got, (a, b) in zip(statistics.divergences(merged), ((log_p, log_q), (log_q, log_p)), strict=True):
        expected = (a.exp() * (a - b)).sum(-1)
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-9)


def test_merging_is_neutral_with_the_empty_set(randn) -> None:
    """Bitwise: an initial workspace changes nothing."""
    student, teacher = randn(4, 31, dtype=torch.float32), randn(4, 31, dtype=torch.float32)
    student[1] = -math.inf
    one = whole(student, teacher, 0, torch.tensor([0, 1, 2, -1]))
    empty = statistics.empty_statistics(12, 4, like=student, dtype=torch.float32)
    for parts in ([one], [one, empty], [empty, one], [empty, one, empty, empty]):
        assert torch.equal(statistics.merge_statistics(torch.stack(parts)), one)
    assert torch.equal(statistics.merge_statistics(torch.stack([empty, empty])), empty)


def test_nan_survives_a_merge(randn) -> None:
    student, teacher = randn(3, 31), randn(3, 31)
    student[1, 20] = math.nan
    merged = statistics.merge_statistics(torch.stack(split(student, teacher, torch.tensor([0, 1, 2]), [7, 15])))
    for column in statistics.divergences(merged):
        assert column.isnan().tolist() == [False, True, False]
    assert statistics.head_finals(merged).lse_T.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@given(x=st.floats(-1, 1))
def test_expm1_minus(dtype, x: float) -> None:
    """Against its series in exact arithmetic of the standard library, both sides of the switch."""
    value = torch.tensor(x, dtype=dtype)
    rounded = float(value)
    expected = math.fsum(rounded**n / math.factorial(n) for n in range(2, 25))
    got = float(statistics.expm1_minus(value))
    assert got >= 0
    # expm1(x) - x loses a factor 2 / |x| of the precision just above the switch, at 0.05 and 2e-3.
    assert got == pytest.approx(expected, rel=5e-6 if dtype == torch.float32 else 1e-12, abs=1e-44)


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 5, 3), (4, 3), (1, 12)])
def test_shapes_that_are_no_statistics(shape) -> None:
    with pytest.raises(ValueError, match=r"parts_SFT must be \[S, 4, T\] or \[S, 12, T\] with S >= 1, was \["):
        statistics.merge_statistics(torch.zeros(shape))
