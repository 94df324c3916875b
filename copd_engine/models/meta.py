"""Sizes of a model from its ``config.json`` alone: the module is built on the meta device, no weight is read."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from transformers import AutoConfig, PreTrainedModel

from copd_engine.config import ModelConfig
from copd_engine.models.base import Policy
from copd_engine.models.folder import HUB_ID, find_folder, read_config
from copd_engine.models.loading import FAMILIES
from copd_engine.models.lora import add_adapters, plain_name
from copd_engine.models.smollm2 import find_gguf, smollm2_folder
from copd_engine.types import UserError


@dataclass(frozen=True)
class VisionSizes:
    """The vision tower. ``patches_per_token``: patches that are merged into one token of the decoder."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    patches_per_token: int


@dataclass(frozen=True)
class ModelSizes:
    """What memory follows from. Parameters are counted with their bytes in the model's dtype; a tied head counts once.

    ``num_parameters``: without adapters; ``vision_parameters`` and ``lm_head_parameters`` are parts of it. ``trained``:
    what the config trains, adapters under LoRA; ``adapter_inputs``: input widths of all adapters, summed;
    ``largest_trained_bytes``: the largest tensor of them. ``intermediate_size``: of the experts that a token visits.
    """

    num_parameters: int
    weight_bytes: int
    vision_parameters: int
    lm_head_parameters: int
    tied_lm_head: bool
    trained_parameters: int
    trained_bytes: int
    trained_tensors: int
    master_bytes: int
    largest_trained_bytes: int
    trains_lm_head: bool
    trains_vision: bool
    adapter_parameters: int
    adapter_inputs: int
    num_adapters: int
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qk_norm: bool
    vision: VisionSizes | None

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * itemsize


def model_sizes(config: ModelConfig) -> ModelSizes:
    """Sizes of the model that ``config`` describes, with its adapters and with what it freezes.

    UserError for a missing, unreadable or unsupported model, or adapters that it cannot have.
    """
    where = f"model.path = {config.path!r}"
    policy = _meta_policy(config, where)
    base = list(policy.module.parameters())
    num_parameters, weight_bytes = sum(p.numel() for p in base), sum(p.nbytes for p in base)
    if config.freeze_vision:
        policy.freeze_vision()
    if config.lora is not None:
        with torch.device("meta"):
            add_adapters(policy.module, policy.backbone, config.lora)
    trained = policy.named_parameters()
    lora_a = [p for name, p in trained.items() if ".lora_A." in name]
    text = policy.module.config.get_text_config()
    head = policy.lm_head_weight
    visual = policy.visual
    return ModelSizes(
        num_parameters=num_parameters,
        weight_bytes=weight_bytes,
        vision_parameters=0 if visual is None else sum(p.numel() for p in visual.parameters()),
        lm_head_parameters=head.numel(),
        tied_lm_head=head is policy.module.get_input_embeddings().weight,
        trained_parameters=sum(p.numel() for p in trained.values()),
        trained_bytes=sum(p.nbytes for p in trained.values()),
        trained_tensors=len(trained),
        # as in master_weights.py: a parameter in fp32 is its own master
        master_bytes=sum(4 * p.numel() for p in trained.values() if p.dtype != torch.float32),
        largest_trained_bytes=max((p.nbytes for p in trained.values()), default=0),
        trains_lm_head=head.requires_grad,
        trains_vision=visual is not None and any(p.requires_grad for p in visual.parameters()),
        adapter_parameters=sum(p.numel() for name, p in trained.items() if plain_name(name) is None),
        adapter_inputs=sum(p.shape[1] for p in lora_a),
        num_adapters=len(lora_a),
        vocab_size=head.shape[0],
        hidden_size=text.hidden_size,
        intermediate_size=policy.sizes["intermediate_size"],
        num_layers=text.num_hidden_layers,
        num_heads=text.num_attention_heads,
        num_kv_heads=text.num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        qk_norm=any(name.endswith(".q_norm.weight") for name, _ in policy.module.named_parameters()),
        vision=_vision_sizes(policy.module),
    )


def _meta_policy(config: ModelConfig, where: str) -> Policy:
    gguf = {}
    folder = smollm2_folder() if config.path == "smollm2" else _config_folder(config.path)
    if list(folder.glob("*.gguf")):
        gguf = {"gguf_file": find_gguf(folder).name}
    else:
        model_type = read_config(folder, config.path).get("model_type")
        if model_type not in FAMILIES:
            raise UserError(
                f"{where}: models of type {model_type!r} are not supported; those of type {', '.join(FAMILIES)} are"
            )
    quiet = logging.getLogger("transformers.configuration_utils")
    level = quiet.level
    try:
        quiet.setLevel(logging.ERROR)
        model_config = AutoConfig.from_pretrained(folder, **gguf)
        family = FAMILIES[model_config.model_type]
        build = getattr(family.model, "from_config", None) or family.model._from_config
        with torch.device("meta"):
            module = build(model_config, dtype=getattr(torch, config.dtype))
        return family.policy(module, "sdpa")
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except Exception as error:  # transformers' validation raises errors of many types for a wrong config.json
        raise UserError(f"{where}: config.json does not describe a model: {' '.join(str(error).split())}") from error
    finally:
        quiet.setLevel(level)


def _config_folder(path: str) -> Path:
    """The model's folder; of a hub model a snapshot that may hold ``config.json`` alone."""
    if HUB_ID.fullmatch(path) and not Path(path).is_dir():
        try:
            return Path(hf_hub_download(path, "config.json")).parent
        except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError):
            return find_folder(path)  # it meets the same obstacle, and says what it is
    return find_folder(path)


def _vision_sizes(module: PreTrainedModel) -> VisionSizes | None:
    vision: Any = getattr(module.config, "vision_config", None)
    if vision is None:
        return None
    return VisionSizes(vision.hidden_size, vision.intermediate_size, vision.depth, vision.spatial_merge_size**2)
