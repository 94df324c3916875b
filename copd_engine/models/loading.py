"""From ``model.path`` to a policy and its prompt encoder."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3VLForConditionalGeneration
from transformers.utils import logging as transformers_logging

from copd_engine.config import ModelConfig
from copd_engine.models.base import Policy, PromptEncoder
from copd_engine.models.causal_lm import CausalLMPolicy, TextPromptEncoder
from copd_engine.models.qwen3_vl import Qwen3VLPolicy, Qwen3VLPromptEncoder
from copd_engine.models.smollm2 import load_gguf_folder, load_smollm2
from copd_engine.types import UserError


def load_model(config: ModelConfig) -> tuple[Policy, PromptEncoder]:
    """Policy on the CPU in ``config.dtype``, and its prompt encoder. UserError for a missing or unreadable model."""
    transformers_logging.disable_progress_bar()  # its bars for files of a few MB would tear the training bar apart
    dtype = getattr(torch, config.dtype)
    if config.path == "smollm2":
        return _causal_lm(*load_smollm2(dtype))
    folder = Path(str(files("copd_engine") / "testbed" / "base")) if config.path == "testbed" else Path(config.path)
    if not folder.is_dir():
        raise UserError(f"model.path = {config.path!r}: no such folder (a Hugging Face folder, 'testbed' or 'smollm2')")
    if list(folder.glob("*.gguf")):
        return _causal_lm(*load_gguf_folder(folder, dtype))
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise UserError(f"model.path = {config.path!r}: the folder has no config.json, so it is no Hugging Face model")
    try:
        if json.loads(config_file.read_text()).get("model_type") == "qwen3_vl":
            module = _pretrained(Qwen3VLForConditionalGeneration, folder, dtype)
            return Qwen3VLPolicy(module), Qwen3VLPromptEncoder.from_folder(folder, module)
        module = _pretrained(AutoModelForCausalLM, folder, dtype)
        return _causal_lm(module, AutoTokenizer.from_pretrained(folder))
    except UserError:
        raise
    except (OSError, ValueError, SafetensorError) as error:  # what transformers raises for missing and damaged files
        raise UserError(f"model.path = {config.path!r}: the model cannot be read: {error}") from error


def _pretrained(model_class: Any, folder: Path, dtype: torch.dtype) -> Any:
    module, report = model_class.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    if report["missing_keys"]:  # transformers would only warn, and fill them with random numbers
        raise UserError(f"model.path = '{folder}': the weights lack {sorted(report['missing_keys'])[0]}")
    return module


def _causal_lm(module, tokenizer) -> tuple[Policy, PromptEncoder]:  # type: ignore[no-untyped-def]
    return CausalLMPolicy(module), TextPromptEncoder(tokenizer, tokenizer.eos_token_id)
