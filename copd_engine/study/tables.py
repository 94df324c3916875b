"""The tables of a study's page as text: claims, accuracies, what it took."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from copd_engine.study.claims import Measured, Outcome
from copd_engine.study.config import TableConfig
from copd_engine.study.results import PilotPoint, Results, of_seeds
from copd_engine.study.statistics import MIN_SEEDS, Interval, t_interval

OUTCOMES: tuple[Outcome, ...] = ("holds", "does not hold", "not decided", "missing")
MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Table:
    """Text cells, the first of each row its label. ``note`` stands above the table."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""

    def markdown(self) -> str:
        lines = [self.columns, ["---", *("---:" for _ in self.columns[1:])], *self.rows]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def claims_table(claims: list[Measured]) -> Table:
    """Claim, what was measured, verdict."""
    rows = [
        [m.claim.claim, what_is_measured(m), _measured(m), _prompts(m), _seeds(m), m.note or "-", _outcome(m)]
        for m in claims
    ]
    columns = ["claim", "number", "mean [95 % over seeds]", "[95 % over prompts]", "by seed", "counts", "verdict"]
    return Table("Claims", columns, rows, claims_note(claims))


def claims_note(claims: list[Measured]) -> str:
    """How many claims were tested, how many were decided, and what testing so many means."""
    tested = [m for m in claims if m.is_tested]
    count = {outcome: sum(m.outcome == outcome for m in tested) for outcome in OUTCOMES}
    outcomes = f"{count['holds']} hold, {count['does not hold']} do not hold, {count['not decided']} are not decided"
    missing = sum(m.outcome == "missing" for m in claims)
    waiting = len(claims) - len(tested) - missing
    others = f"; {waiting} others have numbers of too few seeds" if waiting else ""
    others += f", {missing} are missing" if missing else ""
    survive = sum(m.survives_correction for m in claims)
    corrected = 100 * (1 - 0.05 / max(1, len(claims)))
    of_all = f"{len(tested)} of {len(claims)}" if len(tested) < len(claims) else f"{len(claims)}"
    return (
        f"{of_all} claims were tested: {outcomes}{others}. A claim holds if its whole 95 % interval over seeds "
        "(Student's t) is above 0, and does not hold if all of it is below; with fewer than "
        f"{MIN_SEEDS} seeds, while a seed has no number, and where all seeds give the same number, it is not decided. "
        f"With that many claims about {0.05 * len(tested):.1f} would be decided by chance if nothing were true; of the "
        f"{count['holds'] + count['does not hold']} decided ones {survive} (marked *) stay so with intervals at "
        f"{corrected:.2f} % (Bonferroni, for {len(claims)} claims)."
    )


def what_is_measured(m: Measured) -> str:
    """The number behind a claim, in words."""
    claim = m.claim
    if claim.kind == "accuracy":
        return f"{claim.better} {MINUS} {claim.than}, {claim.domain} (points)"
    k = "" if m.top_k is None else f" (k = {m.top_k})"
    if claim.kind == "phase":
        phase = "I but the first" if claim.phase == "rl" else "II"
        return f"how far {claim.measure}{k} of {claim.variant} {claim.direction} over a phase {phase}"
    if claim.kind in ("pilot", "pilot_headroom"):
        gain = "gain" if claim.kind == "pilot" else "gain / (teacher's accuracy - accuracy before)"
        return f"r of {gain.replace('-', MINUS)} and starting overlap{k}"
    than = claim.than if claim.level is None else f"{claim.level:g}"
    mean = "mean" if claim.kind == "above" else "smallest"
    return f"{mean} of {claim.measure}{k} of {claim.variant} {MINUS} {than}"


def _number(m: Measured, value: float) -> str:
    return f"{100 * value:+.1f}" if m.claim.kind == "accuracy" else f"{value:+.3f}"


def _measured(m: Measured) -> str:
    if m.interval is None:
        return "-"
    bounds = "[one seed]" if len(m.by_seed) == 1 else _bounds(m, m.interval.low, m.interval.high)
    return f"{_number(m, m.interval.value)} {bounds}{of_seeds(len(m.by_seed), m.num_seeds)}"


def _bounds(m: Measured, low: float, high: float) -> str:
    return f"[{_number(m, low)}, {_number(m, high)}]"


def _prompts(m: Measured) -> str:
    return "-" if m.prompts is None else _bounds(m, m.prompts.low, m.prompts.high)


def _seeds(m: Measured) -> str:
    """In the order of the seeds, which are named where some are missing."""
    names = {seed: "" if m.is_complete else f"seed {seed}: " for seed in m.by_seed}
    return ", ".join(names[seed] + _number(m, value) for seed, value in m.by_seed.items()) or "-"


def _outcome(m: Measured) -> str:
    return m.outcome + (" *" if m.survives_correction else "")


def accuracy_table(table: TableConfig, results: Results) -> Table:
    """Accuracy in % per model and domain, mean over seeds and half the width of its 95 % interval; what was spent."""
    domains = results.domains(list(table.rows.values()))
    rows = []
    for label, model in table.rows.items():
        num_found = len(_rows(model, results))
        cells = [label + (of_seeds(num_found, len(results.seeds)) if num_found else "")]
        for domain in domains:
            # A model of some branches only, such as an expert of its own domain, has the domains of its run.
            found = [row["accuracy"].get(domain) for row in _rows(model, results)]
            values = [float(value) for value in found if value is not None]
            cells.append(_percent(t_interval(values)) if values else "-")
        rows.append([*cells, *(_spent(model, key, results) for key in ("steps", "rollouts", "train_flops"))])
    note = (
        "Accuracy in %, mean over seeds ± half of its 95 % interval (Student's t). Steps, rollouts and FLOPs of "
        "training: of all models that went into it, mean over seeds."
    )
    alone = [label for label, model in table.rows.items() if model.partition("/")[2].startswith("branch:")]
    if alone:
        note += f" Of a branch alone ({'; '.join(alone)}) they are its own, without those of its teachers."
    return Table(table.title, ["model", *domains, "steps", "rollouts", "FLOPs"], rows, note)


def _rows(model: str, results: Results) -> list[dict[str, Any]]:
    return [row for seed in results.seeds if (row := results.row(model, seed)) is not None]


def _percent(interval: Interval) -> str:
    half = (interval.high - interval.low) / 2
    return f"{100 * interval.value:.1f}" + (f" ± {100 * half:.1f}" if half == half else "")


def _spent(model: str, key: str, results: Results) -> str:
    values = [row[key] for row in _rows(model, results) if row.get(key) is not None]
    if not values:
        return "-"
    mean = sum(values) / len(values)
    return f"{mean:.2e}" if key == "train_flops" else f"{mean:,.0f}"


def pilot_table(results: Results, seeds: list[int]) -> Table:
    """The points of the pilot, mean over seeds for each student."""
    students: dict[tuple[str, float], list[PilotPoint]] = {}
    for point in results.pilot_points(seeds):
        students.setdefault((point.student, point.fraction), []).append(point)
    rows = []
    for (student, fraction), points in students.items():
        label = f"{fraction:g} of the way to the {student} expert{of_seeds(len(points), len(results.seeds))}"
        distances = [_mean(points, key, "{:.3f}") for key in ("overlap", "sum_min", "symmetric_kl")]
        accuracies = [_mean(points, key, "{:.1f}", 100) for key in ("before", "after")]
        gain = [_percent(t_interval([p.gain for p in points])), _mean(points, "gain_stderr", "{:.1f}", 100)]
        shares = [p.gain / p.headroom for p in points if p.has_headroom]
        share = _percent(t_interval(shares)) + of_seeds(len(shares), len(points)) if shares else "-"
        rows.append([label, *distances, *accuracies, *gain, share])
    k = f"k = {results.top_k('pilot')}"
    columns = ["student", f"overlap, {k}", "Σ min(p, q)", "symmetric KL", "before", "after", "gain", "s.e. of one gain"]
    # The points of a seed share their teacher.
    teacher = t_interval([results.pilot_points([seed])[0].teacher_accuracy for seed in seeds])
    note = (
        "Distance to the teacher at the start, on the student's responses to all test prompts of the teacher's domain; "
        f"accuracy there in %, that of the teacher is {_percent(teacher)}. Gain: mean over seeds ± half of its 95 % "
        "interval; beside it the standard error of a single seed's gain by the choice of prompts, as if before and "
        "after were measured on different ones. Headroom: what the teacher is above the student before; seeds in which "
        "that is at most two such standard errors are left out of it."
    )
    return Table("Pilot: students", [*columns, "of the headroom"], rows, note)


def _mean(points: list[PilotPoint], key: str, form: str, factor: float = 1.0) -> str:
    return form.format(factor * sum(getattr(p, key) for p in points) / len(points))
