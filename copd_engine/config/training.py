"""How the branches are trained: objective and optimizer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from copd_engine.config.base import Decay, Float, NonNegativeFloat, PositiveFloat, PositiveInt, Section


class ObjectiveConfig(Section):
    """(SURROGATE) with the paper's clip range, (GRPO-ADV) with ``std_mode``.

    ``updates_per_step`` splits a step's rollouts into that many optimizer updates by whole groups; from the second on
    the importance ratio differs from 1 and the clip acts. ``std_epsilon`` is added to the group's standard deviation.
    """

    clip_low: Annotated[Float, Field(gt=0, lt=1)] = 0.2
    clip_high: PositiveFloat = 0.28
    std_mode: Literal["population", "sample", "none"] = "population"
    std_epsilon: PositiveFloat = 1e-6
    updates_per_step: PositiveInt = 1
    mask_truncated: bool = False


class OptimConfig(Section):
    """AdamW, constant learning rate.

    ``max_tokens_per_micro_batch``: packed tokens per forward; a sample above it gets a forward of its own. A sample
    (prompt and response) above ``max_length`` has its response cut (``truncate_response``), is left out and counted
    (``drop``) or stops the run (``error``). Packed rows are padded to a multiple of ``pad_to_multiple_of`` tokens.
    """

    lr: PositiveFloat = 1e-6
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: PositiveFloat = 1.0
    max_tokens_per_micro_batch: PositiveInt = 32_768
    max_length: PositiveInt | None = None
    too_long: Literal["truncate_response", "drop", "error"] = "error"
    pad_to_multiple_of: PositiveInt = 1
