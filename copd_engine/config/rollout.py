"""The rollout engine."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from copd_engine.config.base import Float, Int, NonNegativeInt, PositiveFloat, PositiveInt, Section


class RolloutConfig(Section):
    """``prompts_per_step`` prompts per branch and step, ``group_size`` rollouts each (G), sampled at ``temperature``.

    ``max_prompt_tokens`` bounds the prompt after image and video expansion; a longer one is an error.

    ``engine``: embedded samples with the trainer's modules, sglang with one ``sglang.Engine`` for all experts; auto
    takes sglang where it is installed beside a CUDA GPU. ``max_running``: sequences decoded side by side.
    ``max_cached_tokens``: how many tokens' keys and values the embedded engine holds, a prompt's once for its group.

    The rest is for sglang. ``isolate`` hosts the engine in a process of its own, which its failures cannot leave;
    false: in the trainer's. ``memory_fraction`` is of the GPU memory that is free when the engine starts, beside the
    trainer's models; its weights and KV cache get that much (sglang's ``mem_fraction_static``). ``kv_cache_tokens``
    limits the cache (a CPU gets room for ``max_running`` sequences). ``tensor_parallel``: GPUs per copy of the model.
    ``bucket_mb``: weights travel in buckets of that size. ``deterministic``: kernels whose result does not depend on
    the batch. ``max_staleness``: how many versions behind the trainer a token's weights may be. ``request_timeout_s``:
    a request without an answer by then is sampled once more and then dropped from its group; ``start_timeout_s`` bounds
    the engine's start, and ``max_restarts`` how often in a row it may die.
    """

    engine: Literal["auto", "embedded", "sglang"] = "auto"
    prompts_per_step: PositiveInt = 256
    group_size: Annotated[Int, Field(ge=2)] = 8
    temperature: PositiveFloat = 1.0
    max_new_tokens: PositiveInt = 16_384
    max_prompt_tokens: PositiveInt = 16_384
    isolate: bool = True
    memory_fraction: Annotated[Float, Field(gt=0, lt=1)] = 0.6
    kv_cache_tokens: PositiveInt | None = None
    tensor_parallel: PositiveInt = 1
    bucket_mb: PositiveInt = 1024
    max_running: PositiveInt = 256
    max_cached_tokens: PositiveInt = 262_144
    deterministic: bool = False
    max_staleness: NonNegativeInt = 0
    request_timeout_s: PositiveFloat = 3600.0
    start_timeout_s: PositiveFloat = 900.0
    max_restarts: NonNegativeInt = 2
