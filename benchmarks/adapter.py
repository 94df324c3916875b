"""What a peer of the kernel benchmark is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version

import torch

from benchmarks.problem import Problem, surrogate

# The outputs in the order of problem.OUTPUTS; None for one that the peer does not give.
Outputs = tuple[torch.Tensor | None, ...]
Call = Callable[[], Outputs]


@dataclass(frozen=True, kw_only=True)
class Peer:
    """``package`` is the distribution to install; ``compiles``: the first call at a shape compiles; ``checked``: the
    outputs mean something."""

    label: str
    package: str
    tasks: Mapping[str, Callable[[Problem], Call]]
    missing: Mapping[str, str] = field(default_factory=dict)
    compiles: bool = False
    checked: bool = True


def gradients(loss: torch.Tensor, problem: Problem) -> Outputs:
    return torch.autograd.grad(loss, (problem.hidden_TD, problem.weight_VD))


def grpo_of(problem: Problem, log_probs: Callable[[], torch.Tensor]) -> Call:
    """GRPO of a peer that gives differentiable log-probs; the surrogate on top is plain PyTorch on [T]."""
    return lambda: gradients(surrogate(log_probs(), problem), problem)


def package_version(peer: Peer) -> str | None:
    """Installed version of the peer's package, None where it is missing."""
    try:
        return version(peer.package)
    except PackageNotFoundError:
        return None
