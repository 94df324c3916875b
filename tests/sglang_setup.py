"""The real sglang on the testbed's model, with two experts that differ from its base; without a GPU too."""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest

import copd_engine
from copd_engine.config import LoraConfig, MediaConfig, ModelConfig, RolloutConfig
from copd_engine.models.loading import load_model
from copd_engine.rollout.base import Sampling
from copd_engine.rollout.sglang_engine import SglangEngine
from copd_engine.types import Rollout
from tests.helpers import prompts_of_all_domains
from tests.rollout_suite import Subject, ids

#: For every module that starts sglang: all in one xdist group, so that engines do not start side by side.
MARKS = [
    pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="sglang is not installed (make test does)"),
    pytest.mark.xdist_group("sglang"),
    pytest.mark.timeout(600),
]
BASE = Path(copd_engine.__file__).parent / "testbed" / "base"
LORA = LoraConfig(rank=4, alpha=8.0)


def rollout_config(**changes: Any) -> RolloutConfig:
    return RolloutConfig(max_new_tokens=256, max_prompt_tokens=512, max_running=32, **changes)


def base_with_more_end_tokens(folder: Path) -> Path:
    """The testbed's model, whose generation config ends a response at the digit 1 too, as some checkpoints name ids
    that are not the end of a turn. The trainer knows one end token only."""
    for file in BASE.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((BASE / "generation_config.json").read_text())
    digit = json.loads((BASE / "tokenizer.json").read_text())["model"]["vocab"]["1"]
    config["eos_token_id"] = [config["eos_token_id"], digit]
    (folder / "generation_config.json").write_text(json.dumps(config))
    return folder


def sglang_subject(
    lora: LoraConfig | None = None, device: str = "cpu", dtype: str = "float32", **changes: Any
) -> Subject:
    """An engine that has just started, and its experts a and b at version 1."""
    policy, encoder = load_model(ModelConfig(path="testbed", lora=lora, dtype=dtype), MediaConfig(), device)
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)  # an engine that dies is started from it again
    base = base_with_more_end_tokens(Path(folder.name))
    engine = SglangEngine(base, encoder, rollout_config(**changes), dtype, device, lora, num_experts=2)
    policies = {"a": policy.clone(), "b": policy.clone()}
    subject = Subject(engine, policies, encoder, prompts_of_all_domains(encoder))
    subject.change("a", 11)
    subject.change("b", 12)
    return subject


def check_recovery(subject: Subject, expert: str, pid: int) -> None:
    """Kill a process after the first group: the others come as if nothing had happened, from the current weights."""
    asked = subject.requests(8)
    expected = ids(subject.engine.generate(expert, asked, Sampling(1.0, 100)))
    old = subject.engine._host.pids
    subject.engine.stats()
    found: dict[int, list[Rollout]] = {}
    for number, group in enumerate(subject.engine.generate_groups(expert, asked, Sampling(1.0, 100))):
        if number == 0:
            os.kill(pid, signal.SIGKILL)
        found[group[0].request.group] = group
    rollouts = [rollout for number in sorted(found) for rollout in found[number]]
    assert ids(rollouts) == expected
    subject.check(expert, rollouts)
    stats = subject.engine.stats()
    assert (stats["num_starts"], stats["num_swaps"], stats["num_dropped"]) == (1, 1, 0)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in old)
