"""Claims and what was measured of them: one number per seed, its 95 % interval over seeds, and the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from copd_engine.evaluation.scores import Interval as PromptInterval
from copd_engine.evaluation.scores import stratified
from copd_engine.report.run import phase_changes
from copd_engine.study.config import PILOT, ClaimConfig, StudyConfig
from copd_engine.study.results import Results
from copd_engine.study.statistics import (
    Interval,
    correlation_interval,
    correlation_p,
    pearson,
    t_interval,
    verdict,
)

Outcome = Literal["holds", "does not hold", "not decided", "missing"]


@dataclass(frozen=True)
class Measured:
    """A claim's number by seed. Positive speaks for the claim.

    ``prompts``: the interval that the choice of held-out prompts alone gives, with these trained models.
    ``note``: counts behind the number. ``top_k``: the k of its overlap, None for a claim about something else.
    """

    claim: ClaimConfig
    by_seed: dict[int, float]
    interval: Interval | None
    outcome: Outcome
    survives_correction: bool
    prompts: PromptInterval | None = None
    note: str = ""
    top_k: int | None = None


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
        "pilot_headroom": _pilot,
    }[claim.kind](claim, results)
    is_correlation = claim.kind in ("pilot", "pilot_headroom")
    of_overlap = PILOT if is_correlation else claim.variant if claim.measure == "overlap" else None
    top_k = None if of_overlap is None else results.top_k(of_overlap)
    values = list(numbers.by_seed.values())
    if not values:
        outcome: Outcome = "not decided" if numbers.note else "missing"
        return Measured(claim, {}, None, outcome, False, note=numbers.note, top_k=top_k)
    interval_of = correlation_interval if is_correlation else t_interval
    interval = interval_of(values)
    outcome = verdict(interval)
    corrected = verdict(interval_of(values, 1 - 0.05 / num_claims))
    survives = outcome != "not decided" and corrected == outcome
    return Measured(claim, numbers.by_seed, interval, outcome, survives, numbers.prompts, numbers.note, top_k)


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
    numbers, as_claimed, total, is_finished = _Numbers(), 0, 0, False
    for seed in results.seeds:
        if (variant, seed) not in results.finished:
            continue
        is_finished = True
        changes = []
        for change in phase_changes(results.records(variant, seed), [measure]):
            if change.span.phase == "rl" and change.span.cycle == 1:
                continue  # it starts from equal models, which any training drives apart
            before, after = change.before[measure], change.after[measure]
            if change.span.phase == claim.phase and before is not None and after is not None:
                changes.append(sign * (after - before))
        if changes:
            numbers.by_seed[seed] = float(np.mean(changes))
            as_claimed += sum(change > 0 for change in changes)
            total += len(changes)
    if total:
        numbers.note = f"{claim.direction} in {as_claimed} of {total} phases"
    elif is_finished:
        numbers.note = "no such phase was measured"
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
    """One r per seed, and the t test of their Fisher's z: the points of a seed share their teacher, so all points
    together are no independent sample, and their r is a description."""
    per_headroom = claim.kind == "pilot_headroom"
    by_seed = correlations(results, per_headroom)
    if not by_seed:
        is_finished = any(variant == PILOT for variant, _ in results.finished)
        return _Numbers(note="overlap or gain is the same for all students" if is_finished else "")
    return _Numbers(by_seed, note=correlation_note(results, per_headroom))


def correlations(results: Results, per_headroom: bool = False) -> dict[int, float]:
    """Pearson's r of the pilot's points, by seed, without seeds that have none."""
    finished = [seed for seed in results.seeds if (PILOT, seed) in results.finished]
    rs = {seed: pearson(*overlap_and_gain(results, [seed], per_headroom)) for seed in finished}
    return {seed: r for seed, r in rs.items() if r == r}


def correlation_note(results: Results, per_headroom: bool = False) -> str:
    """p of the rs of the seeds, and the r of all their points as a description."""
    by_seed = correlations(results, per_headroom)
    x, y = overlap_and_gain(results, list(by_seed), per_headroom)
    p = correlation_p(list(by_seed.values()))
    test = f"p = {p:.2g} over {len(by_seed)} seeds" if p == p else f"no p, {len(by_seed)} seed(s)"
    return f"{test}; all {len(x)} points together: r = {pearson(x, y):.2f}"


def overlap_and_gain(
    results: Results, seeds: Sequence[int], per_headroom: bool = False
) -> tuple[list[float], list[float]]:
    """The pilot's points of these seeds. ``per_headroom``: gain / (teacher's accuracy - the student's before), without
    students that were as good as their teacher."""
    points = [p for seed in seeds if (PILOT, seed) in results.finished for p in results.result(PILOT, seed)["points"]]
    if not per_headroom:
        return [p["overlap"] for p in points], [p["gain"] for p in points]
    below = [p for p in points if p["before"] < p["teacher_accuracy"]]
    return [p["overlap"] for p in below], [p["gain"] / (p["teacher_accuracy"] - p["before"]) for p in below]
