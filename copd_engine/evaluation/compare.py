"""``copd eval-table``: models that were evaluated into folders of their own, in one table."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from copd_engine.evaluation.results import BenchmarkScores
from copd_engine.evaluation.run import collect_scores
from copd_engine.evaluation.samples import RESULT, read_samples
from copd_engine.evaluation.table import markdown
from copd_engine.types import UserError


def compare(folders: Sequence[Path]) -> str:
    """The table of the evaluations in ``folders``, the first of which the others are compared with, as Markdown."""
    results = []
    for folder in folders:
        file = folder / RESULT
        if not file.is_file():
            raise UserError(f"{folder} holds no finished evaluation (no {RESULT})")
        results.append((folder, json.loads(file.read_text())))
    uses = Counter(result["model"] for _, result in results)
    models: dict[str, list[BenchmarkScores]] = {}
    for folder, result in results:
        name = result["model"] if uses[result["model"]] == 1 else str(folder)
        if name in models:
            raise UserError(f"{folder} is named twice")
        records = read_samples(folder)
        try:
            models[name] = [collect_scores(source, records, result["num_samples"]) for source in result["sources"]]
        except KeyError as error:
            raise UserError(f"{folder}: samples are missing ({error}): run its copd eval again") from None
    return markdown(models, results[0][1]["settings"]["seed"])
