"""What a merged model keeps of its branches, out of the rows of a result."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from copd_engine.report.run import nested
from copd_engine.run_folder import SCORES, file_name

#: Kind of the branches' rows, and the model that their merge is called.
MERGES = (("expert", "average of experts"), ("branch", "merged"))


@dataclass(frozen=True)
class Retention:
    """Accuracy on a branch's own domain: the branch, the merged model. ``stderr`` is that of the difference.

    ``paired``: from the differences per prompt (same prompts, same draws); else as if the two had seen other prompts,
    which is too wide where prompts are hard for both.
    """

    branch: str
    merged: str
    had: float
    has: float
    stderr: float | None
    paired: bool

    @property
    def difference(self) -> float:
        return self.has - self.had

    @property
    def cells(self) -> list[str]:
        """Branch, percent that it had, that the merged model has, points between, share that is kept."""
        error = "" if self.stderr is None else f" ±{100 * self.stderr:.1f}"
        kept = f"{100 * self.has / self.had:.0f} %" if self.had else "-"
        points = f"{100 * self.difference:+.1f}{error}"
        return [self.branch, f"{100 * self.had:.1f}", self.merged, f"{100 * self.has:.1f}", points, kept]


def with_scores(result: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    """The result with ``rewards`` in its rows: the score of each held-out prompt by domain, where the run folder, or
    that of its baseline, holds scores whose means are the row's accuracies. A model's row and the merge's are tested on
    the same prompts with the same draws."""
    rows = []
    for row in result["rows"]:
        scores = _scores(row, [run_dir, run_dir / "baselines" / "expert"])
        rows.append(row if scores is None else {**row, "rewards": scores})
    return {**result, "rows": rows}


def _scores(row: dict[str, Any], folders: Sequence[Path]) -> dict[str, list[float]] | None:
    for folder in folders:
        file = folder / SCORES / f"{file_name(str(row.get('model')))}.json"
        if file.is_file():
            scores: dict[str, list[float]] = json.loads(file.read_text())
            # A folder may hold those of a model of the same name, such as the base of another run.
            if all(_is_mean(nested(row, "accuracy", domain), values) for domain, values in scores.items()):
                return scores
    return None


def _is_mean(accuracy: Any, values: Sequence[float]) -> bool:
    return accuracy is not None and abs(sum(values) / len(values) - accuracy) < 1e-9


def retention(result: dict[str, Any]) -> list[Retention]:
    """One entry per branch (and per lone expert) that has a row, if there is a row of their merge.

    Rows with ``rewards``, one number per prompt by domain, are compared prompt by prompt.
    """
    found = []
    for kind, label in MERGES:
        merged = next((row for row in result["rows"] if row.get("model") == label), None)
        for row in result["rows"]:
            name = str(row.get("model"))
            domain = name.partition(":")[2]
            had, has = nested(row, "accuracy", domain), nested(merged, "accuracy", domain)
            if row.get("kind") == kind and had is not None and has is not None:
                stderr, paired = _stderr(row, merged, domain)
                found.append(Retention(name, label, had, has, stderr, paired))
    return found


def _stderr(row: Any, merged: Any, domain: str) -> tuple[float | None, bool]:
    before, after = nested(row, "rewards", domain), nested(merged, "rewards", domain)
    if before and after and len(before) == len(after):
        return paired_stderr(before, after), True
    errors = [nested(model, "stderr", domain) for model in (row, merged)]
    return (None if None in errors else math.hypot(*errors)), False


def paired_stderr(before: Sequence[float], after: Sequence[float]) -> float:
    """Standard error of the mean difference per prompt."""
    differences = [b - a for a, b in zip(before, after, strict=True)]
    count = len(differences)
    mean = sum(differences) / count
    return math.sqrt(sum((d - mean) ** 2 for d in differences) / max(1, count - 1) / count)


HEADER = ["on its own domain", "it had", "merged model", "has", "difference", "kept"]


def retention_note(rows: Sequence[Retention]) -> str:
    """What ± means."""
    unpaired = [row.branch for row in rows if not row.paired]
    if len(unpaired) == len(rows):
        return "± standard error of the difference, unpaired"
    but = f", unpaired of {', '.join(unpaired)}" if unpaired else ""
    return f"± standard error of the difference, paired by prompt{but}"


def retention_table(result: dict[str, Any]) -> str:
    """As plain text; empty where nothing was merged."""
    rows = retention(result)
    if not rows:
        return ""
    lines = [HEADER, *(row.cells for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    text = []
    for line in lines:
        cells = [
            cell.ljust(width) if i in (0, 2) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        text.append("  ".join(cells).rstrip())
    return "\n".join([*text, f"accuracy in %; {retention_note(rows)}"])
