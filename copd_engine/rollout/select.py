"""Which rollout engine runs, and building it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch

from copd_engine.config import ModelConfig, RolloutConfig
from copd_engine.models.base import Policy, PromptEncoder
from copd_engine.models.folder import find_folder
from copd_engine.rollout.base import RolloutEngine
from copd_engine.rollout.embedded import EmbeddedEngine
from copd_engine.types import UserError

logger = logging.getLogger(__name__)

#: The package of ``tools/sglang_cpu``.
STAND_INS = "copd-sglang-cpu"


def resolve_engine(engine: str, device: str) -> Literal["embedded", "sglang"]:
    """``auto`` settled for this machine: sglang where it is installed and ``device`` is a CUDA GPU, else embedded.

    UserError for sglang where it is not installed, or on a GPU with kernels that are made for a CPU's tests.
    """
    installed = importlib.util.find_spec("sglang") is not None
    on_gpu = torch.device(device).type == "cuda" and torch.version.cuda is not None
    if engine == "sglang":
        if not installed:
            raise UserError("rollout.engine = 'sglang': the package is missing; install the extra 'sglang'")
        if on_gpu and _has_stand_ins():
            raise UserError(
                f"rollout.engine = 'sglang' on {device}: sgl_kernel in this environment is the stand-in of "
                "tools/sglang_cpu, for machines without a GPU: install the extra 'sglang' into an environment of its "
                "own, or set rollout.engine=embedded"
            )
        return "sglang"
    return "sglang" if engine == "auto" and installed and on_gpu and not _has_stand_ins() else "embedded"


def _has_stand_ins() -> bool:
    try:
        importlib.metadata.distribution(STAND_INS)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def create_engine(
    rollout: RolloutConfig,
    model: ModelConfig,
    policies: Mapping[str, Policy],
    encoder: PromptEncoder,
    scratch: Path,
) -> RolloutEngine:
    """The engine that ``rollout.engine`` names, with every policy synced as version 0.

    ``scratch``: a folder for the base model in Hugging Face format where ``model.path`` is in another.
    """
    device = str(next(iter(policies.values())).device)
    kind = resolve_engine(rollout.engine, device)
    logger.info("rollout engine: %s", kind)
    if kind == "embedded":
        engine: RolloutEngine = EmbeddedEngine(policies, encoder, rollout.max_running, rollout.max_cached_tokens)
    else:
        from copd_engine.rollout.sglang_engine import SglangEngine

        first = next(iter(policies.values()))
        engine = SglangEngine(
            _hugging_face_folder(model, first, encoder, scratch),
            encoder,
            rollout,
            model.dtype,
            device,
            lora=model.lora,
            num_experts=len(policies),
            partly_frozen=any(not p.requires_grad for p in first.module.parameters()),
        )
    for name, policy in policies.items():
        engine.sync(name, policy.named_parameters(), 0)
    return engine


def _hugging_face_folder(model: ModelConfig, policy: Policy, encoder: PromptEncoder, scratch: Path) -> Path:
    """``model.path`` itself where it holds safetensors; else the model is written to ``scratch`` once."""
    if model.path != "smollm2":
        folder = find_folder(model.path)
        if any(folder.glob("*.safetensors")):
            return folder
    if not (scratch / "config.json").exists():
        policy.save(scratch)
        encoder.save(scratch)
    return scratch
