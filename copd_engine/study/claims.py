"""Claims and what was measured of them: one number per seed, its 95 % interval over seeds, and the verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from copd_engine.evaluation.scores import Interval as PromptInterval
from copd_engine.evaluation.scores import stratified
from copd_engine.report.run import phase_changes
from copd_engine.study.config import PILOT, ClaimConfig, StudyConfig
from copd_engine.study.results import Results
from copd_engine.study.statistics import Correlation, Interval, correlation_interval, pearson, t_interval, verdict

Outcome = Literal["holds", "does not hold", "not decided", "missing"]


@dataclass(frozen=True)
class Measured:
    """A claim's number by seed. Positive speaks for the claim.

    ``prompts``: the interval that the choice of held-out prompts alone gives, with these trained models.
    ``note``: counts behind the number.
    """

    claim: ClaimConfig
    by_seed: dict[int, float]
    interval: Interval | None
    outcome: Outcome
    survives_correction: bool
    prompts: PromptInterval | None = None
    note: str = ""


@dataclass
class _Numbers:
    by_seed: dict[int, float] = field(default_factory=dict)
    prompts: PromptInterval | None = None
    note: str = ""


def measure_claims(study: StudyConfig, results: Results) -> list[Measured]:
    """All claims of the study, in its order.

    ``survives_correction``: the claim would also be decided by intervals at 1 - 0.05 / (number of claims), Bonferroni's
    correction for testing that many.
    """
    return [_measure(claim, results, len(study.claims)) for claim in study.claims]


def _measure(claim: ClaimConfig, results: Results, num_claims: int) -> Measured:
    numbers = {
        "accuracy": _accuracy,
        "phase": _phase,
        "above": _above,
        "stays_above": _stays_above,
        "pilot": _pilot,
    }[claim.kind](claim, results)
    values = list(numbers.by_seed.values())
    if not values:
        return Measured(claim, {}, None, "not decided" if numbers.note else "missing", False, note=numbers.note)
    interval_of = correlation_interval if claim.kind == "pilot" else t_interval
    interval = interval_of(values)
    outcome = verdict(interval)
    corrected = verdict(interval_of(values, 1 - 0.05 / num_claims))
    survives = outcome != "not decided" and corrected == outcome
    return Measured(claim, numbers.by_seed, interval, outcome, survives, numbers.prompts, numbers.note)


def _accuracy(claim: ClaimConfig, results: Results) -> _Numbers:
    """Models of one seed are compared on equal held-out prompts, each sampled with equal random numbers."""
    better, than = str(claim.better), str(claim.than)
    a, b = results.accuracies(better, claim.domain), results.accuracies(than, claim.domain)
    by_seed = {seed: a[seed] - b[seed] for seed in a if seed in b}
    return _Numbers(by_seed, _prompt_interval(better, than, claim.domain, by_seed, results))


def _prompt_interval(
    better: str, than: str, domain: str, seeds: Mapping[int, float], results: Results
) -> PromptInterval | None:
    """Bootstrap of the paired differences over the prompts within each seed and domain."""
    strata = {}
    for seed in seeds:
        ours, theirs = results.scores(better, seed), results.scores(than, seed)
        if ours is None or theirs is None:
            return None
        for name in ours if domain == "average" else (domain,):
            strata[f"{seed}/{name}"] = ours[name] - theirs[name]
    return stratified(strata, seed=0) if strata else None


def _phase(claim: ClaimConfig, results: Results) -> _Numbers:
    sign = -1.0 if claim.direction == "falls" else 1.0
    measure, variant = str(claim.measure), str(claim.variant)
    numbers, as_claimed, total = _Numbers(), 0, 0
    for seed in results.seeds:
        if (variant, seed) not in results.finished:
            continue
        changes = []
        for change in phase_changes(results.records(variant, seed), [measure]):
            before, after = change.before[measure], change.after[measure]
            if change.span.phase == claim.phase and before is not None and after is not None:
                changes.append(sign * (after - before))
        if changes:
            numbers.by_seed[seed] = float(np.mean(changes))
            as_claimed += sum(change > 0 for change in changes)
            total += len(changes)
    numbers.note = f"{claim.direction} in {as_claimed} of {total} phases"
    return numbers


def _differences(claim: ClaimConfig, results: Results) -> dict[int, list[float]]:
    """By seed: the measure minus what it is to be above, at every step from the end of the first phase I on."""
    variant, measure = str(claim.variant), str(claim.measure)
    found = {}
    for seed in results.seeds:
        curve = results.curve(variant, measure, seed)
        if claim.than is None:
            assert claim.level is not None
            level = claim.level
            values = [value - level for value in curve.values()]
        else:
            other = results.curve(claim.than, measure, seed)
            begin = _end_of_first_phase_1(results, variant, seed) if curve else 0
            values = [value - other[step] for step, value in curve.items() if step > begin and step in other]
        if values:
            found[seed] = values
    return found


def _end_of_first_phase_1(results: Results, variant: str, seed: int) -> int:
    """Up to it branches are trained as independent experts are."""
    steps = [r["step"] for r in results.records(variant, seed) if r.get("cycle") == 1 and r.get("phase") == "rl"]
    return max(steps, default=0)


def _above(claim: ClaimConfig, results: Results) -> _Numbers:
    differences = _differences(claim, results)
    return _Numbers({s: float(np.mean(v)) for s, v in differences.items()}, note=_count_above(differences))


def _stays_above(claim: ClaimConfig, results: Results) -> _Numbers:
    differences = _differences(claim, results)
    return _Numbers({s: min(v) for s, v in differences.items()}, note=_count_above(differences))


def _count_above(differences: Mapping[int, list[float]]) -> str:
    values = [value for of_seed in differences.values() for value in of_seed]
    return f"above at {sum(value > 0 for value in values)} of {len(values)} measurements"


def _pilot(claim: ClaimConfig, results: Results) -> _Numbers:
    """One r per seed: the points of a seed share their teacher, so all points together are no independent sample."""
    by_seed = {}
    for seed in results.seeds:
        if (PILOT, seed) in results.finished:
            r = pearson(*overlap_and_gain(results, [seed])).r
            if r == r:
                by_seed[seed] = r
    if not by_seed:
        is_finished = any(variant == PILOT for variant, _ in results.finished)
        return _Numbers(note="overlap or gain is the same for all students" if is_finished else "")
    pooled = pooled_correlation(results)
    num_points = len(overlap_and_gain(results, list(by_seed))[0])
    return _Numbers(by_seed, note=f"all {num_points} points: r = {pooled.r:.2f}, p = {pooled.p:.2g}")


def overlap_and_gain(results: Results, seeds: list[int]) -> tuple[list[float], list[float]]:
    """The pilot's points of these seeds."""
    points = [p for seed in seeds if (PILOT, seed) in results.finished for p in results.result(PILOT, seed)["points"]]
    return [p["overlap"] for p in points], [p["gain"] for p in points]


def pooled_correlation(results: Results) -> Correlation:
    """Pearson's r of the pilot's points of all seeds."""
    return pearson(*overlap_and_gain(results, list(results.seeds)))
