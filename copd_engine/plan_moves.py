"""What a step of a memory plan moves: weights or adapters into the rollout engine, and over the host."""

from __future__ import annotations

from dataclasses import dataclass

from copd_engine.config import RunConfig
from copd_engine.models.meta import ModelSizes


@dataclass(frozen=True)
class Moves:
    """Bytes that a step moves. ``num_swaps``: by phase. ``offload_``: what ``optim.offload`` moves over the host, and
    leaves free on the GPU while an expert is updated."""

    swap_bytes: int
    num_swaps: dict[str, int]
    step_bytes: dict[str, int]
    host_bytes: int
    host_note: str
    offload_host_bytes: int
    offload_saved_bytes: int


def state_bytes(sizes: ModelSizes) -> int:
    """An expert's fp32 masters and what torch.optim.AdamW keeps: two fp32 moments per parameter, a step per tensor."""
    return sizes.master_bytes + 8 * sizes.trained_parameters + 4 * sizes.trained_tensors


def step_moves(config: RunConfig, sizes: ModelSizes, num_experts: int, engine: str, host: int) -> Moves:
    """Every student samples all its batches, native and cross, in one call: one swap each."""
    phases = [name for name, steps in (("rl", config.schedule.rl_steps), ("opd", config.schedule.opd_steps)) if steps]
    swaps = dict.fromkeys(phases if config.method == "copd" else ["rl"], num_experts)
    if config.method in ("static_opd", "mopd"):
        swaps = {"rl": num_experts - 1, "opd": 1}  # the experts, then the student
    if engine != "sglang":
        swaps = dict.fromkeys(swaps, 0)
    adapters = num_experts * sizes.trained_bytes if engine == "sglang" and config.model.lora is not None else 0
    return Moves(
        swap_bytes=sizes.trained_bytes if engine == "sglang" else 0,
        num_swaps=swaps,
        step_bytes={phase: count * sizes.trained_bytes for phase, count in swaps.items()},
        # The memory saver copies the weights out at sleep and in at wake; adapters are copied to the CPU and up again.
        host_bytes=2 * host + 2 * adapters,
        host_note="weights that are never synced, out and in; adapters" if host or adapters else "",
        offload_host_bytes=2 * num_experts * state_bytes(sizes),
        offload_saved_bytes=(num_experts - 1) * state_bytes(sizes),
    )
