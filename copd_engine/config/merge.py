"""How the branches become one model."""

from __future__ import annotations

from typing import Literal

from copd_engine.config.base import NonNegativeFloat, Section


class MergeConfig(Section):
    """``mean`` is the paper's. ``weighted`` takes ``weights``: one per branch, normalised to sum 1."""

    method: Literal["mean", "weighted"] = "mean"
    weights: dict[str, NonNegativeFloat] | None = None
