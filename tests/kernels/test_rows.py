"""The C++ row operations, every instruction set that this CPU has: the statistics against fp64 on the same logits."""

from __future__ import annotations

import math

import pytest
import torch

from tests.kernels.row_checks import (
    INF,
    ISAS,
    NAN,
    assert_heads_match,
    close_heads,
    dual_stats,
    empty_stats,
    every_isa,  # noqa: F401 (a fixture)
    needs_native,
    ops,
    single_stats,
    true_dual,
    true_gap,
    true_head,
)

pytestmark = needs_native


def test_isa_is_chosen_and_reported(isa: str) -> None:
    assert ops.get_isa() == isa
    with pytest.raises(ValueError, match=r"isa must be one of 'auto'.*'portable' on this machine, was 'sse9'"):
        ops.set_isa("sse9")
    assert ops.get_isa() == isa
    assert ops.set_isa("auto") in ISAS


def test_exponential_within_two_ulp() -> None:
    # With max 0, tail 0 and a = 1 the gradient is exp(z).
    z = torch.cat([-torch.logspace(-8, math.log10(87.3), 60_000), torch.tensor([0.0, -INF, -87.4, -1e30])])[None]
    expected = z.double().exp()
    out, stats = z.clone(), torch.tensor([[0.0], [0.0], [0.0], [-INF]])
    ops.single_grad_(out, 0, torch.tensor([-1]), stats, torch.tensor([[1.0], [0.0], [0.0]]), 1.0, 0.0)
    assert out[0, -4:].tolist() == [1, 0, 0, 0]
    relative = (out[0, :-3].double() - expected[0, :-3]).abs() / expected[0, :-3]
    assert relative.max() <= 2 * 2**-23


@pytest.mark.parametrize("vocab", [*range(1, 34), 2047, 2048, 2049, 5000])
def test_every_row_of_the_statistics_at_any_width(vocab: int) -> None:
    s, t = close_heads(3, vocab, 0.3, seed=vocab)
    target = torch.tensor([0, vocab - 1, -1])
    truth = true_dual(s, t, target)
    assert_heads_match(single_stats(s, target), truth[:4])
    stats = dual_stats(s, t, target)
    assert_heads_match(stats[:4], truth[:4])
    assert_heads_match(stats[4:8], truth[4:8])
    torch.testing.assert_close(stats[[8, 10]].double(), truth[[8, 10]], rtol=1e-6, atol=2e-7)
    torch.testing.assert_close(stats[[9, 11]].double(), truth[[9, 11]], rtol=3e-6, atol=1e-13)


@pytest.mark.parametrize("offset", [0.0, 10.0])
@pytest.mark.parametrize("gap", [0.5, 0.05, 0.005, 0.0008])
def test_divergence_of_close_heads_over_a_real_vocabulary(gap: float, offset: float) -> None:
    # KL of 4e-2 to 4e-7.
    s, t = close_heads(2, 151_936, gap)
    t = t + offset
    truth = true_dual(s, t, torch.tensor([5, -1]))
    stats = dual_stats(s, t, torch.tensor([5, -1]))
    # The centre's fp32 rounding is of the order of the offset's; its effect is of second order.
    tolerance = 3e-6 if offset == 0 else 1e-5
    for row in (9, 11):
        torch.testing.assert_close(stats[row].double().log1p(), truth[row].log1p(), rtol=tolerance, atol=0)
    torch.testing.assert_close(stats[[8, 10]].double(), truth[[8, 10]], rtol=2e-7, atol=2e-7 * gap)
    assert_heads_match(stats[4:8], truth[4:8])


@pytest.mark.parametrize(
    "splits", [(1,), (2999,), (7, 7, 8, 2000), (1024, 2048), tuple(range(100, 3000, 100))], ids=str
)
@pytest.mark.parametrize("gap", [2.0, 0.01])
def test_tiles_merge_in_any_split(splits: tuple[int, ...], gap: float) -> None:
    s, t = close_heads(4, 3000, gap)
    target = torch.tensor([0, 99, 100, 2999])
    truth = true_dual(s, t, target)
    stats = dual_stats(s, t, target, splits)
    assert_heads_match(single_stats(s, target, splits), truth[:4])
    assert_heads_match(stats[:4], truth[:4])
    assert_heads_match(stats[4:8], truth[4:8])
    for row in (9, 11):
        torch.testing.assert_close(stats[row].double(), truth[row], rtol=2e-5, atol=0)


def test_mass_of_a_tile_that_the_student_excludes_counts() -> None:
    # Column tile [10, 20) has no student mass, by -inf or by underflow, but a part of the teacher's.
    s, t = close_heads(2, 30, 0.1)
    s[0, 10:20] = -INF
    s[1, 10:20] -= 500
    truth = true_gap(s, t)
    stats = dual_stats(s, t, torch.tensor([-1, -1]), (10, 20))
    torch.testing.assert_close(stats[8:10].double(), truth, rtol=3e-6, atol=0)
    assert stats[10, 0] == INF
    assert stats[10, 1] > 10


def test_teacher_that_excludes_a_possible_token_has_infinite_gap() -> None:
    s, t = close_heads(1, 100, 0.1)
    t[0, 40] = -INF
    for splits in ((), (30, 60)):
        stats = dual_stats(s, t, torch.tensor([-1]), splits)
        assert stats[8] == INF
        torch.testing.assert_close(stats[10:12].double(), true_gap(t, s), rtol=3e-6, atol=1e-9)


def test_excluded_tokens_change_nothing() -> None:
    s, t = close_heads(3, 400, 0.05)
    wide_s, wide_t = torch.full((3, 5000), -INF), torch.full((3, 5000), -INF)
    wide_s[:, 2500:2900], wide_t[:, 2500:2900] = s, t
    target = torch.tensor([3, 0, 399])
    truth = true_dual(s, t, target)
    # Whole tiles of -inf before and behind.
    stats = dual_stats(wide_s, wide_t, target + 2500, (100, 2600, 4000))
    torch.testing.assert_close(stats.double(), truth, rtol=4e-6, atol=1e-8)


def test_nothing_possible_is_the_empty_set() -> None:
    z = torch.full((2, 3000), -INF)
    target = torch.tensor([1, -1])
    assert torch.equal(dual_stats(z, z, target, (1000,)), empty_stats(12, 2))
    assert torch.equal(single_stats(z, target), empty_stats(4, 2))
    grad = z.clone()
    ops.single_grad_(grad, 0, torch.tensor([-1, -1]), empty_stats(4, 2), torch.ones(3, 2), 1.0, 0.0)
    assert torch.equal(grad, torch.zeros(2, 3000))


@pytest.mark.parametrize("scale", [1e4, 1e-4])
def test_huge_and_tiny_logits(scale: float) -> None:
    s, t = close_heads(4, 3001, 0.5)
    t[0] = s[0].flip(0)
    s, t = s * scale, t * scale
    target = torch.tensor([0, 1, 2, 3])
    truth, stats = true_dual(s, t, target), dual_stats(s, t, target)
    assert_heads_match(stats[:4], truth[:4])
    # The excess overflows there, and the divergence is the plain difference of large numbers.
    true_kl = truth[8] - (truth[0] + truth[1].log1p()) + (truth[4] + truth[5].log1p())
    plain = stats[8] - (stats[0] + stats[1].log1p()) + (stats[4] + stats[5].log1p())
    if scale > 1:
        far = true_kl > 80
        assert far.any()
        assert stats[9].isfinite().all()
        assert torch.equal(stats[9] > 1e30, far)
        torch.testing.assert_close(plain.double(), true_kl, rtol=1e-6, atol=1e-2)
        torch.testing.assert_close(stats[9, ~far].double(), truth[9, ~far], rtol=1e-5, atol=1e-30)
    else:
        torch.testing.assert_close(stats[9].double(), truth[9], rtol=3e-5, atol=1e-15)


def test_one_hot_rows_and_ties() -> None:
    z = torch.zeros(3, 40)
    z[0, 7] = 60.0  # tail of 39 e^-60
    z[1, :] = -INF
    z[1, 39] = 2.0  # certain
    z[2, [3, 35]] = 1.5  # two largest
    target = torch.tensor([7, 39, 3])
    stats, truth = single_stats(z, target), true_head(z, target)
    torch.testing.assert_close(stats.double(), truth, rtol=2e-6, atol=1e-30)
    assert stats[1].tolist()[:2] == [pytest.approx(39 * math.exp(-60), rel=2e-6), 0.0]


@pytest.mark.parametrize("column", [0, 5, 2047, 2500, 2998])
@pytest.mark.parametrize("rest", ["normal", "excluded"])
def test_nan_is_never_hidden(column: int, rest: str) -> None:
    s, t = close_heads(3, 2999, 0.1)
    if rest == "excluded":
        s.fill_(-INF)
        t.fill_(-INF)
    s[0, column] = t[1, column] = NAN
    target = torch.tensor([1, 1, 1])
    for splits in ((), (1000,), (2600,)):
        single, dual = single_stats(s, target, splits), dual_stats(s, t, target, splits)
        assert single[:3, 0].isnan().all()
        assert not single[:, 1:].isnan().any()
        assert dual[[0, 1, 2, 8, 9, 10, 11], 0].isnan().all()
        assert dual[4:12, 1].isnan().tolist() == [True, True, True, False, True, True, True, True]
        assert not dual[4:8, 0].isnan().any()
        assert not dual[:4, 1].isnan().any()
        assert not dual[:, 2].isnan().any()
    second = torch.zeros(3, 3)
    ops.second_(s, t, dual, 0.5, second)
    assert second[:, :2].isnan().all()
    grad = s.clone()
    ops.dual_grad_(grad, t, 0, target, dual, second, torch.ones(6, 3), 0.5, 1.0, 0.0)
    assert grad[:2].isnan().all()
