"""Claims and what was measured of them: one number per seed, its 95 % interval over seeds, and the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from copd_engine.evaluation.scores import Interval as PromptInterval
from copd_engine.evaluation.scores import stratified
from copd_engine.report.run import phase_changes
from copd_engine.study.config import PILOT, ClaimConfig, StudyConfig, variant_of
from copd_engine.study.results import Results
from copd_engine.study.statistics import (
    MIN_SEEDS,
    ROUNDING,
    Interval,
    can_decide,
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

    ``num_seeds``: of the study; ``by_seed`` has fewer where a unit is not finished, or has no such number.
    ``prompts``: the interval that the choice of held-out prompts alone gives, with these trained models.
    ``note``: counts behind the number. ``top_k``: the k of its overlap, None for a claim about something else.
    """

    claim: ClaimConfig
    by_seed: dict[int, float]
    interval: Interval | None
    outcome: Outcome
    survives_correction: bool
    num_seeds: int
    prompts: PromptInterval | None = None
    note: str = ""
    top_k: int | None = None

    @property
    def is_complete(self) -> bool:
        return len(self.by_seed) == self.num_seeds

    @property
    def is_tested(self) -> bool:
        """It could be decided: every seed has a number, and there are enough for an interval that decides."""
        return self.is_complete and self.num_seeds >= MIN_SEEDS


@dataclass
class _Numbers:
    """``resolution``: the step in which the numbers are counted. ``counter_example``: a seed in which the claim was
    seen to fail, whatever the mean over seeds is."""

    by_seed: dict[int, float] = field(default_factory=dict)
    prompts: PromptInterval | None = None
    note: str = ""
    resolution: float = ROUNDING
    counter_example: bool = False


def measure_claims(study: StudyConfig, results: Results) -> list[Measured]:
    """All claims of the study, in its order.

    A claim is not decided before every seed has its number: which seeds are missing may depend on what they would say.
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
    values, num_seeds = list(numbers.by_seed.values()), len(results.seeds)
    if not values:
        outcome: Outcome = "not decided" if numbers.note else "missing"
        return Measured(claim, {}, None, outcome, False, num_seeds, note=numbers.note, top_k=top_k)
    interval_of = correlation_interval if is_correlation else t_interval
    interval = interval_of(values)
    outcome, survives = "not decided", False
    if len(values) == num_seeds and can_decide(values, numbers.resolution):
        outcome = verdict(interval)
        if outcome == "holds" and numbers.counter_example:
            outcome = "not decided"
        survives = outcome != "not decided" and verdict(interval_of(values, 1 - 0.05 / num_claims)) == outcome
    of_claim = (numbers.prompts, numbers.note, top_k)
    return Measured(claim, numbers.by_seed, interval, outcome, survives, num_seeds, *of_claim)


def _accuracy(claim: ClaimConfig, results: Results) -> _Numbers:
    """Models of one seed are compared on equal held-out prompts, each sampled with equal random numbers."""
    better, than = str(claim.better), str(claim.than)
    a, b = results.accuracies(better, claim.domain), results.accuracies(than, claim.domain)
    by_seed = {seed: a[seed] - b[seed] for seed in a if seed in b}
    differences = _differences_by_prompt(better, than, claim.domain, by_seed, results)
    if not differences:
        return _Numbers(by_seed)
    shared = any(results.prompts_are_shared(variant_of(better), domain) for domain in differences)
    most = max(len(values_P) for of_seeds in differences.values() for values_P in of_seeds.values())
    return _Numbers(by_seed, _over_prompts(differences, shared), resolution=1 / (most * len(differences)))


def _differences_by_prompt(
    better: str, than: str, domain: str, seeds: Mapping[int, float], results: Results
) -> dict[str, dict[int, np.ndarray]]:
    """Score of ``better`` minus that of ``than`` for each held-out prompt, ``[P]``, by domain and seed."""
    found: dict[str, dict[int, np.ndarray]] = {}
    for seed in seeds:
        ours, theirs = results.scores(better, seed), results.scores(than, seed)
        if ours is None or theirs is None:
            return {}
        for name in ours if domain == "average" else (domain,):
            found.setdefault(name, {})[seed] = ours[name] - theirs[name]
    return found


def _over_prompts(differences: Mapping[str, Mapping[int, np.ndarray]], shared: bool) -> PromptInterval | None:
    """Bootstrap of the paired differences over prompts, these trained models given.

    Prompts that each seed generated for itself are resampled within seed and domain. Where all seeds answer the same
    rows of a file (``shared``), a row that is drawn is drawn for all of them: their differences are averaged row by row
    and resampled once per domain. That is right for generated prompts that stand beside files too, as any pairing of
    independent draws is; None where seeds do not have equally many of them.
    """
    if not shared:
        return stratified({f"{s}/{d}": v for d, by_seed in differences.items() for s, v in by_seed.items()}, seed=0)
    if any(len({len(v) for v in by_seed.values()}) > 1 for by_seed in differences.values()):
        return None
    return stratified({d: np.mean(list(by_seed.values()), axis=0) for d, by_seed in differences.items()}, seed=0)


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
    """By seed: the measure minus what it is to be above, step by step. Against a level at every step but 0; against
    another variant at the steps that both measured after :func:`_first_difference`."""
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
            begin = _first_difference(results, (variant, claim.than), seed) if curve and other else 0
            values = [value - other[step] for step, value in curve.items() if step > begin and step in other]
        if values:
            found[seed] = values
    return found


def _first_difference(results: Results, variants: Sequence[str], seed: int) -> int:
    """The step after which two variants may differ: up to the end of its first phase I CoPD trains its branches as
    independent experts are, so whichever of the two is CoPD says; of two the one whose phase ends first. 0 where
    neither is CoPD: experts are in phase I for good."""
    ends = []
    for variant in variants:
        if results.method(variant) == "copd":
            records = results.records(variant, seed)
            ends.append(max((r["step"] for r in records if (r.get("cycle"), r.get("phase")) == (1, "rl")), default=0))
    return min(ends, default=0)


def _above(claim: ClaimConfig, results: Results) -> _Numbers:
    differences = _differences(claim, results)
    return _Numbers({s: float(np.mean(v)) for s, v in differences.items()}, note=_count_above(differences))


def _stays_above(claim: ClaimConfig, results: Results) -> _Numbers:
    """The mean of the minima may be above 0 by seeds that were far above it: none may have been below at any step."""
    differences = _differences(claim, results)
    minima = {s: min(v) for s, v in differences.items()}
    is_below = any(minimum <= 0 for minimum in minima.values())
    return _Numbers(minima, note=_count_above(differences), counter_example=is_below)


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
        why = "too few students below their teacher, or " if per_headroom else ""
        return _Numbers(note=f"{why}overlap or gain is the same for all students" if is_finished else "")
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
    pooled = f"{test}; all {len(x)} points together: r = {pearson(x, y):.2f}"
    num_left_out = len(results.pilot_points(list(by_seed))) - len(x)
    return pooled + (f"; {num_left_out} students near their teacher left out" if num_left_out else "")


def overlap_and_gain(
    results: Results, seeds: Sequence[int], per_headroom: bool = False
) -> tuple[list[float], list[float]]:
    """The pilot's points of these seeds. ``per_headroom``: gain / (teacher's accuracy - the student's before), of the
    points with :attr:`~copd_engine.study.results.PilotPoint.has_headroom`."""
    points = results.pilot_points(seeds)
    if not per_headroom:
        return [p.overlap for p in points], [p.gain for p in points]
    below = [p for p in points if p.has_headroom]
    return [p.overlap for p in below], [p.gain / p.headroom for p in below]
