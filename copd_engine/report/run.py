"""A run folder in memory, also of a run that is still going on or was stopped, and pure functions on its records."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from copd_engine.metrics import METRICS_FILE, read_jsonl, read_metrics
from copd_engine.types import UserError

Record = dict[str, Any]

SMOOTHING_STEPS = 5
METHOD_NAMES = {
    "copd": "CoPD",
    "expert": "independent experts",
    "mixed": "mixed RLVR",
    "static_opd": "static OPD",
    "mopd": "MOPD",
}


@dataclass(frozen=True)
class Run:
    """A run folder in memory. ``branches`` and ``domains`` are in the order of the config."""

    dir: Path
    records: list[Record]
    baselines: dict[str, list[Record]]
    samples: list[Record]
    result: dict[str, Any] | None
    config: dict[str, Any]
    config_text: str
    branches: tuple[str, ...]
    domains: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def method(self) -> str:
        return str((self.result or {}).get("method") or self.config.get("method") or "run")

    @property
    def last_step(self) -> int:
        return max(int(record["step"]) for record in self.records)


def load_run(run_dir: str | Path) -> Run:
    """Read a run folder. Raises :class:`UserError` where there is no folder, no metrics, or a file that is broken."""
    folder = Path(run_dir)
    if not folder.is_dir():
        raise UserError(f"run folder {folder} does not exist")
    records = _usable(read_metrics(folder))
    if not records:
        raise UserError(f"{folder / METRICS_FILE} holds no step yet")
    missing = []

    config_path = folder / "config.yaml"
    config_text = config_path.read_text(errors="replace") if config_path.is_file() else ""
    config: Any = {}
    if config_text:
        try:
            config = yaml.safe_load(config_text)
        except yaml.YAMLError:
            missing.append("config.yaml is not valid YAML; it is shown as it stands.")
    else:
        missing.append("config.yaml: not in the run folder.")
    config = config if isinstance(config, dict) else {}

    result = None
    if (folder / "result.json").is_file():
        try:
            result = json.loads((folder / "result.json").read_text(), parse_constant=lambda _: None)
            if not isinstance(result, dict) or not isinstance(result.get("rows"), list):
                raise ValueError("it has no rows")
        except ValueError as error:
            raise UserError(f"{folder / 'result.json'} is not a result file ({error})") from None
    else:
        planned = planned_steps(config)
        of_planned = f" of {planned}" if planned else ""
        done = max(record["step"] for record in records)
        missing.append(f"The result table: the run is not finished (step {done}{of_planned}), it has no result.json.")

    baselines = {}
    for path in sorted((folder / "baselines").glob("*/")):
        if (path / METRICS_FILE).is_file():
            baselines[path.name] = _usable(read_metrics(path))
        else:
            missing.append(f"Baseline {path.name}: it has no {METRICS_FILE}.")
    samples = read_jsonl(folder / "samples.jsonl") if (folder / "samples.jsonl").is_file() else []
    if not samples:
        missing.append("Samples: none were written.")
    if not any(nested(record, "diagnostics", "pairs") for record in records):
        missing.append("Overlap, Σmin and KL between branches: no diagnostics were written.")
    if not any(record.get("evaluate") for record in records):
        missing.append("Held-out accuracy during training: no evaluation was written.")

    configured = [branch.get("name") for branch in config.get("branches") or [] if isinstance(branch, dict)]
    written = [name for record in records for name in record.get("branches") or {}]
    evaluated = [row for record in records for row in (record.get("evaluate") or {}).values() if row]
    # Mixed RLVR trains one model on the prompts of all branches: the config's names are then no models.
    own_models = written if config.get("method") == "mixed" else [*configured, *written]
    branches = distinct(own_models) or distinct(configured)
    domains = distinct(
        [*((result or {}).get("domains") or []), *(d for row in evaluated for d in row if d != "average"), *branches]
    )
    return Run(folder, records, baselines, samples, result, config, config_text, branches, domains, tuple(missing))


def _usable(records: list[Record]) -> list[Record]:
    return [record for record in records if isinstance(record.get("step"), int)]


def planned_steps(config: dict[str, Any]) -> int | None:
    """The steps of a fixed CoPD schedule; of other runs the config alone does not say how many there are."""
    schedule = config.get("schedule") or {}
    if config.get("method", "copd") != "copd" or schedule.get("adaptive"):
        return None
    try:
        return int(schedule["cycles"]) * (int(schedule["rl_steps"]) + int(schedule["opd_steps"]))
    except (KeyError, TypeError, ValueError):
        return None


def distinct(names: Iterable[Any]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(str(name) for name in names if name))


def nested(record: Any, *keys: str) -> Any:
    """``record[a][b]…``, None where anything on the way is missing or null."""
    for key in keys:
        record = record.get(key) if isinstance(record, dict) else None
    return record


# ------------------------------------------------------------------------------------------------ records -> numbers


@dataclass(frozen=True)
class PhaseSpan:
    """Consecutive steps of one phase, both ends included."""

    cycle: int
    phase: str
    first_step: int
    last_step: int


def phase_spans(records: Sequence[Record]) -> list[PhaseSpan]:
    """The phases in order; the base (step 0) belongs to none."""
    spans: list[PhaseSpan] = []
    for record in records:
        step, phase, cycle = record["step"], record.get("phase"), int(record.get("cycle") or 0)
        if step < 1 or not phase:
            continue
        if spans and (spans[-1].cycle, spans[-1].phase) == (cycle, phase):
            spans[-1] = PhaseSpan(cycle, phase, spans[-1].first_step, step)
        else:
            spans.append(PhaseSpan(cycle, phase, step, step))
    return spans


def curve(records: Sequence[Record], value: Callable[..., Any], *args: Any) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and ``value(record, *args)`` of each; NaN where a step has none."""
    values = [value(record, *args) for record in records]
    numbers = [float(v) if isinstance(v, int | float) else math.nan for v in values]
    return np.array([record["step"] for record in records], dtype=float), np.array(numbers, dtype=float)


def smooth(values: np.ndarray, window: int = SMOOTHING_STEPS) -> np.ndarray:
    """Centred mean over ``window`` values, fewer at the ends; NaN are left out of a mean and stay NaN themselves."""
    known = ~np.isnan(values)
    kernel = np.ones(window)
    # mode "same" would return the kernel's length for a shorter input
    reach = slice(window // 2, window // 2 + len(values))
    sums = np.convolve(np.where(known, values, 0.0), kernel, mode="full")[reach]
    counts = np.convolve(known.astype(float), kernel, mode="full")[reach]
    return np.where(known, sums / np.maximum(counts, 1.0), np.nan)


def own_rollout(record: Record, branch: str, key: str) -> float | None:
    """A rollout number of a branch on its own domain; of a model without one (mixed RLVR) the mean over domains."""
    rollout = nested(record, "branches", branch, "rollout") or {}
    if branch in rollout:
        value = nested(rollout, branch, key)
        return value if isinstance(value, int | float) else None
    return mean(nested(rollout, domain, key) for domain in rollout)


def pair_value(record: Record, key: str, pair: tuple[str, str] | None = None) -> float | None:
    """A diagnostic of two branches, mean of both directions; of all pairs where ``pair`` is None."""
    pairs = nested(record, "diagnostics", "pairs") or []
    wanted = [p for p in pairs if pair is None or {p.get("student"), p.get("teacher")} == set(pair)]
    return mean(p.get(key) for p in wanted)


def diagnosed_pairs(records: Sequence[Record], branches: Sequence[str]) -> list[tuple[str, str]]:
    """Unordered pairs that occur, in the order of the branches."""
    seen = {
        frozenset((p.get("student"), p.get("teacher")))
        for record in records
        for p in nested(record, "diagnostics", "pairs") or []
    }
    return [pair for pair in itertools.combinations(branches, 2) if frozenset(pair) in seen]


@dataclass(frozen=True)
class PhaseChange:
    """Mean over all pairs, at the last diagnostics before a phase and at the last one inside it."""

    span: PhaseSpan
    before: dict[str, float | None]
    after: dict[str, float | None]


def phase_changes(records: Sequence[Record], keys: Sequence[str]) -> list[PhaseChange]:
    """How the branches moved apart or together in each phase. Phases without diagnostics of their own are left out."""
    measured = [record for record in records if nested(record, "diagnostics", "pairs")]
    changes = []
    for span in phase_spans(records):
        inside = [record for record in measured if span.first_step <= record["step"] <= span.last_step]
        earlier = [record for record in measured if record["step"] < span.first_step]
        if inside:
            start = (earlier or inside[:1])[-1]
            before = {key: pair_value(start, key) for key in keys}
            changes.append(PhaseChange(span, before, {key: pair_value(inside[-1], key) for key in keys}))
    return changes


def mean(values: Iterable[Any]) -> float | None:
    known = [float(value) for value in values if isinstance(value, int | float)]
    return sum(known) / len(known) if known else None


def known_points(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Without the NaN, so that a line joins its points across steps that were not measured."""
    known = ~np.isnan(y)
    return x[known], y[known]


def time_by_part(records: Sequence[Record]) -> dict[str, np.ndarray]:
    """Seconds per step of every part, largest first, and "other": what of ``step_s`` no part accounts for."""
    names = distinct(name for record in records for name in record.get("time_s") or {})
    parts = {name: np.nan_to_num(curve(records, nested, "time_s", name)[1]) for name in names}
    parts = {name: parts[name] for name in sorted(parts, key=lambda name: -parts[name].sum()) if parts[name].any()}
    total = curve(records, nested, "step_s")[1]
    other = np.maximum(np.nan_to_num(total) - sum(parts.values()), 0.0)
    if parts and other.sum() > 0.005 * sum(part.sum() for part in parts.values()):
        parts["other"] = other
    return parts
