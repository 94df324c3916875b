"""``copd plan`` as a command: its text, its JSON, which GPUs it is for, bad input."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import copd_engine.plan_text as plan_text_module
from copd_engine.cli import app
from copd_engine.config import load_config
from copd_engine.plan import engine_of
from copd_engine.types import UserError
from tests.plan_setup import TEXT, VISION


def copd(*words: str) -> Any:
    return CliRunner().invoke(app, ["plan", *words])


def test_command(tmp_path: Path) -> None:
    demo = "configs/demo.yaml"
    shown = copd(demo, "--gpu-memory", "24", "rollout.engine=auto")
    assert shown.exit_code == 0, shown
    assert "nothing was measured on a GPU" in shown.stdout
    assert f"testbed: {TEXT + VISION:,} parameters" in shown.stdout
    assert "full parameters: fits" in shown.stdout
    assert "LoRA: fits" in shown.stdout
    numbers = json.loads(copd(demo, "--gpu-memory", "24", "--gpus", "2", "--json").stdout)
    assert (numbers["measured"], numbers["num_gpus"], numbers["num_gpus_used"]) == (False, 2, 1)
    full = numbers["modes"]["full"]
    assert full["gpu_bytes"] == 24 * 10**9
    assert full["sizes"]["num_parameters"] == TEXT + VISION
    assert full["missing_bytes"] == max(full["peaks"].values()) - full["gpu_bytes"]
    assert engine_of(load_config(demo, ["rollout.engine=auto"])) == "sglang"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "no GPU is seen here (NVML); say which are meant, e.g. --gpus 1 --gpu-memory 80"),
        ("--gpus 2", "no GPU is seen here"),
        ("--gpus 0 --gpu-memory 80", "--gpus 0: must be at least 1"),
        ("--gpu-memory 0", "--gpu-memory 0.0: must be GB above 0"),
        ("--gpu-memory nan", "--gpu-memory nan: must be GB above 0"),
        ("--gpu-memory 80 model.path=/nowhere", "no such folder"),
        ("--gpu-memory 80 model.lora.target_modules=[q_prj]", "no linear layer of the language model is called"),
    ],
)
def test_bad_input(words: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_text_module, "system_stats", lambda: {"gpu": None})
    ended = copd("configs/demo.yaml", *shlex.split(words))
    assert isinstance(ended.exception, UserError)
    assert message in str(ended.exception)


def test_gpus_that_nvml_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = [{"memory_total_bytes": 24 * 10**9}, {"memory_total_bytes": 48 * 10**9}]
    monkeypatch.setattr(plan_text_module, "system_stats", lambda: {"gpu": seen})
    assert plan_text_module.find_gpus("auto", None, None) == (2, 24 * 10**9)
    assert plan_text_module.find_gpus("cuda:1", None, None) == (2, 48 * 10**9)
    assert plan_text_module.find_gpus("cuda:first", None, None) == (2, 24 * 10**9)
    assert plan_text_module.find_gpus("cuda", 1, None) == (1, 24 * 10**9)
    assert plan_text_module.find_gpus("cuda", None, 80) == (1, 80 * 10**9)
    with pytest.raises(UserError, match="NVML sees 2 GPUs"):
        plan_text_module.find_gpus("cuda:2", None, None)
