"""How much a finished CoPD run computed, for baselines that go on until they have computed as much."""

from __future__ import annotations

import json
from typing import Any

from copd_engine import run_folder
from copd_engine.config import RunConfig, load_config
from copd_engine.types import UserError


def flops_goal(config: RunConfig) -> int | None:
    """``train_flops`` of the run in ``config.flops_of``, all its branches together; None where no run is named.

    UserError unless it is a finished run of ``method: copd`` with the same model, media, branches and rollouts.
    """
    folder = config.flops_of
    if folder is None:
        return None
    where = f"flops_of = {folder}"
    if not (folder / run_folder.CONFIG).is_file():
        raise UserError(f"{where}: not a run folder (no {run_folder.CONFIG})")
    found = load_config(folder / run_folder.CONFIG)
    if found.method != "copd":
        raise UserError(f"{where}: holds a run of method {found.method!r}, not 'copd'")
    difference = run_folder.difference(_what_is_computed_on(found), _what_is_computed_on(config))
    if difference:
        raise UserError(f"{where}: its FLOPs are no measure for this config ({difference})")
    if not (folder / run_folder.RESULT).is_file():
        raise UserError(f"{where}: the run is not finished (no {run_folder.RESULT})")
    rows = {row["model"]: row for row in json.loads((folder / run_folder.RESULT).read_text())["rows"]}
    branches = [rows[f"branch:{name}"] for name in found.branch_names]
    if any("train_flops" not in row for row in branches):
        raise UserError(f"{where}: {run_folder.RESULT} does not say what training took; it is of an older version")
    return sum(int(row["train_flops"]) for row in branches)


def _what_is_computed_on(config: RunConfig) -> dict[str, Any]:
    model = config.model.model_dump(mode="json", include={"path", "freeze_vision", "lora"})
    rollout = {"prompts_per_step", "group_size", "temperature", "max_new_tokens", "max_prompt_tokens"}
    return {
        **config.model_dump(mode="json", include={"media"}),
        "model": model,
        "rollout": config.rollout.model_dump(mode="json", include=rollout),
        "branches": [branch.model_dump(mode="json", include={"name", "data"}) for branch in config.branches],
    }
