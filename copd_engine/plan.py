"""A memory plan of a run: what one GPU holds in each phase, what fits, what a step moves. Arithmetic; nothing is run.

Exact: parameters, masters, gradient sums, AdamW states, bytes of keys and values. The rest is estimated
(``plan_estimates.py``). The code trains on one device, so one GPU is planned; what an even sharding over several would
leave on each is said beside it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from copd_engine.algorithms import Schedule
from copd_engine.algorithms.shares import opd_assignments
from copd_engine.config import LoraConfig, ModelConfig, RunConfig
from copd_engine.models.cache import pages_of
from copd_engine.models.decode_layout import PAGE
from copd_engine.models.meta import ModelSizes, model_sizes
from copd_engine.plan_estimates import CONTEXT_BYTES, activation_bytes, reserve_bytes
from copd_engine.plan_items import (
    UPDATED,
    Item,
    base_bytes_on_host,
    engine_copies,
    resident_items,
    teacher_heads,
    total,
    training_items,
)
from copd_engine.plan_moves import Moves, state_bytes, step_moves
from copd_engine.types import UserError


@dataclass(frozen=True)
class Room:
    """Tokens whose keys and values the engine can hold beside everything else, and whole sequences of the longest kind
    (prompt and response), at most ``rollout.max_running``."""

    num_bytes: int
    num_tokens: int
    num_sequences: int


@dataclass(frozen=True)
class ModePlan:
    """Full-parameter or LoRA training of K experts on one GPU of ``gpu_bytes``.

    ``resident``: from the first update to the end; ``offloaded_bytes`` of ``optim.offload`` are in host memory instead.
    Each of ``training``, ``rollout`` and ``end`` stands beside it in
    its phase. ``room`` with the engine asleep while the trainer works, as the code has it; ``room_without_sleep`` if it
    were not. ``host_bytes_asleep``: of the engine's weights, in host memory meanwhile. ``teacher_state_bytes``: of
    teachers' hidden states, in host memory through a step of distillation, if all responses were as long as they may.
    """

    mode: str
    engine: str
    gpu_bytes: int
    num_experts: int
    num_tokens: int
    longest_tokens: int
    kv_bytes_per_token: int
    sizes: ModelSizes
    resident: tuple[Item, ...]
    training: tuple[Item, ...]
    rollout: tuple[Item, ...]
    end: tuple[Item, ...]
    activations: dict[str, int]
    room: Room
    room_without_sleep: Room
    host_bytes_asleep: int
    teacher_state_bytes: int
    offloaded_bytes: int
    moves: Moves

    @property
    def peaks(self) -> dict[str, int]:
        held = total(self.resident)
        return {name: held + total(getattr(self, name)) for name in ("training", "rollout", "end")}

    @property
    def missing_bytes(self) -> int:
        """By how much it does not fit; at most 0 if it does."""
        return max(self.peaks.values()) - self.gpu_bytes

    @property
    def fits(self) -> bool:
        return self.missing_bytes <= 0 and self.room.num_sequences > 0

    def sharded_bytes(self, num_gpus: int) -> int:
        """Peak of training per GPU if weights, masters, gradients and moments were split evenly."""
        whole = ("gradient sums", UPDATED, *(item.name for item in self.resident))
        parts = [i.num_bytes // num_gpus if i.name in whole else i.num_bytes for i in (*self.resident, *self.training)]
        return sum(parts)


def plan_run(config: RunConfig, gpu_bytes: int, num_gpus: int = 1) -> dict[str, ModePlan]:
    """Plans by mode, ``full`` and ``lora``; LoRA with the config's adapters, or the default ones where it has none.

    UserError for a model that cannot be read, or an engine that wants more GPUs than there are.
    """
    tensor_parallel = config.rollout.tensor_parallel
    if engine_of(config) == "sglang" and tensor_parallel > num_gpus:
        raise UserError(
            f"rollout.tensor_parallel = {tensor_parallel}: the plan is for {num_gpus} GPU{'s' * (num_gpus > 1)}"
        )
    return {mode: plan_mode(in_mode(config, mode), gpu_bytes) for mode in ("full", "lora")}


def in_mode(config: RunConfig, mode: str) -> RunConfig:
    lora = (config.model.lora or LoraConfig()) if mode == "lora" else None
    return config.model_copy(update={"model": config.model.model_copy(update={"lora": lora})})


def engine_of(config: RunConfig) -> str:
    """``auto`` as on a GPU where sglang is installed."""
    return "sglang" if config.rollout.engine == "auto" else config.rollout.engine


@functools.cache
def _sizes(config: ModelConfig) -> ModelSizes:
    return model_sizes(config)


def sizes_of(config: ModelConfig) -> ModelSizes:
    """Sizes of each different model once: what does not change them is left at its default."""
    keys = ("path", "dtype", "freeze_vision", "lora")
    return _sizes(ModelConfig(**{key: getattr(config, key) for key in keys}))


def plan_mode(config: RunConfig, gpu_bytes: int) -> ModePlan:
    """The plan of the config as it stands."""
    sizes, engine, rollout = sizes_of(config.model), engine_of(config), config.rollout
    num_experts = len(Schedule(config).students)
    itemsize = 4 if config.model.dtype == "float32" else 2
    sample = rollout.max_prompt_tokens + rollout.max_new_tokens
    num_tokens = max(config.optim.max_tokens_per_micro_batch, min(sample, config.optim.max_length or sample))
    multiple = config.optim.pad_to_multiple_of
    num_tokens = -(-num_tokens // multiple) * multiple
    activations = {
        name: activation_bytes(sizes, itemsize, num_tokens, rollout.max_prompt_tokens, recompute)
        for name, recompute in (("kept", False), ("checkpointed", True))
    }
    base_on_host = base_bytes_on_host(config, sizes)
    resident = resident_items(config, sizes, num_experts, base_on_host)
    processes = 2 if engine == "sglang" else 1
    reserve = Item("CUDA, fragmentation", reserve_bytes(gpu_bytes, processes), False)
    training = (
        *training_items(sizes, itemsize, num_tokens, activations, config.model.gradient_checkpointing),
        *teacher_heads(config, sizes, itemsize),
        reserve,
    )
    if config.optim.offload:
        training = (Item(UPDATED, state_bytes(sizes), True, "in host memory between updates"), *training)
    shards = rollout.tensor_parallel if engine == "sglang" else 1
    kv_bytes = sizes.kv_bytes_per_token(itemsize) // min(shards, sizes.num_kv_heads)
    longest = (
        sample
        if engine == "sglang"
        else PAGE * (pages_of(rollout.max_prompt_tokens) + pages_of(sample - rollout.max_prompt_tokens - 1))
    )
    copies = engine_copies(config, sizes, itemsize, num_experts, engine)
    if base_on_host:
        copies = (*copies, Item("base model, for diagnostics", base_on_host, True, "from host memory"))
    free = gpu_bytes - total(resident) - reserve.num_bytes - total(copies)
    cache_limit = _cache_limit(config, gpu_bytes, resident, total(copies[:1]), kv_bytes, engine)
    room = _room(min(free, cache_limit), kv_bytes, longest, rollout.max_running)
    beside = gpu_bytes - total(resident) - total(training) - total(copies)
    cache = max(cache_limit, kv_bytes * longest)  # one sequence at least
    # The models at the end are evaluated by an embedded engine, whatever sampled before.
    tokens = min(rollout.max_cached_tokens, rollout.max_running * sample)
    evaluation = sizes.kv_bytes_per_token(itemsize) * tokens
    end = (
        Item("merged model", sizes.weight_bytes if num_experts > 1 else 0, True),
        Item("keys and values of its evaluation", evaluation, False, f"at most {tokens:,} tokens, embedded"),
        reserve,
    )
    frozen = sizes.trained_parameters < sizes.num_parameters or config.model.lora is not None
    host = sizes.weight_bytes // shards if engine == "sglang" and frozen else 0
    return ModePlan(
        mode="full" if config.model.lora is None else "lora",
        engine=engine,
        gpu_bytes=gpu_bytes,
        num_experts=num_experts,
        num_tokens=num_tokens,
        longest_tokens=longest,
        kv_bytes_per_token=kv_bytes,
        sizes=sizes,
        resident=resident,
        training=training,
        rollout=(*copies, Item("keys and values", cache, False, _cache_note(config, engine)), reserve),
        end=end,
        activations=activations,
        room=room,
        room_without_sleep=_room(min(beside, cache_limit), kv_bytes, longest, rollout.max_running),
        host_bytes_asleep=host,
        teacher_state_bytes=_teacher_state_bytes(config, sizes, itemsize),
        offloaded_bytes=base_on_host + num_experts * state_bytes(sizes) * config.optim.offload,
        moves=step_moves(config, sizes, num_experts, engine, host),
    )


def _teacher_state_bytes(config: RunConfig, sizes: ModelSizes, itemsize: int) -> int:
    """Of all students' cross batches: a signal over the vocabulary holds their states until the updates."""
    if config.distillation.signal == "sampled":
        return 0
    schedule = Schedule(config)
    is_copd = config.method == "copd"
    in_opd = opd_assignments(config, 0) if is_copd else schedule.plan(schedule.num_steps).assignments
    num_prompts = sum(assignment.num_prompts for assignment in in_opd if assignment.teacher)
    num_tokens = num_prompts * config.rollout.group_size * config.rollout.max_new_tokens
    return num_tokens * sizes.hidden_size * itemsize


def _cache_limit(
    config: RunConfig, gpu_bytes: int, resident: tuple[Item, ...], weights: int, kv_bytes: int, engine: str
) -> int:
    """The most bytes of keys and values that the engine takes.

    sglang: ``memory_fraction`` of what is free when it starts less its weights, or ``kv_cache_tokens``.
    """
    rollout = config.rollout
    if engine == "embedded":
        return rollout.max_cached_tokens // PAGE * PAGE * kv_bytes
    limit = max(0, int(rollout.memory_fraction * free_at_start(gpu_bytes, resident)) - weights)
    return min(limit, rollout.kv_cache_tokens * kv_bytes) if rollout.kv_cache_tokens else limit


def free_at_start(gpu_bytes: int, resident: tuple[Item, ...]) -> int:
    """What sglang finds free when it starts: the trainer's weights and masters are there, the moments not yet."""
    return max(0, gpu_bytes - 2 * CONTEXT_BYTES - total(resident[:3]))


def _cache_note(config: RunConfig, engine: str) -> str:
    if engine == "embedded":
        return f"rollout.max_cached_tokens = {config.rollout.max_cached_tokens:,}"
    if config.rollout.kv_cache_tokens:
        return f"at most rollout.kv_cache_tokens = {config.rollout.kv_cache_tokens:,}"
    return (
        f"rollout.memory_fraction = {config.rollout.memory_fraction} of what is free when it starts, less its weights"
    )


def _room(num_bytes: int, kv_bytes: int, longest: int, max_running: int) -> Room:
    tokens = max(0, num_bytes // kv_bytes)
    return Room(num_bytes, tokens, min(tokens // longest, max_running))
