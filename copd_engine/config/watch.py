"""What is measured and kept on the way."""

from __future__ import annotations

from copd_engine.config.base import NonNegativeInt, PositiveInt, Section


class EvalConfig(Section):
    """``every`` steps, 0: only at the start and the end. ``num_prompts`` held-out prompts per domain while training,
    ``final_num_prompts`` for the closing table; one sample each at the rollout temperature."""

    every: NonNegativeInt = 0
    num_prompts: PositiveInt = 100
    final_num_prompts: PositiveInt = 400


class DiagnosticsConfig(Section):
    """(OVERLAP) with k = ``top_k`` (on a GPU at most 32) and KL between all branches on ``num_prompts`` fixed probe
    prompts per domain.

    ``update_angle``: also the cosine of what two branches learned since the last diagnostics, for which the parameters
    of each are remembered until the next.
    """

    every: NonNegativeInt = 1
    num_prompts: PositiveInt = 8
    top_k: PositiveInt = 10
    update_angle: bool = False


class CheckpointConfig(Section):
    """``every`` steps (0: only at the end); ``keep`` the newest so many."""

    every: NonNegativeInt = 20
    keep: PositiveInt = 2
