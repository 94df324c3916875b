"""The same CoPD run from the command line with each rollout engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from copd_engine.config import build_config
from copd_engine.metrics import read_metrics
from copd_engine.step import Timer
from copd_engine.trainer import Trainer
from tests import sglang_setup
from tests.small_run import small_config, write_base, write_config, write_data

pytestmark = sglang_setup.MARKS


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("material")
    return write_base(folder / "base"), write_data(folder / "data")


def trained(material: tuple[Path, Path], folder: Path, engine: str, **model: Any) -> Path:
    config = small_config(*material, folder / "runs", rollout={"max_running": 16}, model=model)
    file = write_config(folder / "config.yaml", config | {"schedule": {"cycles": 1, "rl_steps": 2, "opd_steps": 1}})
    copd("train", str(file), f"rollout.engine={engine}")
    return folder / "runs/small"


@pytest.mark.parametrize(
    ("engine", "model"),
    [
        ("embedded", {}),
        ("sglang", {}),
        pytest.param("sglang", {"lora": {"rank": 2}}, marks=pytest.mark.slow),
    ],
    ids=["embedded", "sglang", "sglang with adapters"],
)
def test_a_run_with_each_engine(material, tmp_path, engine, model):
    """Every token that is trained on has the trainer's own log-prob; steps of both phases update all branches."""
    run_dir = trained(material, tmp_path, engine, **model)
    assert f"engine: {engine}" in (run_dir / "config.yaml").read_text()
    rows = read_metrics(run_dir)[1:]
    assert [row["phase"] for row in rows] == ["rl", "rl", "opd"]
    for row in rows:
        for branch in row["branches"].values():
            assert branch["mismatch_max"] is None or branch["mismatch_max"] < 1e-4
            assert all(part["requests_lost"] == 0 for part in branch["rollout"].values())
    assert all(branch["num_tokens"] > 0 for branch in rows[-1]["branches"].values())
    assert all(branch["version"] > 0 for branch in rows[-1]["branches"].values())
    result = json.loads((run_dir / "result.json").read_text())
    assert {row["model"] for row in result["rows"]} >= {"base", "branch:text", "merged"}


def copd(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from copd_engine.cli import main; main()", *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_testbeds_run_and_greedy_check_prompts_of_both_engines(tmp_path):
    """configs/demo.yaml, shortened, through sglang; what comes out answers text, images and videos alike with both."""
    demo = str(Path(__file__).parent.parent / "configs" / "demo.yaml")
    short = ["baselines=[]", "schedule.cycles=1", "schedule.rl_steps=2", "schedule.opd_steps=1", "eval.every=0"]
    small = ["eval.num_prompts=2", "eval.final_num_prompts=2", "diagnostics.every=0", "rollout.prompts_per_step=4"]
    copd("train", demo, *short, *small, "rollout.engine=sglang", "name=run", f"output_dir={tmp_path}")
    for row in read_metrics(tmp_path / "run")[1:]:
        assert all((branch["mismatch_max"] or 0) < 1e-4 for branch in row["branches"].values())
    responses = {}
    for engine in ("embedded", "sglang"):
        out = tmp_path / engine
        check = ["--num-prompts", "8", "--temperature", "0", "--engine", engine, "--out", str(out)]
        copd("eval", str(tmp_path / "run" / "models" / "merged"), "--config", demo, *check)
        samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
        responses[engine] = {(sample["benchmark"], sample["uid"]): sample["response"] for sample in samples}
    assert {name for name, _ in responses["sglang"]} == {"text", "image", "video"}
    assert len(set(responses["sglang"].values())) > 12  # of 24
    assert responses["sglang"] == responses["embedded"]


@pytest.mark.parametrize("lora", [None, {"rank": 2}], ids=["full", "adapters"])
def test_what_a_step_asks_of_the_engine(material, tmp_path, monkeypatch, lora):
    """Native and cross batches of all students: each swapped in once, or with adapters in one running batch."""
    config = small_config(*material, tmp_path, rollout={"engine": "sglang", "max_running": 64}, model={"lora": lora})
    trainer = Trainer(build_config(config), tmp_path / "run")
    try:
        calls, host = [], trainer.engine._host
        generate = host.generate
        monkeypatch.setattr(host, "generate", lambda jobs, timeout_s: calls.append(jobs) or generate(jobs, timeout_s))
        plan = trainer.schedule.plan(3)
        assert plan.phase == "opd"
        for _ in range(2):
            calls.clear()
            trainer.steps.run(plan, Timer())
            asked = 4 * sum(assignment.num_prompts for assignment in plan.assignments)
            assert sum(map(len, calls)) == asked
            stats = trainer.engine.stats()
            assert stats["num_swaps"] == len(trainer.branches) == 3
            if lora is None:
                assert len(calls) == 3
                assert stats["swap_bytes"] >= 3 * sum(p.nbytes for p in trainer.branches["text"].parameters.values())
            else:
                assert len(calls) == 1
                assert len({job.lora for job in calls[0]}) == 3
            assert trainer.engine._asleep
    finally:
        trainer.engine.close()
