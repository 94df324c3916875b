"""Mixtures of experts: transformers' tensors as sglang takes them, and the real sglang on such models."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from copd_engine.config import RolloutConfig
from copd_engine.models.base import Policy, PromptEncoder
from copd_engine.rollout.base import Sampling
from copd_engine.rollout.sglang_engine import SglangEngine
from copd_engine.rollout.sglang_experts import split_experts
from copd_engine.types import Example
from tests import families
from tests.rollout_suite import Subject
from tests.sglang_setup import BASE

#: sglang wants these of any vision model, though it is given pixels that need none of it.
PROCESSOR = ("preprocessor_config.json", "video_preprocessor_config.json", "tokenizer.json", "tokenizer_config.json")


class Numbers(PromptEncoder):
    """Only what an engine asks of an encoder: which token ends a response and which are never sampled."""

    end_token_id = 2
    suppressed_token_ids = (0, 1, families.VISION_START, families.VISION_END, families.IMAGE, families.VIDEO)

    def encode(self, example: Example) -> None:
        raise NotImplementedError

    def decode(self, token_ids: Sequence[int]) -> str:
        return " ".join(map(str, token_ids))

    def save(self, folder: Path) -> None:
        raise NotImplementedError


def test_the_names_and_values_are_those_of_the_checkpoint_on_disk(tmp_path: Path) -> None:
    """transformers itself writes Qwen3-MoE as the hub has it, expert by expert."""
    policy = families.build("qwen3_moe")
    policy.module.save_pretrained(tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    found = split_experts(policy.named_parameters())
    assert set(found) == set(expected)
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def test_they_are_views_that_see_and_count_what_the_trainer_writes() -> None:
    parameters = families.build("qwen3_vl_moe").named_parameters()
    fused = parameters["model.language_model.layers.1.mlp.experts.gate_up_proj"]
    up = split_experts(parameters)["model.language_model.layers.1.mlp.experts.5.up_proj.weight"]
    before = up._version
    with torch.no_grad():
        fused.fill_(3.0)
    assert up.tolist() == torch.full((24, 32), 3.0).tolist()
    assert up._version > before


def _as_sglang_has_it(policy: Policy) -> Policy:
    """sglang's Qwen3-VL-MoE adds the vision features to the first three layers, whatever the config says."""
    if policy.visual is None:
        return policy
    settings = policy.module.config.to_dict()
    settings["vision_config"]["deepstack_visual_indexes"] = [0, 1, 2]
    config = type(policy.module.config).from_dict(settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return type(policy)(type(policy.module)(config))


def _as_the_hub_has_it(file: Path) -> None:
    """Qwen3-VL-MoE's experts are [E, D, 2 I] and [E, I, D] on the hub; transformers reads both and writes its own."""
    tensors = load_file(file)
    fused = ("experts.gate_up_proj", "experts.down_proj")
    save_file({k: t.mT.contiguous() if k.endswith(fused) else t for k, t in tensors.items()}, file, {"format": "pt"})


@pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="sglang is not installed (make test does)")
@pytest.mark.xdist_group("sglang")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_vl_moe"])
def test_log_probs_of_swapped_experts_equal_transformers(family: str, tmp_path: Path) -> None:
    """Every weight differs from those that the engine started with, the experts' among them."""
    policy = _as_sglang_has_it(families.build(family))
    policy.module.save_pretrained(tmp_path)
    if policy.visual is not None:
        _as_the_hub_has_it(tmp_path / "model.safetensors")
    for file in PROCESSOR:
        shutil.copy(BASE / file, tmp_path)
    encoder = Numbers()
    config = RolloutConfig(max_new_tokens=64, max_prompt_tokens=128, max_running=16)
    engine = SglangEngine(tmp_path, encoder, config)
    try:
        prompts = families.prompts_of(policy)
        subject = Subject(engine, {"a": policy.clone(), "b": policy.clone()}, encoder, prompts)
        for seed, expert in enumerate("aba"):
            subject.change(expert, seed)
            subject.check(expert, engine.generate(expert, subject.requests(), Sampling(1.0, 12)))
        stats = engine.stats()
        assert stats["num_swaps"] == 3
        assert stats["num_retried"] == stats["num_dropped"] == 0
    finally:
        engine.close()
