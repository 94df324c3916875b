"""The real sglang on the testbed's model, with two experts that differ from its base; without a GPU too."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

import copd_engine
from copd_engine.config import LoraConfig, MediaConfig, ModelConfig, RolloutConfig
from copd_engine.models.loading import load_model
from copd_engine.rollout.sglang_engine import SglangEngine
from tests.helpers import prompts_of_all_domains
from tests.rollout_suite import Subject

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


def sglang_subject(lora: LoraConfig | None = None, **changes: Any) -> Subject:
    """An engine that has just started, and its experts a and b at version 1."""
    policy, encoder = load_model(ModelConfig(path="testbed", lora=lora), MediaConfig(), "cpu")
    engine = SglangEngine(BASE, encoder, rollout_config(**changes), lora=lora, num_experts=2)
    policies = {"a": policy.clone(), "b": policy.clone()}
    subject = Subject(engine, policies, encoder, prompts_of_all_domains(encoder))
    subject.change("a", 11)
    subject.change("b", 12)
    return subject
