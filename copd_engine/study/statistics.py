"""Intervals over seeds, correlation, and what an interval decides.

A seed is the unit: it has its own prompts, their own order, and its own rollouts. With n = 5 Student's t interval is
wide and assumes that the differences are roughly normal; a percentile bootstrap over five values would be too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from scipy import stats

Verdict = Literal["holds", "does not hold", "not decided"]
#: With two seeds t has one degree of freedom: where they happen to agree, their interval is narrow by chance.
MIN_SEEDS = 3
#: Of numbers that are no counts: below it are only the rounding errors of fp64 sums.
ROUNDING = 1e-9


class Interval(NamedTuple):
    """A mean and the bounds around it, NaN where there are too few values for bounds."""

    value: float
    low: float
    high: float


def t_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean and Student's t interval with n - 1 degrees of freedom. ValueError for no values."""
    if not values:
        raise ValueError("an interval of no values")
    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean, math.nan, math.nan)
    half = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1) * stats.sem(values))
    return Interval(mean, mean - half, mean + half)


def verdict(interval: Interval) -> Verdict:
    """``holds`` if the whole interval is above 0, ``does not hold`` if all of it is below."""
    if interval.low > 0:
        return "holds"
    return "does not hold" if interval.high < 0 else "not decided"


def can_decide(values: Sequence[float], resolution: float = ROUNDING) -> bool:
    """Whether one number per seed says how far seeds differ: three or more of them, which are not all the same.

    ``resolution``: the step in which the number is counted, one prompt of an accuracy. Seeds that give equal counts
    differ by less than one step, but not by nothing: the standard error comes out as 0, and the interval would be
    certain of a difference of a single prompt, or of rounding errors. Equal is what lies within a tenth of a step.
    """
    return len(values) >= MIN_SEEDS and max(values) - min(values) > max(resolution / 10, ROUNDING)


def pearson(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson's r, 0.89 in the paper's pilot; NaN with fewer than three points or without spread."""
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(stats.pearsonr(x, y).statistic)


def correlation_interval(rs: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean of one r per seed and its t interval, both on Fisher's scale atanh(r), where r is roughly normal."""
    return Interval(*(math.tanh(bound) for bound in t_interval(_fishers_z(rs), confidence)))


def correlation_p(rs: Sequence[float]) -> float:
    """Two-sided p-value of the t test that the mean of one Fisher's z per seed is 0; NaN with fewer than two seeds.

    The interval of :func:`correlation_interval` leaves 0 out where p is below 1 - confidence.
    """
    return float(stats.ttest_1samp(_fishers_z(rs), 0.0).pvalue) if len(rs) > 1 else math.nan


def _fishers_z(rs: Sequence[float]) -> list[float]:
    limit = 1 - 1e-12  # atanh(1) is infinite
    return [math.atanh(min(max(r, -limit), limit)) for r in rs]
