"""Study folders made of numbers, without training: what the page reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from copd_engine.config.load import validate
from copd_engine.run_folder import file_name
from copd_engine.study.config import StudyConfig

RUN = {"branches": [{"name": name, "data": {"domain": name}} for name in ("text", "image")]}
MACHINE = {"machine": "one core", "date": "2026-11-28", "versions": {"torch": "2.13.0"}}


def study_of(root: Path, **sections: Any) -> StudyConfig:
    """Variants ``copd`` and ``expert`` with three seeds, unless ``sections`` say otherwise."""
    data: dict[str, Any] = {
        "name": "numbers",
        "output_dir": str(root),
        "seeds": [1, 2, 3],
        "run": RUN,
        "variants": {"copd": {}, "expert": {"changes": {"method": "expert"}}},
    }
    return validate(StudyConfig, {**data, **sections}, "study")


def write_run(
    study: StudyConfig,
    variant: str,
    seed: int,
    models: Mapping[str, Mapping[str, Sequence[float]]],
    curve: Mapping[int, tuple[int, str, float]] | None = None,
) -> None:
    """``models``: label -> domain -> score of each held-out prompt; the last one is what the run ends with.

    ``curve``: step -> cycle, phase and overlap.
    """
    folder = study.output_dir / study.name / f"seed-{seed}" / variant
    (folder / "scores").mkdir(parents=True)
    rows = []
    for model, scores in models.items():
        accuracy = {domain: float(np.mean(values)) for domain, values in scores.items()}
        kind = "merged" if model == list(models)[-1] else "branch"
        mean = float(np.mean(list(accuracy.values())))
        rows.append(
            {"model": model, "kind": kind, "accuracy": {**accuracy, "average": mean}, "rollouts": 64, "steps": 8}
        )
        (folder / "scores" / f"{file_name(model)}.json").write_text(json.dumps({d: list(v) for d, v in scores.items()}))
    (folder / "result.json").write_text(json.dumps({"rows": rows, **MACHINE}))
    lines = [{"step": 0, "phase": "base", "cycle": 0, "diagnostics": pairs(1.0)}]
    for step, (cycle, phase, overlap) in (curve or {}).items():
        lines.append({"step": step, "phase": phase, "cycle": cycle, "diagnostics": pairs(overlap)})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def pairs(overlap: float) -> dict[str, Any]:
    values = {"overlap": overlap, "sum_min": overlap, "symmetric_kl": 2 - overlap}
    edges = (("text", "image"), ("image", "text"))
    return {"pairs": [{"student": s, "teacher": t, **values} for s, t in edges]}


def write_pilot(
    study: StudyConfig, seed: int, overlaps: Sequence[float], gains: Sequence[float], teacher: float = 0.8
) -> None:
    """Students that reach 0.3 before, and gain."""
    folder = study.output_dir / study.name / f"seed-{seed}" / "pilot"
    folder.mkdir(parents=True)
    points = [
        {"student": "text", "fraction": float(i), "before": 0.3, "after": 0.3 + gain, "gain": gain}
        | {"teacher_accuracy": teacher}
        | {"overlap": overlap, "sum_min": overlap, "symmetric_kl": 2 - overlap}
        for i, (overlap, gain) in enumerate(zip(overlaps, gains, strict=True))
    ]
    (folder / "result.json").write_text(json.dumps({"points": points, "teacher": "image", **MACHINE}))
