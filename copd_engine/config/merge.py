"""How the branches become one model."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from copd_engine.config.base import Float, NonNegativeFloat, NonNegativeInt, PositiveFloat, Section

#: Methods that keep a part of the changes, and those whose whole change has a factor.
SPARSE = ("ties", "dare", "dare_ties")
SCALED = ("task_arithmetic", *SPARSE)


class MergeConfig(Section):
    """``mean`` is the paper's. ``weighted`` takes ``weights``: one per branch, normalised to sum 1.

    ``task_arithmetic``, ``ties``, ``dare`` and ``dare_ties`` multiply what they add to the base by ``scale`` (1). The
    last three keep the share ``density`` (0.2) of each branch's changes: TIES the largest of each tensor, DARE random
    ones, drawn from ``seed``. ``search`` tries a grid of them on validation prompts (docs/merge.md).
    """

    method: Literal["mean", "weighted", "task_arithmetic", "ties", "dare", "dare_ties", "search"] = "mean"
    weights: dict[str, NonNegativeFloat] | None = None
    density: Annotated[Float, Field(gt=0, le=1)] | None = None
    scale: PositiveFloat | None = None
    seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _method_takes_them(self) -> MergeConfig:
        for key, methods in (("density", SPARSE), ("scale", SCALED), ("seed", SPARSE[1:])):
            if getattr(self, key) not in (None, 0) and self.method not in methods:
                raise ValueError(f"method '{self.method}' takes no '{key}'; {', '.join(methods)} do")
        return self

    @property
    def kept(self) -> float:
        """The share of the changes that is kept."""
        return (0.2 if self.density is None else self.density) if self.method in SPARSE else 1.0

    @property
    def factor(self) -> float:
        """What the whole change is multiplied by."""
        return 1.0 if self.scale is None else self.scale

    def __str__(self) -> str:
        parts = [f"density {self.kept:g}"] if self.method in SPARSE else []
        parts += [f"scale {self.factor:.4g}"] if self.method in SCALED else []
        return " ".join([self.method, *parts])
