"""Whose processes end when sglang ends or fails, with the engine in the trainer's process and beside it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from copd_engine.rollout.sglang_engine import SglangEngine
from copd_engine.types import UserError
from tests.helpers import tiny_model
from tests.sglang_setup import MARKS, rollout_config

pytestmark = MARKS
ROOT = Path(__file__).parents[1]
#: Some packages install a `tests` of their own. As -c, because sglang's processes import a main module that is a file.
START = (
    "import sys, types; tests = sys.modules['tests'] = types.ModuleType('tests'); tests.__path__ = ['tests'];"
    "from tests.sglang_in_process import main; main()"
)


def test_in_the_trainers_process_nobody_elses_child_is_ended_and_a_dead_scheduler_is_replaced() -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", START],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    seen = json.loads(run.stdout.splitlines()[-1])
    assert seen.pop("worst") < 1e-4
    assert seen.pop("num_starts") == 2
    assert set(seen.values()) == {True}, seen


def test_a_model_that_sglang_cannot_load_is_an_error_and_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises((UserError, RuntimeError), match="sglang did not start"):
        SglangEngine(tmp_path, tiny_model()[1], rollout_config(max_restarts=0))
