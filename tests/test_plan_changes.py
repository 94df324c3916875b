"""The changes of a config that ``copd plan`` proposes: the cheapest that fits, and none that costs less."""

from __future__ import annotations

import json
from pathlib import Path

from copd_engine.config import OptimConfig, RunConfig, load_config
from copd_engine.plan import plan_mode
from copd_engine.plan_changes import cheapest_that_fits, single_changes
from copd_engine.plan_text import plan_text
from tests.plan_setup import GPU, qwen_folder, run_config


def fitting_config(tmp_path: Path, num_branches: int = 1) -> RunConfig:
    return run_config(
        num_branches,
        model={"path": str(qwen_folder(tmp_path / "qwen")), "dtype": "bfloat16"},
        rollout={"max_prompt_tokens": 2048, "max_new_tokens": 2048},
        optim={"max_tokens_per_micro_batch": 16_384},
    )


def test_changes_that_make_it_fit(tmp_path: Path) -> None:
    """One expert of 4.4 billion parameters on 141 GB: not with all activations of 16,384 tokens, but with less."""
    config, gpu = fitting_config(tmp_path), 141 * 10**9
    plan = plan_mode(config, gpu)
    assert not plan.fits
    assert plan.missing_bytes == max(plan.peaks.values()) - gpu > 0
    best, least = cheapest_that_fits(config, gpu)
    assert best is not None
    assert best.plan.fits
    assert least.plan.missing_bytes <= best.plan.missing_bytes <= 0
    assert best.cost < 3  # time alone: neither LoRA nor shorter responses
    (tmp_path / "run.yaml").write_text(json.dumps(json.loads(config.model_dump_json())))
    again = plan_mode(load_config(tmp_path / "run.yaml", list(best.overrides)), gpu)
    assert again == best.plan
    cheaper = [change for change in single_changes(config, gpu) if change.cost < best.cost]
    assert cheaper
    assert not any(change.plan.fits for change in cheaper)
    text = plan_text(config, 1, 141)
    assert f"full parameters: does not fit, ~{plan.missing_bytes / 1e9:.2f} GB are missing" in text
    assert f"cheapest that fits: {' '.join(best.overrides)}" in text


def test_more_experts_than_fit_leave_lora_or_nothing(tmp_path: Path) -> None:
    config = fitting_config(tmp_path, 3)
    best, _ = cheapest_that_fits(config, GPU)
    assert best is not None
    assert "model.lora={}" in best.overrides
    assert best.plan.mode == "lora"
    none, least = cheapest_that_fits(config, 10 * 10**9)
    assert none is None
    assert least.plan.missing_bytes > 0
    assert "no change that was tried fits" in plan_text(config, 1, 10)


def test_an_engine_that_takes_too_much_or_too_little_gets_its_share(tmp_path: Path) -> None:
    config = fitting_config(tmp_path).model_copy(update={"optim": OptimConfig(max_tokens_per_micro_batch=4096)})
    for fraction in (0.05, 0.98):
        rollout = config.rollout.model_copy(update={"memory_fraction": fraction})
        changed = config.model_copy(update={"rollout": rollout})
        assert not plan_mode(changed, 141 * 10**9).fits
        best, _ = cheapest_that_fits(changed, 141 * 10**9)
        assert best is not None
        assert any(override.startswith("rollout.memory_fraction=") for override in best.overrides)
        assert best.plan.room.num_sequences >= 1
