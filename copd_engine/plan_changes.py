"""The cheapest changes of a config that make a plan fit: all combinations of a few, computed one by one."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

from copd_engine.config import LoraConfig, RunConfig
from copd_engine.models.decode_layout import PAGE
from copd_engine.plan import ModePlan, engine_of, free_at_start, plan_mode, sizes_of
from copd_engine.plan_items import total

#: Halvings of tokens and lengths that are tried.
HALVINGS = 4


@dataclass(frozen=True)
class Change:
    """Overrides as the command line takes them, and what they would cost: none, time, or what is learnt."""

    overrides: tuple[str, ...]
    cost: float
    plan: ModePlan


def single_changes(config: RunConfig, gpu_bytes: int) -> list[Change]:
    """Each change alone, the cheapest first."""
    options = [level for levels in _options(config) for level in levels[1:]]
    return sorted((_applied(config, gpu_bytes, [option]) for option in options), key=lambda change: change.cost)


def cheapest_that_fits(config: RunConfig, gpu_bytes: int) -> tuple[Change | None, Change]:
    """The cheapest combination that fits, None if none does; and the one that needs the least memory."""
    tried = [_applied(config, gpu_bytes, levels, tune=True) for levels in itertools.product(*_options(config))]
    fitting = [change for change in tried if change.plan.fits]
    best = min(fitting, key=lambda change: (change.cost, change.plan.missing_bytes), default=None)
    return best, min(tried, key=lambda change: change.plan.missing_bytes)


Option = tuple[float, dict[str, Any]]


def _options(config: RunConfig) -> list[list[Option]]:
    """Levels of each kind of change, the first of which changes nothing.

    Cost: 1 takes time alone, from 3 on it changes what is trained. Lengths cost more the shorter they are.
    """
    rollout, optim, model = config.rollout, config.optim, config.model
    nothing: Option = (0.0, {})
    kinds = [[nothing] for _ in range(7)]
    if not model.gradient_checkpointing:
        kinds[0].append((1.0, {"model.gradient_checkpointing": True}))
    for n in range(1, HALVINGS + 1):
        tokens = optim.max_tokens_per_micro_batch >> n
        if tokens >= 256:
            kinds[1].append((0.5 + 0.1 * n, {"optim.max_tokens_per_micro_batch": tokens}))
        if rollout.max_new_tokens >> n >= 64 and rollout.max_prompt_tokens >> n >= 64:
            keys = ("max_new_tokens", "max_prompt_tokens")
            shorter = {f"rollout.{key}": getattr(rollout, key) >> n for key in keys}
            kinds[2].append((4.0 + n, shorter))
    if model.dtype == "float32":
        kinds[3].append((3.0, {"model.dtype": "bfloat16"}))
    if not model.freeze_vision and model.lora is None and sizes_of(config.model).vision is not None:
        kinds[4].append((3.5, {"model.freeze_vision": True}))
    if not optim.offload:
        kinds[6].append((1.2, {"optim.offload": True}))
    if model.lora is None:
        kinds[5].append((6.0, {"model.lora": LoraConfig()}))
    return kinds


def _applied(config: RunConfig, gpu_bytes: int, levels: Any, tune: bool = False) -> Change:
    changes = {key: value for _, level in levels for key, value in level.items()}
    cost = sum(cost for cost, _ in levels)
    changed = _with(config, changes)
    plan = plan_mode(changed, gpu_bytes)
    if tune and not plan.fits:
        tuned = _tuned_engine(changed, plan)
        if tuned:
            tuned = {key: value for key, value in tuned.items() if getattr(changed.rollout, key.split(".")[1]) != value}
            plan, changes, cost = plan_mode(_with(changed, tuned), gpu_bytes), changes | tuned, cost + 0.2
    return Change(tuple(_override(key, value) for key, value in changes.items()), cost, plan)


def _tuned_engine(config: RunConfig, plan: ModePlan) -> dict[str, Any]:
    """The engine's share of the memory set to what is left for it; nothing where not even one sequence would fit."""
    rollout = total(tuple(item for item in plan.rollout if item.name != "keys and values"))
    free = plan.gpu_bytes - total(plan.resident) - rollout
    tokens = free // plan.kv_bytes_per_token // PAGE * PAGE
    if tokens < plan.longest_tokens:
        return {}
    if engine_of(config) == "embedded":
        return {"rollout.max_cached_tokens": tokens}
    # Rounded down, and never more than all places could fill.
    wanted = min(tokens, config.rollout.max_running * plan.longest_tokens) * plan.kv_bytes_per_token
    weights = plan.rollout[0].num_bytes
    fraction = math.floor(100 * (weights + wanted) / free_at_start(plan.gpu_bytes, plan.resident)) / 100
    return {"rollout.memory_fraction": fraction, "rollout.kv_cache_tokens": None} if 0 < fraction < 1 else {}


def _with(config: RunConfig, changes: dict[str, Any]) -> RunConfig:
    for key, value in changes.items():
        section, field = key.split(".")
        config = config.model_copy(update={section: getattr(config, section).model_copy(update={field: value})})
    return config


def _override(key: str, value: Any) -> str:
    if isinstance(value, LoraConfig):
        return f"{key}={{}}"
    return f"{key}={'null' if value is None else str(value).lower()}"
