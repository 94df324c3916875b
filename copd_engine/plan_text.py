"""``copd plan``: the plan of a config on given GPUs, as tables or JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from copd_engine.config import RunConfig
from copd_engine.metrics import system_stats
from copd_engine.plan import ModePlan, in_mode, plan_run
from copd_engine.plan_changes import Change, cheapest_that_fits, single_changes
from copd_engine.plan_items import Item
from copd_engine.types import UserError

PHASES = {
    "resident": "always",
    "training": "while it trains, the engine asleep",
    "rollout": "during rollouts",
    "end": "at the end",
}
NAMES = {"full": "full parameters", "lora": "LoRA"}
#: Single changes that the text lists.
NUM_SINGLE = 6


def find_gpus(device: str, gpus: int | None, memory_gb: float | None) -> tuple[int, int]:
    """How many GPUs, and the bytes of the one that is used; what is not given, NVML says. UserError where it cannot."""
    if gpus is not None and gpus < 1:
        raise UserError(f"--gpus {gpus}: must be at least 1")
    if memory_gb is not None and not (math.isfinite(memory_gb) and memory_gb > 0):
        raise UserError(f"--gpu-memory {memory_gb}: must be GB above 0, e.g. 80")
    if memory_gb is not None:
        return gpus or 1, int(memory_gb * 1e9)
    seen = [gpu["memory_total_bytes"] for gpu in system_stats()["gpu"] or ()]
    if not seen:
        raise UserError("no GPU is seen here (NVML); say which are meant, e.g. --gpus 1 --gpu-memory 80")
    number = device.removeprefix("cuda:")
    index = int(number) if number.isdecimal() else 0
    if index >= len(seen):
        raise UserError(f"device = {device!r}: NVML sees {len(seen)} GPUs; give --gpus and --gpu-memory")
    if seen[index] is None:
        raise UserError("NVML does not say how much memory the GPU has; give --gpu-memory")
    return gpus or len(seen), int(seen[index])


def plan_json(config: RunConfig, gpus: int | None, memory_gb: float | None) -> str:
    """Everything in bytes and tokens."""
    num_gpus, gpu_bytes = find_gpus(config.device, gpus, memory_gb)
    modes: dict[str, Any] = {}
    for mode, plan in plan_run(config, gpu_bytes, num_gpus).items():
        changed = in_mode(config, mode)
        best, least = cheapest_that_fits(changed, gpu_bytes)
        modes[mode] = asdict(plan) | {
            "peaks": plan.peaks,
            "fits": plan.fits,
            "missing_bytes": plan.missing_bytes,
            "sharded_bytes_per_gpu": plan.sharded_bytes(num_gpus),
            "single_changes": [_change_json(change) for change in single_changes(changed, gpu_bytes)],
            "cheapest_that_fits": None if best is None else _change_json(best),
            "least_memory": _change_json(least),
        }
    return json.dumps({"measured": False, "num_gpus": num_gpus, "num_gpus_used": 1, "modes": modes}, indent=2)


def _change_json(change: Change) -> dict[str, Any]:
    peaks, missing = change.plan.peaks, change.plan.missing_bytes
    return {"overrides": change.overrides, "peaks": peaks, "missing_bytes": missing, "fits": change.plan.fits}


def plan_text(config: RunConfig, gpus: int | None, memory_gb: float | None) -> str:
    """Tables of both modes side by side, then verdicts."""
    num_gpus, gpu_bytes = find_gpus(config.device, gpus, memory_gb)
    plans = plan_run(config, gpu_bytes, num_gpus)
    lines = [
        *_head(config, plans["full"], num_gpus),
        "",
        *_memory(config, plans),
        "",
        *_engine(config, plans),
        "",
        *_moves(config, plans),
        "",
    ]
    for mode, plan in plans.items():
        lines += [*_verdict(in_mode(config, mode), plan, num_gpus), ""]
    return "\n".join(lines[:-1])


def _head(config: RunConfig, plan: ModePlan, num_gpus: int) -> list[str]:
    sizes = plan.sizes
    head = f"lm_head {sizes.lm_head_parameters:,}" + (" (the embedding)" if sizes.tied_lm_head else "")
    tower = f"vision tower {sizes.vision_parameters:,}, " if sizes.vision else ""
    used = "" if num_gpus == 1 else f" x {num_gpus}, of which the trainer uses one: it does not shard"
    return [
        f"{config.model.path}: {sizes.num_parameters:,} parameters ({tower}{head}), {config.model.dtype}",
        f"{plan.num_experts} expert{'s' * (plan.num_experts != 1)}; GPU of {_gb(plan.gpu_bytes)} GB{used}",
        "Arithmetic; nothing was measured on a GPU. ~ marks estimates, the rest is exact. GB = 10^9 bytes.",
        *(["Baselines run beside it in processes of their own, which are not counted."] * config.parallel_baselines),
    ]


def _memory(config: RunConfig, plans: dict[str, ModePlan]) -> list[str]:
    full, lora = plans.values()
    rows: list[Sequence[str]] = [("GB", *(NAMES[mode] for mode in plans), "")]
    numbers = [f"{plan.sizes.trained_parameters:,}" for plan in plans.values()]
    rows.append(("trained parameters of an expert", *numbers, ""))
    frozen = [f"{plan.sizes.num_parameters - _trained_of_base(plan):,}" for plan in plans.values()]
    rows.append(("frozen", *frozen, ""))
    for phase, title in PHASES.items():
        rows.append((title, "", "", ""))
        items = [{item.name: item for item in getattr(plan, phase)} for plan in (full, lora)]
        for name in dict.fromkeys([*items[0], *items[1]]):
            found = [column.get(name) for column in items]
            rows.append((f"  {name}", *map(_item, found), _note(*(item.note if item else "" for item in found))))
        if phase != "resident":
            rows.append(("  all together", *(f"~{_gb(plan.peaks[phase])}" for plan in plans.values()), ""))
    if any(plan.offloaded_bytes for plan in plans.values()):
        rows.append(
            ("in host memory instead", *(_gb(plan.offloaded_bytes) for plan in plans.values()), "optim.offload")
        )
    if any(plan.teacher_state_bytes for plan in plans.values()):
        note = f"at most, of all students at once; distillation.signal={config.distillation.signal}"
        states = (f"~{_gb(plan.teacher_state_bytes)}" for plan in plans.values())
        rows.append(("teachers' states, in host memory", *states, note))
    for name in ("kept", "checkpointed"):
        title = f"activations if {name}"
        rows.append((title, *(f"~{_gb(plan.activations[name])}" for plan in plans.values()), ""))
    return _table(rows)


def _note(full: str, lora: str) -> str:
    if lora == full:
        return full
    return "; ".join(note for note in (full, f"LoRA: {lora}" if lora else "") if note)


def _trained_of_base(plan: ModePlan) -> int:
    return plan.sizes.trained_parameters - plan.sizes.adapter_parameters


def _engine(config: RunConfig, plans: dict[str, ModePlan]) -> list[str]:
    plan = plans["full"]
    auto = " (auto, as on a GPU where it is installed)" if config.rollout.engine == "auto" else ""
    rows: list[Sequence[str]] = [(f"rollout engine {plan.engine}{auto}", *(NAMES[mode] for mode in plans), "")]
    pairs = list(plans.values())
    rows.append(("  bytes of keys and values per token", *(f"{p.kv_bytes_per_token:,}" for p in pairs), ""))
    for title, rooms in (
        ("asleep while the trainer works", [p.room for p in pairs]),
        ("if it stayed awake", [p.room_without_sleep for p in pairs]),
    ):
        rows.append((f"  tokens, {title}", *(f"~{room.num_tokens:,}" for room in rooms), ""))
        note = f"sequences of {plan.longest_tokens:,} tokens, of {config.rollout.max_running} that may run"
        rows.append(("  the longest sequences at once", *(f"~{room.num_sequences}" for room in rooms), note))
    rows.append(("  weights in host memory while asleep", *(_gb(p.host_bytes_asleep) for p in pairs), "GB"))
    return _table(rows)


def _moves(config: RunConfig, plans: dict[str, ModePlan]) -> list[str]:
    pairs = [plan.moves for plan in plans.values()]
    rows: list[Sequence[str]] = [("a step moves, in GB", *(NAMES[mode] for mode in plans), "")]
    rows.append(("  one expert into the engine", *(_gb(m.swap_bytes) for m in pairs), "weights, or adapters"))
    for phase in pairs[0].num_swaps:
        note = f"{pairs[0].num_swaps[phase]} swaps" + (": cross batches go with the native ones" * (phase == "opd"))
        rows.append((f"  all experts, phase {phase}", *(_gb(m.step_bytes[phase]) for m in pairs), note))
    notes = list(dict.fromkeys(m.host_note for m in pairs if m.host_note))
    rows.append(("  over the host", *(f"~{_gb(m.host_bytes)}" for m in pairs), "; ".join(notes)))
    rows.append(
        (
            "  masters and moments, in and out",
            *(_gb(m.offload_host_bytes) for m in pairs),
            "optim.offload=true" if config.optim.offload else "only with optim.offload=true",
        )
    )
    freed = "all experts' but the one that is updated"
    rows.append(("  which frees on the GPU", *(_gb(m.offload_saved_bytes) for m in pairs), freed))
    return _table(rows)


def _verdict(config: RunConfig, plan: ModePlan, num_gpus: int) -> list[str]:
    name, missing = NAMES[plan.mode], plan.missing_bytes
    peaks = ", ".join(f"{phase} ~{_gb(num_bytes)}" for phase, num_bytes in plan.peaks.items())
    if plan.fits:
        lines = [f"{name}: fits, ~{_gb(-missing)} GB are left ({peaks})"]
    elif missing > 0:
        lines = [f"{name}: does not fit, ~{_gb(missing)} GB are missing ({peaks})"]
    else:
        lines = [f"{name}: does not fit, the engine has no room for one sequence of {plan.longest_tokens:,} tokens"]
    if not plan.fits:
        lines += _remedies(config, plan)
    if num_gpus > 1:
        share = _gb(plan.sharded_bytes(num_gpus))
        lines.append(
            f"  sharded evenly over {num_gpus} GPUs, which the code cannot do, training takes ~{share} GB on each"
        )
    return lines


def _remedies(config: RunConfig, plan: ModePlan) -> list[str]:
    best, least = cheapest_that_fits(config, plan.gpu_bytes)
    if best is not None:
        left, room = _gb(-best.plan.missing_bytes), best.plan.room.num_sequences
        lines = [
            f"  cheapest that fits: {' '.join(best.overrides)}",
            f"    leaves ~{left} GB, and the engine room for ~{room} of the longest sequences",
        ]
    else:
        still = _gb(max(0, least.plan.missing_bytes))
        lines = [f"  no change that was tried fits: ~{still} GB are missing even with {' '.join(least.overrides)}"]
    singles = [(change, _saved(change, plan)) for change in single_changes(config, plan.gpu_bytes)]
    for change, (phase, saved) in [single for single in singles if single[1][1] > 0][:NUM_SINGLE]:
        lines.append(f"  alone: {' '.join(change.overrides)} saves ~{_gb(saved)} GB ({phase})")
    return lines


def _saved(change: Change, plan: ModePlan) -> tuple[str, int]:
    """The phase in which a change saves most, and the bytes."""
    saved = {phase: num_bytes - change.plan.peaks[phase] for phase, num_bytes in plan.peaks.items()}
    return max(saved.items(), key=lambda item: item[1])


def _item(item: Item | None) -> str:
    return "-" if item is None else ("" if item.exact else "~") + _gb(item.num_bytes)


def _gb(num_bytes: int) -> str:
    """Three digits at least: a small model's numbers are MB."""
    gb = num_bytes / 1e9
    return f"{gb:.2f}" if abs(gb) >= 1 or num_bytes == 0 else f"{gb:.3g}" if abs(gb) >= 1e-3 else f"{gb:.6f}"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]}".rstrip() for row in rows]
