"""Configs of memory plans, the testbed's sizes by hand, and a folder that says it is Qwen3-VL-4B."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from copd_engine.config import RunConfig, build_config
from copd_engine.plan import ModePlan
from copd_engine.plan_items import Item

GPU = 80 * 10**9
VISION = 242_368  # of the testbed model; by hand in test_plan.py
TEXT = 221_888
#: Qwen3-VL-4B by the widths of its config.
QWEN_TEXT = {
    "hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 9728, "vocab_size": 151_936,
}  # fmt: skip
QWEN_VISION = {
    "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "patch_size": 16,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 2560, "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [5, 11, 17],
}  # fmt: skip


def qwen_folder(folder: Path) -> Path:
    folder.mkdir()
    config = {
        "model_type": "qwen3_vl",
        "tie_word_embeddings": True,
        "text_config": {"model_type": "qwen3_vl_text", "tie_word_embeddings": True, **QWEN_TEXT},
        "vision_config": {"model_type": "qwen3_vl_vision", **QWEN_VISION},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def run_config(num_branches: int = 2, **sections: Any) -> RunConfig:
    domains = ("text", "image", "video")[:num_branches]
    branches = [{"name": domain, "data": {"domain": domain}} for domain in domains]
    lengths = {"max_prompt_tokens": 100, "max_new_tokens": 60}
    rollout = {"engine": "sglang", **lengths} | sections.pop("rollout", {})
    optim = {"max_tokens_per_micro_batch": 512} | sections.pop("optim", {})
    return build_config({"branches": branches, "rollout": rollout, "optim": optim, **sections})


def item(plan: ModePlan, phase: str, name: str) -> Item:
    return next(found for found in getattr(plan, phase) if found.name == name)


def sizes(plan: ModePlan, phase: str) -> dict[str, int]:
    return {found.name: found.num_bytes for found in getattr(plan, phase)}
