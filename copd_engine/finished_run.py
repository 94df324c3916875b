"""What another run must be before this one takes its results."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from copd_engine import run_folder
from copd_engine.config import RunConfig, load_config
from copd_engine.types import UserError


@dataclass(frozen=True)
class FinishedRun:
    """The config of a run that ended, and the rows of its result by model."""

    where: str
    config: RunConfig
    rows: dict[str, dict[str, Any]]

    def trained_row(self, model: str) -> dict[str, Any]:
        """The row of a model that was trained. UserError where it does not say what the training took."""
        if "train_flops" not in self.rows[model]:
            raise UserError(
                f"{self.where}: {run_folder.RESULT} does not say what training took; it is of an older version"
            )
        return self.rows[model]


def finished_run(
    where: str,
    folder: Path,
    method: str,
    config: RunConfig,
    what_counts: Callable[[RunConfig], dict[str, Any]],
    otherwise: str,
) -> FinishedRun:
    """The run in ``folder``; UserError, beginning with ``where``, unless it is a finished one of ``method`` in which
    ``what_counts`` is as in ``config``. ``otherwise`` says what a difference there means."""
    if not (folder / run_folder.CONFIG).is_file():
        raise UserError(f"{where}: not a run folder (no {run_folder.CONFIG})")
    found = load_config(folder / run_folder.CONFIG)
    if found.method != method:
        baseline = folder / "baselines" / method
        hint = f"; the one in {baseline} is" if baseline.is_dir() else ""
        raise UserError(f"{where}: holds a run of method {found.method!r}, not {method!r}{hint}")
    difference = run_folder.difference(what_counts(found), what_counts(config))
    if difference:
        raise UserError(f"{where}: {otherwise} ({difference})")
    if not (folder / run_folder.RESULT).is_file():
        raise UserError(f"{where}: the run is not finished (no {run_folder.RESULT})")
    rows = {row["model"]: row for row in json.loads((folder / run_folder.RESULT).read_text())["rows"]}
    return FinishedRun(where, found, rows)
