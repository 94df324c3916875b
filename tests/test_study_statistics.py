"""Intervals and correlations against scipy, numpy and brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from copd_engine.study.statistics import (
    Interval,
    can_decide,
    correlation_interval,
    correlation_p,
    pearson,
    t_interval,
    verdict,
)

NUMBERS = st.lists(st.floats(-1, 1, allow_subnormal=False), min_size=2, max_size=8)


@given(NUMBERS, st.sampled_from([0.9, 0.95, 0.998]))
def test_t_interval_is_scipys(values: list[float], confidence: float) -> None:
    interval = t_interval(values, confidence)
    assert interval.value == pytest.approx(sum(values) / len(values), abs=1e-12)
    if np.std(values) > 1e-9:
        scale = np.std(values, ddof=1) / math.sqrt(len(values))
        expected = stats.t.interval(confidence, len(values) - 1, interval.value, scale)
        assert interval[1:] == pytest.approx(expected, rel=1e-9, abs=1e-12)
    else:
        assert interval.high - interval.low == pytest.approx(0, abs=1e-7)


def test_t_interval_of_five_by_hand() -> None:
    # t(0.975, 4) = 2.776445, sd = sqrt(2.5), sem = sqrt(0.5)
    assert t_interval([1, 2, 3, 4, 5]) == pytest.approx(
        (3, 3 - 2.776445 * math.sqrt(0.5), 3 + 2.776445 * math.sqrt(0.5))
    )


def test_the_95_percent_interval_of_five_seeds_covers_the_truth_95_times_in_100() -> None:
    rng = np.random.default_rng(0)
    intervals = [t_interval(list(row)) for row in rng.normal(0.3, 1.0, (4000, 5))]
    covered = np.mean([i.low <= 0.3 <= i.high for i in intervals])
    assert covered == pytest.approx(0.95, abs=3 * math.sqrt(0.95 * 0.05 / 4000))


def test_one_seed_has_no_interval_and_none_is_an_error() -> None:
    interval = t_interval([0.25])
    assert interval.value == 0.25
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)
    assert verdict(interval) == "not decided"
    with pytest.raises(ValueError, match="no values"):
        t_interval([])


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.01, 0.03, "holds"),
        (-0.03, -0.01, "does not hold"),
        (-0.01, 0.03, "not decided"),
        (0.0, 0.02, "not decided"),
        (-0.02, 0.0, "not decided"),
        (0.0, 0.0, "not decided"),
    ],
)
def test_the_whole_interval_decides(low: float, high: float, expected: str) -> None:
    assert verdict(Interval((low + high) / 2, low, high)) == expected


@pytest.mark.parametrize(
    ("values", "resolution", "expected"),
    [
        ((0.1, 0.2), 0.01, False),  # two seeds may agree by chance
        ((0.1, 0.2, 0.3), 0.01, True),
        ((1 / 30, 1 / 30, 1 / 30), 1 / 30, False),  # one prompt in every seed
        ((1 / 30, 1 / 30, 2 / 30), 1 / 30, True),
        ((5e-17, 6e-17, 4e-17), 1e-9, False),  # what fp64 sums leave of nothing
        ((0.3 - 0.2, 0.1, 0.4 - 0.3), 1e-9, False),
        ((1e-5, 1.1e-5, 1.2e-5), 1e-9, True),  # the KL of branches that are close
    ],
)
def test_seeds_that_give_the_same_number_say_nothing_about_their_spread(
    values: tuple[float, ...], resolution: float, expected: bool
) -> None:
    assert can_decide(values, resolution) is expected


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=3, max_size=12))
def test_pearson_is_numpys(points: list[tuple[float, float]]) -> None:
    x, y = (list(column) for column in zip(*points, strict=True))
    found = pearson(x, y)
    if np.std(x) < 1e-6 or np.std(y) < 1e-6:
        return
    assert found == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-6)


def test_p_counts_seeds_not_points() -> None:
    """By hand: z = .5, .6, .7, mean .6, sem .1 / sqrt(3), t = 10.392 with 2 degrees of freedom."""
    rs = [math.tanh(z) for z in (0.5, 0.6, 0.7)]
    assert correlation_p(rs) == pytest.approx(2 * stats.t.sf(0.6 / (0.1 / math.sqrt(3)), 2), rel=1e-9)
    assert correlation_p(rs) == pytest.approx(0.0091, abs=1e-4)
    assert correlation_p([-r for r in rs]) == pytest.approx(correlation_p(rs))
    assert math.isnan(correlation_p([0.9]))


@given(st.lists(st.floats(-0.99, 0.99), min_size=2, max_size=6, unique=True))
def test_p_is_below_5_percent_where_the_95_percent_interval_leaves_0_out(rs: list[float]) -> None:
    interval, p = correlation_interval(rs), correlation_p(rs)
    if abs(p - 0.05) > 1e-6:
        assert (p < 0.05) == (interval.low > 0 or interval.high < 0)


@pytest.mark.parametrize(("x", "y"), [([1, 2], [1, 2]), ([1, 1, 1], [1, 2, 3]), ([1, 2, 3], [2, 2, 2])])
def test_no_correlation_without_spread_or_points(x: list[float], y: list[float]) -> None:
    assert math.isnan(pearson(x, y))


def test_the_interval_of_correlations_is_taken_on_fishers_scale() -> None:
    rs = [0.5, 0.8, 0.9]
    expected = np.tanh(t_interval(list(np.arctanh(rs))))
    assert correlation_interval(rs) == pytest.approx(tuple(expected))
    assert correlation_interval([1.0, 1.0]).high <= 1.0
