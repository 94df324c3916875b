"""Merging branches into one model. All methods add to the base theta_0 a combination of the changes
tau_k = theta_k - theta_0; computed in fp64, block by block, whatever holds the tensors.

=================  ====================================================================================================
mean               the mean of tau_k, the CoPD paper's
weighted           sum w_k tau_k, with weights that sum to 1
task_arithmetic    scale * sum tau_k (Ilharco et al., arXiv 2212.04089)
ties               of each tau_k only the largest ``density`` stays; per entry the sign of the sum is elected; scale *
                   mean of the changes of that sign (Yadav et al., arXiv 2306.01708)
dare               of each tau_k random entries stay with probability ``density`` and are divided by it; scale * mean
                   (Yu et al., arXiv 2311.03099; ``scale`` = K gives the sum, which peft and mergekit call dare_linear)
dare_ties          DARE's random entries, then TIES' election and mean
=================  ====================================================================================================

TIES trims tensor by tensor, as peft and mergekit do: a tensor's result needs no pass over all others, and layers with
small weights keep their share. The paper ranks all entries of a model at once. Entries as large as the last that stays
stay too, so nothing depends on how a sort breaks ties. Where the changes cancel to exactly 0 no sign is elected and the
base stays (sgn 0 = 0 as in the paper's formula; peft takes plus).
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Protocol

import numpy as np
import torch

from copd_engine.config import MergeConfig
from copd_engine.types import UserError

#: Entries that are computed at a time: half a MiB in fp64 for each branch.
BLOCK = 2**16
#: Entries ``begin`` to ``end`` of a flattened tensor.
Read = Callable[[int, int], torch.Tensor]


class Spec(Protocol):
    """What is known of a tensor before it is read: a tensor itself, or a :class:`StoredTensor`."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...


def merge(
    base: Mapping[str, torch.Tensor],
    branches: Mapping[str, Mapping[str, torch.Tensor]],
    recipe: MergeConfig = MergeConfig(),  # noqa: B008  # frozen
) -> dict[str, torch.Tensor]:
    """Merged parameters in the base's dtypes, on its devices. ``recipe``: every method but ``search``.

    The order of the branches does not matter. Tensors of integers must be equal in all and are the base's. Raises
    UserError where names, shapes or weights do not fit, and for weights that are NaN or infinite.
    """
    check_branches(recipe, branches)
    for branch, tensors in branches.items():
        check_same_model(base, branch, tensors)
    merged = {}
    for name, start in base.items():
        readers = {branch: _reader(tensors[name], start.device) for branch, tensors in branches.items()}
        merged[name] = torch.empty(start.shape, dtype=start.dtype, device=start.device)
        flat, position = merged[name].view(-1), 0
        for block in merged_blocks(name, start.numel(), _reader(start, start.device), readers, recipe):
            flat[position : position + len(block)] = block
            position += len(block)
    return merged


def _reader(tensor: torch.Tensor, device: torch.device) -> Read:
    flat = tensor.reshape(-1)
    return lambda begin, end: flat[begin:end].to(device)


def check_branches(recipe: MergeConfig, branches: Collection[str]) -> None:
    """UserError unless there are branches and the recipe has a fitting weight for each, if any."""
    if not branches:
        raise UserError("merge needs at least one branch")
    if (recipe.method == "weighted") != (recipe.weights is not None):
        raise UserError("merge weights go with method 'weighted', and it needs them")
    if recipe.weights is not None:
        check_weights(recipe.weights, branches)


def check_weights(weights: Mapping[str, float], branches: Collection[str]) -> None:
    """UserError unless there is a weight for each branch, none negative and not all 0."""
    if set(weights) != set(branches):
        raise UserError(f"merge weights name {sorted(weights)}, the branches are {sorted(branches)}")
    total = sum(weights.values())
    if min(weights.values()) < 0 or not 0 < total < math.inf:
        raise UserError(f"merge weights must be finite, must not be negative and must not all be 0: {dict(weights)}")


def check_same_model(base: Mapping[str, Spec], branch: str, tensors: Mapping[str, Spec]) -> None:
    """UserError for names, shapes or kinds of numbers that differ."""
    different = set(base) ^ set(tensors)
    if different:
        raise UserError(f"branch {branch!r} is not the same model as the base: {sorted(different)[0]} is only in one")
    for name, start in base.items():
        other = tensors[name]
        if tuple(other.shape) != tuple(start.shape):
            raise UserError(
                f"branch {branch!r}: {name} has shape {tuple(other.shape)}, the base has {tuple(start.shape)}"
            )
        if other.dtype != start.dtype and not (other.dtype.is_floating_point and start.dtype.is_floating_point):
            raise UserError(f"branch {branch!r}: {name} is {other.dtype}, in the base it is {start.dtype}")


def merged_blocks(
    name: str, numel: int, start: Read, branches: Mapping[str, Read], recipe: MergeConfig
) -> Iterator[torch.Tensor]:
    """The merged entries of the tensor ``name``, in order, ``BLOCK`` at a time: fp64, or integers as they are.

    Reads blocks only, some of them several times. UserError as in :func:`merge`.
    """
    if not numel:
        return
    if not start(0, 1).is_floating_point():
        yield from _equal_blocks(name, numel, start, branches)
        return
    order = sorted(branches)  # sums are then the same in every order
    density = recipe.kept
    changes = {branch: _changes(name, branch, start, branches[branch]) for branch in order}
    smallest: dict[str, float] = {}
    if recipe.method == "ties" and density < 1:
        count = max(1, round(density * numel))
        smallest = {branch: kth_largest_magnitude(changes[branch], numel, count) for branch in order}
    draws = {}
    if recipe.method in ("dare", "dare_ties"):
        draws = {branch: _generator(recipe.seed, name, branch) for branch in order}
    for begin, end in _spans(numel):
        taus = []
        for branch in order:
            tau = changes[branch](begin, end)
            if branch in smallest:
                tau = torch.where(tau.abs() >= smallest[branch], tau, 0.0)
            if branch in draws:
                kept = torch.from_numpy(draws[branch].random(end - begin, np.float32) < density).to(tau.device)
                tau = torch.where(kept, tau / density, 0.0)
            taus.append(tau)
        yield start(begin, end).double() + _combined(dict(zip(order, taus, strict=True)), recipe)


def _combined(taus: Mapping[str, torch.Tensor], recipe: MergeConfig) -> torch.Tensor:
    """What is added to the base."""
    if recipe.method in ("ties", "dare_ties"):
        return recipe.factor * _elected_mean(list(taus.values()))
    shares = dict.fromkeys(taus, 1.0) if recipe.weights is None else recipe.weights
    total = 1.0 if recipe.method == "task_arithmetic" else sum(shares.values())
    added = torch.zeros_like(next(iter(taus.values())))
    for branch, tau in taus.items():
        added += recipe.factor * shares[branch] / total * tau
    return added


def _elected_mean(taus: list[torch.Tensor]) -> torch.Tensor:
    """Per entry the mean of the changes whose sign is that of the sum; those that were dropped do not count."""
    sign = sum(taus[1:], start=taus[0]).sign()
    added, count = torch.zeros_like(sign), torch.zeros_like(sign)
    for tau in taus:
        along = tau * sign
        added += along.clamp(min=0)
        count += along > 0
    return sign * added / count.clamp(min=1)


def kth_largest_magnitude(read: Read, numel: int, count: int) -> float:
    """The ``count``-th largest absolute value of fp64 entries, exactly, from blocks: four passes of 16 bits.

    Doubles that are not negative sort as their bit patterns do.
    """
    prefix, rank = 0, count
    for shift in (48, 32, 16, 0):
        histogram: torch.Tensor | None = None
        for begin, end in _spans(numel):
            bits = read(begin, end).abs().view(torch.int64)
            if shift < 48:
                bits = bits[bits >> (shift + 16) == prefix]
            counts = torch.bincount(bits >> shift & 0xFFFF, minlength=2**16)
            histogram = counts if histogram is None else histogram + counts
        assert histogram is not None
        at_least = histogram.flip(0).cumsum(0)  # entry i: how many have a digit of 65535 - i or above
        place = int((at_least < rank).sum())
        rank -= int(at_least[place - 1]) if place else 0
        prefix = prefix << 16 | 0xFFFF - place
    value: float = struct.unpack("<d", struct.pack("<q", prefix))[0]
    return value


def _changes(name: str, branch: str, start: Read, end_point: Read) -> Read:
    def read(begin: int, end: int) -> torch.Tensor:
        before = start(begin, end).double()
        tau = end_point(begin, end).to(before) - before
        if not tau.isfinite().all():
            raise UserError(f"branch {branch!r} or the base: {name} has weights that are NaN or infinite")
        return tau

    return read


def _equal_blocks(name: str, numel: int, start: Read, branches: Mapping[str, Read]) -> Iterator[torch.Tensor]:
    for begin, end in _spans(numel):
        block = start(begin, end)
        for branch, read in branches.items():
            if not torch.equal(block, read(begin, end).to(block.device)):
                raise UserError(f"branch {branch!r}: {name} holds integers that are not the base's")
        yield block


def _spans(numel: int) -> Iterator[tuple[int, int]]:
    return ((begin, min(begin + BLOCK, numel)) for begin in range(0, numel, BLOCK))


def _generator(seed: int, name: str, branch: str) -> np.random.Generator:
    """Draws that depend neither on the order of tensors nor on the other branches."""
    return np.random.default_rng(list(hashlib.sha256(repr((seed, name, branch)).encode()).digest()))
