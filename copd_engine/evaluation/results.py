"""From samples to numbers: each benchmark's scores, and the averages over domains and over all benchmarks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from copd_engine.evaluation.scores import (
    Interval,
    bootstrap,
    majority_score,
    mean_at_n,
    pass_at_k,
    powers_up_to,
    stratified,
)

#: In the order of the paper's table.
DOMAINS = ("image", "text", "video")


@dataclass(frozen=True)
class BenchmarkScores:
    """``rewards_PG`` fp64 and ``majority_P``: of each unit (a prompt, or prompts that count together), by the order of
    ``units``. ``group_P``: a unit's group, '' without one. ``truncated``: share of responses cut at the length limit;
    ``num_tokens``: mean length of a response. ``verifier_failures``: kind to number of comparisons that ended without a
    result, their responses scored 0."""

    name: str
    title: str
    domain: str
    units: tuple[str, ...]
    rewards_PG: np.ndarray
    majority_P: np.ndarray
    group_P: tuple[str, ...]
    truncated: float
    num_tokens: float
    verifier_failures: Mapping[str, int] = field(default_factory=dict)

    def to_dict(self, seed: int) -> dict[str, Any]:
        """For ``eval.json``; intervals are 95 % bootstraps over units."""
        mean_P = mean_at_n(self.rewards_PG)
        num_samples = self.rewards_PG.shape[1]
        groups = {}
        for group in sorted(set(self.group_P) - {""}):
            chosen = np.array(self.group_P) == group
            groups[group] = {"mean": float(mean_P[chosen].mean()), "num_prompts": int(chosen.sum())}
        return {
            "title": self.title,
            "domain": self.domain,
            "num_prompts": len(self.units),
            "num_samples": num_samples,
            "mean": bootstrap(mean_P, seed)._asdict(),
            "pass": {
                str(k): bootstrap(pass_at_k(self.rewards_PG, k), seed)._asdict() for k in powers_up_to(num_samples)
            },
            "maj": bootstrap(self.majority_P, seed)._asdict(),
            "truncated": self.truncated,
            "mean_num_tokens": self.num_tokens,
            "verifier_failures": dict(self.verifier_failures),
            "groups": groups,
        }


def collect(
    name: str,
    title: str,
    domain: str,
    prompts: Sequence[tuple[str, Sequence[Mapping[str, Any]]]],
    groups: Mapping[str, str],
    together: Mapping[str, str],
) -> BenchmarkScores:
    """Scores of ``prompts``: (uid, its records in the order of the samples), all with equally many.

    ``groups``: uid to group. ``together``: uid to unit, where several prompts count as one: sample g of a unit is as
    good as the worst of its prompts' samples g, and so is its majority.
    """
    rewards: dict[str, list[list[float]]] = {}
    majorities: dict[str, list[float]] = {}
    group_of: dict[str, str] = {}
    for uid, records in prompts:
        unit = together.get(uid, uid)
        own = [float(record["reward"]) for record in records]
        rewards.setdefault(unit, []).append(own)
        majorities.setdefault(unit, []).append(majority_score([record["answer"] for record in records], own))
        group_of.setdefault(unit, groups.get(uid, ""))
    records = [record for _, found in prompts for record in found]
    failures: Counter[str] = Counter()
    for record in records:
        failures.update(record.get("verifier_failures", {}))
    return BenchmarkScores(
        name=name,
        title=title,
        domain=domain,
        units=tuple(rewards),
        rewards_PG=np.array([np.min(rows, axis=0) for rows in rewards.values()]),
        majority_P=np.array([min(values) for values in majorities.values()]),
        group_P=tuple(group_of.values()),
        truncated=float(np.mean([record["finish_reason"] == "length" for record in records])),
        num_tokens=float(np.mean([record["num_tokens"] for record in records])),
        verifier_failures=dict(failures),
    )


def averages(scores: Sequence[BenchmarkScores], seed: int) -> dict[str, Interval]:
    """Of each domain its mean over benchmarks, and ``overall``: the mean over all benchmarks, each with equal weight,
    as in the paper's table (not the mean of the domains' means)."""
    return _averages({score.name: mean_at_n(score.rewards_PG) for score in scores}, scores, seed)


def differences(first: Sequence[BenchmarkScores], other: Sequence[BenchmarkScores], seed: int) -> dict[str, Interval]:
    """:func:`averages` of ``other`` minus ``first`` over the benchmarks of both, on those units that both were asked,
    which are resampled together; {} where they share none. :func:`unpaired` says what that leaves out."""
    of_other = {score.name: score for score in other}
    change: dict[str, np.ndarray] = {}
    for score in first:
        if score.name in of_other and (common := _common(score, of_other[score.name])):
            change[score.name] = _of_units(of_other[score.name], common) - _of_units(score, common)
    return _averages(change, [score for score in first if score.name in change], seed) if change else {}


class Unpaired(NamedTuple):
    """A benchmark's units that one model was asked, the other one, and both."""

    title: str
    num_first: int
    num_other: int
    num_both: int


def unpaired(first: Sequence[BenchmarkScores], other: Sequence[BenchmarkScores]) -> list[Unpaired]:
    """Benchmarks of which :func:`differences` leaves out units, or all."""
    of_first, of_other = ({score.name: score for score in scores} for scores in (first, other))
    found = []
    for name, score in {**of_other, **of_first}.items():
        a, b = (set(scores[name].units) if name in scores else set() for scores in (of_first, of_other))
        if a != b:
            found.append(Unpaired(score.title, len(a), len(b), len(a & b)))
    return found


def _common(a: BenchmarkScores, b: BenchmarkScores) -> list[str]:
    """Units of both, in the order of ``a``."""
    others = set(b.units)
    return [unit for unit in a.units if unit in others]


def _of_units(score: BenchmarkScores, units: Sequence[str]) -> np.ndarray:
    """mean@n of ``units``, ``[P]``."""
    row = {unit: index for index, unit in enumerate(score.units)}
    return mean_at_n(score.rewards_PG)[[row[unit] for unit in units]]


def _averages(values: Mapping[str, np.ndarray], scores: Sequence[BenchmarkScores], seed: int) -> dict[str, Interval]:
    """``values``: benchmark to ``[P]``."""
    found = {}
    for domain in DOMAINS:
        own = {score.name: values[score.name] for score in scores if score.domain == domain}
        if own:
            found[domain] = stratified(own, seed)
    return {**found, "overall": stratified(values, seed)}
