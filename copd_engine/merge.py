"""Merging branches into one model: ``theta* = theta_0 + sum_k w_k (theta_k - theta_0)`` with weights that sum to 1."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from copd_engine.types import UserError


def merge(
    base: Mapping[str, torch.Tensor],
    branches: Mapping[str, Mapping[str, torch.Tensor]],
    weights: Mapping[str, float] | None = None,
) -> dict[str, torch.Tensor]:
    """Merged parameters in the base's dtypes, computed in fp64 tensor by tensor.

    ``weights``: one per branch, any positive scale; default equal, the paper's mean. Raises UserError where names,
    shapes or weights do not fit.
    """
    if not branches:
        raise UserError("merge needs at least one branch")
    raw = dict.fromkeys(branches, 1.0) if weights is None else dict(weights)
    if set(raw) != set(branches):
        raise UserError(f"merge weights name {sorted(raw)}, the branches are {sorted(branches)}")
    total = sum(raw.values())
    if min(raw.values()) < 0 or not 0 < total < math.inf:
        raise UserError(f"merge weights must be finite, must not be negative and must not all be 0: {raw}")
    for branch, tensors in branches.items():
        _check_same_model(base, branch, tensors)
    merged = {}
    for name, start in base.items():
        moved = torch.zeros_like(start, dtype=torch.float64)
        for branch, tensors in branches.items():
            moved += raw[branch] / total * (tensors[name].double() - start.double())
        merged[name] = (start.double() + moved).to(start.dtype)
    return merged


def _check_same_model(base: Mapping[str, torch.Tensor], branch: str, tensors: Mapping[str, torch.Tensor]) -> None:
    different = set(base) ^ set(tensors)
    if different:
        raise UserError(f"branch {branch!r} is not the same model as the base: {sorted(different)[0]} is only in one")
    for name, start in base.items():
        if tensors[name].shape != start.shape:
            raise UserError(
                f"branch {branch!r}: {name} has shape {tuple(tensors[name].shape)}, the base has {tuple(start.shape)}"
            )
