"""How sglang is started: its arguments and environment from the rollout config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from copd_engine.config import LoraConfig, RolloutConfig
from copd_engine.rollout.sglang_host import LOADER
from copd_engine.rollout.sglang_lora import targets

#: Without a limit sglang would take most of a machine's memory for the cache of keys and values.
MAX_CPU_CACHE_TOKENS = 262_144


def engine_arguments(
    folder: Path | str,
    config: RolloutConfig,
    dtype: str,
    device: str,
    lora: LoraConfig | None = None,
    num_experts: int = 1,
    keep_weights: bool = False,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Keyword arguments of ``sglang.Engine`` and environment variables.

    ``folder``: the model in Hugging Face format, or a hub id. ``keep_weights``: a copy of the weights stays in host
    memory during sleep, because not all of them are synced.
    """
    arguments: dict[str, Any] = {
        "model_path": str(folder),
        "dtype": dtype,
        "device": device.partition(":")[0],
        "tp_size": config.tensor_parallel,
        "max_running_requests": config.max_running,
        "skip_tokenizer_init": True,
        "sampling_backend": "pytorch",
        "grammar_backend": "none",
        "enable_custom_logit_processor": True,
        "custom_weight_loader": [LOADER],
        "log_level": "error",
    }
    # A vision embedding is kept under a hash of the pixels and would outlive the weights that made it.
    environment = {"SGLANG_VLM_CACHE_SIZE_MB": "0"}
    cache_tokens = config.kv_cache_tokens
    if device == "cpu":
        sequence = config.max_prompt_tokens + config.max_new_tokens
        cache_tokens = cache_tokens or max(sequence, min(config.max_running * sequence, MAX_CPU_CACHE_TOKENS))
        arguments["attention_backend"] = "torch_native"
        environment |= {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"}
    else:
        arguments |= {
            "mem_fraction_static": config.memory_fraction,
            "enable_memory_saver": True,
            "enable_weights_cpu_backup": keep_weights,
            "enable_deterministic_inference": config.deterministic,
        }
        if ":" in device:
            arguments["base_gpu_id"] = int(device.partition(":")[2])
    if cache_tokens is not None:
        arguments["max_total_tokens"] = cache_tokens
    if lora is not None:
        arguments |= {
            "enable_lora": True,
            "max_lora_rank": lora.rank,
            "lora_target_modules": targets(lora),
            "max_loras_per_batch": num_experts,
            # an expert's next adapter is loaded before its last one goes
            "max_loaded_loras": 2 * num_experts,
        }
        if device == "cpu":
            arguments["lora_backend"] = "torch_native"
    return arguments, environment
