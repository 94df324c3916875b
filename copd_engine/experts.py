"""Experts of a finished run, for methods that only need them as they came out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from copd_engine import run_folder
from copd_engine.algorithms import EQUAL_STEPS, STUDENT, Schedule
from copd_engine.algorithms.shares import copd_steps
from copd_engine.config import RunConfig
from copd_engine.finished_run import finished_run
from copd_engine.models.loading import load_model
from copd_engine.types import UserError


@dataclass(frozen=True)
class FinishedExperts:
    """By the expert's name: its model's folder, the file of its scores, and its row of the result, which says what its
    training took."""

    folders: dict[str, Path]
    scores: dict[str, Path]
    rows: dict[str, dict[str, Any]]

    def parameters(self, name: str, config: RunConfig) -> dict[str, torch.nn.Parameter]:
        """What is trained of the expert's model."""
        model = config.model.model_copy(update={"path": str(self.folders[name])})
        return load_model(model, config.media, config.device)[0].named_parameters()


def finished_experts(folder: Path, config: RunConfig, names: Sequence[str]) -> FinishedExperts:
    """The experts ``names`` of the run in ``folder`` where they had taken as many steps as CoPD would take.

    Raises UserError unless the run is a finished one of ``method: expert`` in which they were trained and tested as
    this ``config`` (resolved) would do.
    """
    where = f"{config.method}.experts = {folder}"
    if config.model.lora is not None:
        raise UserError(f"{where}: under model.lora a finished run has no adapters to go on with; leave it out")
    run = finished_run(where, folder, "expert", config, _what_makes_experts, "its experts are not those of this config")
    folders, scores, of_expert = {}, {}, {}
    for name in names:
        label = next(label for label in (f"expert:{name}{EQUAL_STEPS}", f"expert:{name}") if label in run.rows)
        folders[name] = folder / "models" / run_folder.file_name(label)
        scores[name] = run_folder.scores_file(folder, label)
        for path in (folders[name], scores[name]):
            if not path.exists():
                raise UserError(f"{where}: {path} is missing")
        row = of_expert[name] = run.trained_row(label)
        if row["steps"] != (steps := copd_steps(config)):
            raise UserError(
                f"{where}: its {name!r} took {row['steps']} steps, CoPD's branches take {steps}: under that "
                "run's schedule.native_share or cross_ratio the rollouts were spent before; train it with these"
            )
    return FinishedExperts(folders, scores, of_expert)


def _what_makes_experts(config: RunConfig) -> dict[str, Any]:
    """What decides the weights of single experts after as many steps as CoPD takes, and the scores in their rows."""
    return {
        **config.model_dump(mode="json", include={"seed", "model", "media", "rollout", "objective", "optim"}),
        "branches": [branch.model_dump(mode="json", exclude={"beta"}) for branch in config.branches],
        "schedule": {"steps": copd_steps(config)},
        # The prompts of the test: how many, and whether those of a search come before them.
        "eval": {"final_num_prompts": config.eval.final_num_prompts},
        "merge": {"method 'search'": config.merge.method == "search"},
    }


def experts_of(config: RunConfig, schedule: Schedule) -> FinishedExperts | None:
    """The experts that the config takes from another run; None where it trains its own."""
    section = {"static_opd": config.static_opd, "mopd": config.mopd}.get(config.method)
    if section is None or section.experts is None:
        return None
    return finished_experts(section.experts, config, [name for name in schedule.students if name != STUDENT])
