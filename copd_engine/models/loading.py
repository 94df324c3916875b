"""From ``model.path`` to a policy and its prompt encoder."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeForConditionalGeneration,
)
from transformers.utils import logging as transformers_logging

from copd_engine.config import MediaConfig, ModelConfig
from copd_engine.models.base import Policy, PromptEncoder
from copd_engine.models.causal_lm import CausalLMPolicy, TextPromptEncoder
from copd_engine.models.flash import Backend, resolve_attention
from copd_engine.models.folder import find_folder, read_config
from copd_engine.models.liger import apply_liger, resolve_liger
from copd_engine.models.lora import add_adapters
from copd_engine.models.processor import folder_encoder
from copd_engine.models.qwen2_5_vl import Qwen2_5_VLPolicy
from copd_engine.models.qwen3_vl import Qwen3VLPolicy
from copd_engine.models.recompute import enable_recompute
from copd_engine.models.smollm2 import load_gguf_folder, load_smollm2
from copd_engine.types import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Family:
    """transformers' class of a model type, and the policy around it."""

    model: Any
    policy: type[Policy]


_TEXT = _Family(AutoModelForCausalLM, CausalLMPolicy)
#: By ``model_type`` of config.json. SmolLM2 is a llama.
FAMILIES = {
    "qwen3_vl": _Family(Qwen3VLForConditionalGeneration, Qwen3VLPolicy),
    "qwen3_vl_moe": _Family(Qwen3VLMoeForConditionalGeneration, Qwen3VLPolicy),
    "qwen2_5_vl": _Family(Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLPolicy),
    **dict.fromkeys(("qwen3", "qwen3_moe", "qwen2", "llama", "mistral"), _TEXT),
}


def load_model(
    config: ModelConfig, media: MediaConfig | None = None, device: torch.device | str = "cpu"
) -> tuple[Policy, PromptEncoder]:
    """Policy on ``device`` in ``config.dtype``, and its prompt encoder.

    UserError for a missing, unreadable or unsupported model, or an option that this machine cannot give.
    """
    transformers_logging.disable_progress_bar()  # its bars for files of a few MB would tear the training bar apart
    device = torch.device(device)
    attention = resolve_attention(config.attention, device, getattr(torch, config.dtype))
    liger = resolve_liger(config.liger, device)
    policy, encoder = _read(config, media or MediaConfig(), attention)
    if config.freeze_vision:
        policy.freeze_vision()
    if config.lora is not None:
        add_adapters(policy.module, policy.backbone, config.lora)
    if config.gradient_checkpointing:
        enable_recompute(policy.module)
    kernels = apply_liger(policy.module, policy.backbone) if liger else "transformers' RMSNorm, SwiGLU, RoPE"
    policy.module.to(device)
    logger.info("model %s on %s: attention %s; %s", config.path, device, attention, kernels)
    return policy, encoder


def _read(config: ModelConfig, media: MediaConfig, attention: Backend) -> tuple[Policy, PromptEncoder]:
    dtype = getattr(torch, config.dtype)
    where = f"model.path = {config.path!r}"
    if config.path == "smollm2":
        return _gguf_model(load_smollm2(dtype), where, attention)
    folder = find_folder(config.path)
    if list(folder.glob("*.gguf")):
        return _gguf_model(load_gguf_folder(folder, dtype), where, attention)
    family = _family(read_config(folder, config.path).get("model_type"), where)
    try:
        module, report = family.model.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
        if report["missing_keys"]:  # transformers would only warn, and fill them with random numbers
            raise UserError(f"the weights lack {sorted(report['missing_keys'])[0]}")
        return family.policy(module, attention), folder_encoder(folder, module.config, media)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except (OSError, ValueError, SafetensorError) as error:  # what transformers raises for missing and damaged files
        raise UserError(f"{where}: the model cannot be read: {error}") from error


def _gguf_model(loaded: tuple[Any, Any], where: str, attention: Backend) -> tuple[Policy, PromptEncoder]:
    module, tokenizer = loaded
    family = _family(module.config.model_type, where)
    try:
        rows = module.get_input_embeddings().weight.shape[0]
        return family.policy(module, attention), TextPromptEncoder(tokenizer, tokenizer.eos_token_id, rows)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _family(model_type: Any, where: str) -> _Family:
    if model_type not in FAMILIES:
        raise UserError(
            f"{where}: models of type {model_type!r} are not supported; those of type {', '.join(FAMILIES)} are"
        )
    return FAMILIES[model_type]
