"""What the finished units of a study say, by seed."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from copd_engine.algorithms import EQUAL_FLOPS, EQUAL_STEPS
from copd_engine.config import RunConfig
from copd_engine.metrics import read_metrics
from copd_engine.report.run import Record, pair_value
from copd_engine.run_folder import RESULT, SCORES, file_name
from copd_engine.study.config import PILOT, StudyConfig
from copd_engine.study.plan import GENERATED, run_config, study_dir_of
from copd_engine.types import UserError


@dataclass(frozen=True)
class PilotPoint:
    """A student of the pilot in one seed; accuracies are those of ``num_prompts`` prompts."""

    student: str
    fraction: float
    overlap: float
    sum_min: float
    symmetric_kl: float
    before: float
    after: float
    gain: float
    teacher_accuracy: float
    num_prompts: int

    @property
    def headroom(self) -> float:
        return self.teacher_accuracy - self.before

    @property
    def has_headroom(self) -> bool:
        """The teacher is more than two standard errors above the student: divided by less, a gain is mostly noise."""
        return self.headroom > 2 * _stderr(self.teacher_accuracy, self.before, self.num_prompts)

    @property
    def gain_stderr(self) -> float:
        return _stderr(self.after, self.before, self.num_prompts)


def _stderr(a: float, b: float, num_prompts: int) -> float:
    """Standard error of the difference of two accuracies as if on different prompts: a point holds no scores by prompt,
    so what pairing would take off is not known. Scores between 0 and 1 vary at most as right and wrong do."""
    return math.sqrt((a * (1 - a) + b * (1 - b)) / num_prompts)


_POINT_KEYS = [key.name for key in fields(PilotPoint) if key.name != "num_prompts"]


class Results:
    """Reads each run folder once. What a unit that is not finished would say is left out of every answer."""

    def __init__(self, study: StudyConfig, fast: bool = False) -> None:
        self._study, self._fast = study, fast
        self.seeds = study.seeds
        self.root = study_dir_of(study)
        self.finished = {
            (variant, seed)
            for variant in (*study.variants, *([PILOT] if study.pilot else []))
            for seed in study.seeds
            if (self._folder(variant, seed) / RESULT).is_file()
        }

    def _folder(self, variant: str, seed: int) -> Path:
        return self.root / f"seed-{seed}" / variant

    @functools.cache  # noqa: B019  # lives as long as the page is being made
    def result(self, variant: str, seed: int) -> dict[str, Any]:
        result: dict[str, Any] = json.loads((self._folder(variant, seed) / RESULT).read_text())
        return result

    @functools.cache  # noqa: B019
    def _config(self, variant: str) -> RunConfig:
        """Of the first seed. That of the pilot is that of its experts."""
        if variant == PILOT and self._study.pilot is not None:
            variant = self._study.pilot.experts
        return run_config(self._study, variant, self.seeds[0], self._fast)

    def top_k(self, variant: str) -> int:
        """The k of its top-k overlap."""
        return self._config(variant).diagnostics.top_k

    def method(self, variant: str) -> str:
        return self._config(variant).method

    def prompts_are_shared(self, variant: str, domain: str) -> bool:
        """Whether all seeds are tested on the same rows of a file, or some are."""
        config = self._config(variant)
        data = config.branches[config.branch_names.index(domain)].data
        sources: list[str] = [source.source for source in data.sources] or [data.source]
        return not set(sources) <= set(GENERATED)

    @functools.cache  # noqa: B019
    def records(self, variant: str, seed: int) -> list[Record]:
        return read_metrics(self._folder(variant, seed))

    def row(self, model: str, seed: int) -> dict[str, Any] | None:
        """The result row of VARIANT or VARIANT/ROW; None where the unit is not finished. UserError for no such row."""
        variant, _, name = model.partition("/")
        if (variant, seed) not in self.finished:
            return None
        rows = self.result(variant, seed)["rows"]
        row = final_row(rows) if not name else next((row for row in rows if row["model"] == name), None)
        if row is None:
            known = ", ".join(repr(row["model"]) for row in rows)
            raise UserError(f"{model!r}: the result of {self._folder(variant, seed)} has no such row (known: {known})")
        return row

    def accuracies(self, model: str, domain: str) -> dict[int, float]:
        """Accuracy by seed. UserError for a domain that was not evaluated."""
        found = {}
        for seed in self.seeds:
            if (row := self.row(model, seed)) is not None:
                if domain not in row["accuracy"]:
                    raise UserError(f"{model!r} has no accuracy on {domain!r} (known: {', '.join(row['accuracy'])})")
                found[seed] = float(row["accuracy"][domain])
        return found

    def scores(self, model: str, seed: int) -> dict[str, np.ndarray] | None:
        """Score of each held-out prompt by domain, ``[P]``; None where the unit is not finished."""
        row = self.row(model, seed)
        if row is None:
            return None
        file = self._folder(model.partition("/")[0], seed) / SCORES / f"{file_name(row['model'])}.json"
        return {domain: np.asarray(values) for domain, values in json.loads(file.read_text()).items()}

    def pilot_points(self, seeds: Sequence[int]) -> list[PilotPoint]:
        """Those of the seeds in which the pilot is finished."""
        return [
            PilotPoint(**{key: point[key] for key in _POINT_KEYS}, num_prompts=self._num_pilot_prompts(seed))
            for seed in seeds
            if (PILOT, seed) in self.finished
            for point in self.result(PILOT, seed)["points"]
        ]

    def _num_pilot_prompts(self, seed: int) -> int:
        """As many as the teacher was tested on when it was trained: a file may have fewer than the config says."""
        pilot = self._study.pilot
        assert pilot is not None
        rows = self.result(pilot.experts, seed)["rows"] if (pilot.experts, seed) in self.finished else ()
        known = (row.get("num_prompts") for row in rows if row["model"] == f"expert:{pilot.teacher}")
        return int(next(known, None) or self._config(PILOT).eval.final_num_prompts)

    def domains(self, models: Sequence[str]) -> list[str]:
        """All domains on which these models were evaluated, then their average."""
        rows = [row for model in models for seed in self.seeds if (row := self.row(model, seed)) is not None]
        names = dict.fromkeys(name for row in rows for name in row["accuracy"] if name != "average")
        return [*names, "average"]

    def curve(self, variant: str, measure: str, seed: int) -> dict[int, float]:
        """A diagnostic by step, mean over all pairs of branches; without step 0, where all branches are the base."""
        if (variant, seed) not in self.finished:
            return {}
        values = {r["step"]: pair_value(r, measure) for r in self.records(variant, seed) if r["step"] > 0}
        return {step: value for step, value in values.items() if value is not None}


def of_seeds(num_found: int, num_seeds: int) -> str:
    """What is said of a number that not all seeds have."""
    return "" if num_found == num_seeds else f" ({num_found} of {num_seeds} seeds)"


def final_row(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """What a run is for: the merge, or the one model of a baseline, at equal rollouts."""
    for kind in ("merged", "baseline"):
        for row in rows:
            if row["kind"] == kind and not row["model"].endswith((EQUAL_STEPS, EQUAL_FLOPS)):
                return row
    return None
