"""From samples to numbers: each benchmark's scores, and the averages over domains and over all benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
    ``num_tokens``: mean length of a response."""

    name: str
    title: str
    domain: str
    units: tuple[str, ...]
    rewards_PG: np.ndarray
    majority_P: np.ndarray
    group_P: tuple[str, ...]
    truncated: float
    num_tokens: float

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
    )


def averages(scores: Sequence[BenchmarkScores], seed: int) -> dict[str, Interval]:
    """Of each domain its mean over benchmarks, and ``overall``: the mean over all benchmarks, each with equal weight,
    as in the paper's table (not the mean of the domains' means)."""
    return _averages({score.name: mean_at_n(score.rewards_PG) for score in scores}, scores, seed)


def differences(first: Sequence[BenchmarkScores], other: Sequence[BenchmarkScores], seed: int) -> dict[str, Interval]:
    """:func:`averages` of ``other`` minus ``first`` on the same prompts, which are resampled together.

    ValueError for other prompts.
    """
    if [(s.name, s.units) for s in first] != [(s.name, s.units) for s in other]:
        raise ValueError("models were asked different prompts")
    change = {a.name: mean_at_n(b.rewards_PG) - mean_at_n(a.rewards_PG) for a, b in zip(first, other, strict=True)}
    return _averages(change, first, seed)


def _averages(values: Mapping[str, np.ndarray], scores: Sequence[BenchmarkScores], seed: int) -> dict[str, Interval]:
    """``values``: benchmark to ``[P]``."""
    found = {}
    for domain in DOMAINS:
        own = {score.name: values[score.name] for score in scores if score.domain == domain}
        if own:
            found[domain] = stratified(own, seed)
    return {**found, "overall": stratified(values, seed)}
