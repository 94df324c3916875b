"""Every ``auto`` of a config settled for this machine."""

from __future__ import annotations

import os

import torch

from copd_engine.config import RunConfig
from copd_engine.models.flash import resolve_attention
from copd_engine.models.liger import resolve_liger
from copd_engine.rollout.select import resolve_engine
from copd_engine.types import UserError


def resolve(config: RunConfig) -> RunConfig:
    """The config with every ``auto`` settled for this machine, as it is saved with the run.

    UserError for a device that this machine does not have, or that cannot do what is asked of it.
    """
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device = {device!r}: {str(error).splitlines()[0]}") from None
    if config.optim.offload and torch.device(device).type != "cuda":
        raise UserError(f"optim.offload = true: needs a GPU to take the memory from; the device is {device!r}")
    attention = resolve_attention(config.model.attention, torch.device(device), getattr(torch, config.model.dtype))
    liger = resolve_liger(config.model.liger, torch.device(device))
    model = config.model.model_copy(update={"attention": attention, "liger": liger})
    rollout = config.rollout.model_copy(update={"engine": resolve_engine(config.rollout.engine, device)})
    threads = config.num_threads or len(os.sched_getaffinity(0))
    return config.model_copy(update={"device": device, "model": model, "rollout": rollout, "num_threads": threads})
