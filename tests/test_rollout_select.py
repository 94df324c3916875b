"""Which engine runs."""

from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from copd_engine.config import ModelConfig, RolloutConfig
from copd_engine.rollout import select
from copd_engine.rollout.base import Sampling
from copd_engine.rollout.embedded import EmbeddedEngine
from copd_engine.rollout.select import create_engine, resolve_engine
from copd_engine.types import RolloutRequest, UserError
from tests.helpers import prompts_of_all_domains, tiny_model


@pytest.mark.parametrize(
    ("engine", "device", "installed", "cuda", "expected"),
    [
        ("auto", "cpu", True, None, "embedded"),
        ("auto", "cuda", True, "12.8", "sglang"),
        ("auto", "cuda:1", True, "12.8", "sglang"),
        ("auto", "cuda", False, "12.8", "embedded"),
        ("embedded", "cuda", True, "12.8", "embedded"),
        ("sglang", "cpu", True, None, "sglang"),
    ],
)
def test_auto_takes_sglang_where_it_is_installed_beside_a_gpu(
    monkeypatch: pytest.MonkeyPatch, engine: str, device: str, installed: bool, cuda: str | None, expected: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(select, "STAND_INS", "no-such-package")
    assert resolve_engine(engine, device) == expected


def test_stand_ins_for_a_cpu_do_not_sample_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(select, "STAND_INS", "torch")  # a package that is installed
    assert resolve_engine("auto", "cuda") == "embedded"
    assert resolve_engine("sglang", "cpu") == "sglang"
    with pytest.raises(UserError, match=r"'sglang' on cuda: sgl_kernel in this environment is the stand-in"):
        resolve_engine("sglang", "cuda")


def test_sglang_must_be_installed_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"rollout\.engine = 'sglang': the package is missing; install the extra"):
        resolve_engine("sglang", "cpu")


def test_the_engine_starts_with_the_policies_as_version_0_and_its_name_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    policy, encoder = tiny_model()
    with caplog.at_level(logging.INFO):
        engine = create_engine(RolloutConfig(), ModelConfig(), {"a": policy}, encoder, tmp_path)
    assert isinstance(engine, EmbeddedEngine)
    assert [record.getMessage() for record in caplog.records] == ["rollout engine: embedded"]
    requests = [RolloutRequest(prompt, 0, 0) for prompt in prompts_of_all_domains(encoder)]
    assert {rollout.weight_version for rollout in engine.generate("a", requests, Sampling(1.0, 3))} == {0}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="sglang is not installed (make test does)")
def test_looking_whether_sglang_is_there_changes_nothing() -> None:
    """The stand-ins of a machine without a GPU replace functions of torch; in a process of their own, which samples."""
    look = "import importlib.util, torch; x = torch.empty; importlib.util.find_spec('sglang'); print(torch.empty is x)"
    ended = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    assert ended.stdout == "True\n"
