"""The tables of a study's page as text: claims, accuracies, what it took."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from copd_engine.study.claims import Measured, Outcome
from copd_engine.study.config import TableConfig
from copd_engine.study.results import Results
from copd_engine.study.statistics import Interval, t_interval

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
    count = {outcome: sum(m.outcome == outcome for m in claims) for outcome in OUTCOMES}
    outcomes = f"{count['holds']} hold, {count['does not hold']} do not hold, {count['not decided']} are not decided"
    missing = f", {count['missing']} are missing" if count["missing"] else ""
    survive = sum(m.survives_correction for m in claims)
    corrected = 100 * (1 - 0.05 / max(1, len(claims)))
    return (
        f"{len(claims)} claims were tested: {outcomes}{missing}. A claim holds if its whole 95 % interval over seeds "
        "(Student's t) is above 0, and does not hold if all of it is below. With that many claims about "
        f"{0.05 * len(claims):.1f} would be decided by chance if nothing were true; of the "
        f"{count['holds'] + count['does not hold']} decided ones {survive} (marked *) stay so with intervals at "
        f"{corrected:.2f} % (Bonferroni)."
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
    return f"{_number(m, m.interval.value)} {bounds}"


def _bounds(m: Measured, low: float, high: float) -> str:
    return f"[{_number(m, low)}, {_number(m, high)}]"


def _prompts(m: Measured) -> str:
    return "-" if m.prompts is None else _bounds(m, m.prompts.low, m.prompts.high)


def _seeds(m: Measured) -> str:
    return ", ".join(_number(m, value) for value in m.by_seed.values()) or "-"


def _outcome(m: Measured) -> str:
    return m.outcome + (" *" if m.survives_correction else "")


def accuracy_table(table: TableConfig, results: Results) -> Table:
    """Accuracy in % per model and domain, mean over seeds and half the width of its 95 % interval; what was spent."""
    domains = results.domains(list(table.rows.values()))
    rows = []
    for label, model in table.rows.items():
        cells = [label]
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
    points: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for seed in seeds:
        for point in results.result("pilot", seed)["points"]:
            points.setdefault((point["student"], point["fraction"]), []).append(point)
    rows = []
    for (student, fraction), of_seeds in points.items():
        mean = {key: sum(p[key] for p in of_seeds) / len(of_seeds) for key in of_seeds[0] if key != "student"}
        accuracies = [f"{100 * mean[key]:.1f}" for key in ("before", "after")]
        gain = _percent(t_interval([p["gain"] for p in of_seeds]))
        below = [p for p in of_seeds if p["before"] < p["teacher_accuracy"]]
        shares = [p["gain"] / (p["teacher_accuracy"] - p["before"]) for p in below]
        share = _percent(t_interval(shares)) if shares else "-"
        distances = [f"{mean[key]:.3f}" for key in ("overlap", "sum_min", "symmetric_kl")]
        rows.append([f"{fraction:g} of the way to the {student} expert", *distances, *accuracies, gain, share])
    k = f"k = {results.top_k('pilot')}"
    columns = ["student", f"overlap, {k}", "Σ min(p, q)", "symmetric KL", "before", "after", "gain", "of the headroom"]
    teacher = t_interval([points["teacher_accuracy"] for points in _first_points(results, seeds)])
    note = (
        "Distance to the teacher at the start, on the student's states; accuracy on the teacher's domain in %, that of "
        f"the teacher is {_percent(teacher)}. Headroom: what the teacher is above the student before."
    )
    return Table("Pilot: students", columns, rows, note)


def _first_points(results: Results, seeds: list[int]) -> list[dict[str, Any]]:
    """One point of each seed: they share their teacher."""
    return [results.result("pilot", seed)["points"][0] for seed in seeds]
