"""What the finished units of a study say, by seed."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from copd_engine.algorithms import EQUAL_FLOPS, EQUAL_STEPS
from copd_engine.metrics import read_metrics
from copd_engine.report.run import Record, pair_value
from copd_engine.run_folder import RESULT, SCORES, file_name
from copd_engine.study.config import PILOT, StudyConfig
from copd_engine.study.plan import run_config, study_dir_of
from copd_engine.types import UserError


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

    def top_k(self, variant: str) -> int:
        """The k of its top-k overlap; that of the pilot is that of its experts."""
        if variant == PILOT and self._study.pilot is not None:
            variant = self._study.pilot.experts
        return run_config(self._study, variant, self.seeds[0], self._fast).diagnostics.top_k

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


def final_row(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """What a run is for: the merge, or the one model of a baseline, at equal rollouts."""
    for kind in ("merged", "baseline"):
        for row in rows:
            if row["kind"] == kind and not row["model"].endswith((EQUAL_STEPS, EQUAL_FLOPS)):
                return row
    return None
