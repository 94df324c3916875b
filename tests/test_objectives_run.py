"""Whole runs with other objectives than the paper's: what the config says reaches the loss, in every training mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from copd_engine.metrics import read_metrics
from tests.small_run import small_config, train, write_base, write_data


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("material")
    return write_base(folder / "base"), write_data(folder / "data")


RUNS: dict[str, dict[str, Any]] = {
    "exact, fp32": {
        "distillation": {"signal": "full"},
        "objective": {"kl": {"weight": 0.1, "estimator": "full"}, "loss_aggregation": "token_mean"},
    },
    "jsd, lora": {
        "model": {"lora": {"rank": 2}},
        "distillation": {"signal": "jsd"},
        "objective": {"kl": {"weight": 0.1, "estimator": "k2"}, "surrogate": "cispo", "updates_per_step": 2},
    },
    "control variate, bf16": {
        "model": {"dtype": "bfloat16"},
        "distillation": {"signal": "sampled_cv"},
        "objective": {
            "kl": {"weight": 0.1, "estimator": "k3"},
            "ratio_level": "sequence",
            "importance_correction": {"mode": "truncate"},
            "loss_aggregation": "constant",
            "zero_variance": "drop",
            "updates_per_step": 2,
        },
    },
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_takes_its_objective_from_the_config(material, tmp_path, name):
    run = RUNS[name]
    schedule = {"cycles": 1, "rl_steps": 2, "opd_steps": 1}
    evaluation = {"every": 0, "num_prompts": 1, "final_num_prompts": 1}
    config = small_config(*material, tmp_path, schedule=schedule, eval=evaluation, **run)
    records = read_metrics(train(config))[1:]
    assert [record["phase"] for record in records] == ["rl", "rl", "opd"]
    kls = [
        [row["terms"]["grpo"]["reference_kl"] for row in record["branches"].values() if "grpo" in row["terms"]]
        for record in records
    ]
    if run["objective"].get("updates_per_step", 1) == 1:
        # At first every branch is the base, which is the reference; then it has moved.
        assert kls[0]
        assert all(abs(kl) < 1e-6 for kl in kls[0])
    assert all(kl > 1e-6 for kl in kls[2])
    terms = [(n, t) for row in records[2]["branches"].values() for n, t in row["terms"].items() if n != "grpo"]
    assert len(terms) >= 4
    for _, term in terms:
        assert term["exact_reverse_kl"] > 0
        assert ("exact_jsd" in term) == ("jsd" in name)
    for record in records:
        for row in (row for row in record["branches"].values() if row["num_tokens"]):
            assert ("correction_mean" in row) == ("importance_correction" in run["objective"])
            assert not row["skipped"]
