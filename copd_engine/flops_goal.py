"""How much a finished CoPD run computed, for baselines that go on until they have computed as much."""

from __future__ import annotations

from typing import Any

from copd_engine.config import RunConfig
from copd_engine.finished_run import finished_run


def flops_goal(config: RunConfig) -> int | None:
    """``train_flops`` of the run in ``config.flops_of``, all its branches together; None where no run is named.

    UserError unless it is a finished run of ``method: copd`` with the same model, media, branches and rollouts.
    """
    folder = config.flops_of
    if folder is None:
        return None
    where, otherwise = f"flops_of = {folder}", "its FLOPs are no measure for this config"
    run = finished_run(where, folder, "copd", config, _what_is_computed_on, otherwise)
    return sum(int(run.trained_row(f"branch:{name}")["train_flops"]) for name in run.config.branch_names)


def _what_is_computed_on(config: RunConfig) -> dict[str, Any]:
    model = config.model.model_dump(mode="json", include={"path", "freeze_vision", "lora"})
    rollout = {"prompts_per_step", "group_size", "temperature", "max_new_tokens", "max_prompt_tokens"}
    return {
        **config.model_dump(mode="json", include={"media"}),
        "model": model,
        "rollout": config.rollout.model_dump(mode="json", include=rollout),
        "branches": [branch.model_dump(mode="json", include={"name", "data"}) for branch in config.branches],
    }
