"""LoRA adapters for sglang, under the names of peft's adapter files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from copd_engine.config import LoraConfig

#: The linear layers of a decoder that get adapters, by the ends of their names; sglang fuses them as it fuses weights.
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_A, _B = ".lora_A.default.weight", ".lora_B.default.weight"


def targets(config: LoraConfig) -> list[str]:
    """Ends of the names of the layers that have adapters."""
    if config.target_modules == "all-linear":
        return list(TARGETS)
    return sorted({name.rpartition(".")[2] for name in config.target_modules})


def adapter_config(config: LoraConfig) -> dict[str, Any]:
    """What peft writes to ``adapter_config.json``."""
    return {
        "peft_type": "LORA",
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": targets(config),
    }


def adapter_tensors(named_tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies on the CPU, which the trainer's next update cannot reach; ValueError for a tensor of no adapter."""
    tensors = {}
    for name, tensor in named_tensors.items():
        if not name.endswith((_A, _B)):
            raise ValueError(f"with LoRA only adapters are synced to sglang, not {name!r}")
        tensors["base_model.model." + name.replace(".default.", ".")] = tensor.detach().to("cpu", copy=True)
    return tensors


def base_weights(named_tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """For each adapter the base weight that it changes, by name and shape; empty, on the device ``meta``."""
    weights = {}
    for name, b in named_tensors.items():
        if name.endswith(_B):
            layer = name.removesuffix(_B)
            shape = (b.shape[0], named_tensors[layer + _A].shape[1])
            weights[f"{layer}.weight"] = torch.empty(shape, device="meta")
    return weights
