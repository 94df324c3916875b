"""What the trainer asks of a rollout engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from copd_engine.types import Rollout, RolloutRequest


@dataclass(frozen=True)
class Sampling:
    """``temperature`` 0 takes the most likely token (log-probs are then those at temperature 1)."""

    temperature: float
    max_new_tokens: int


class RolloutEngine(Protocol):
    """Samples responses for several experts, each at a known weight version."""

    def sync(self, expert: str, named_tensors: Mapping[str, torch.Tensor], version: int) -> None:
        """Make ``named_tensors`` (Hugging Face names) the weights of ``expert``, known as ``version`` from now on."""

    def generate(self, expert: str, requests: Sequence[RolloutRequest], sampling: Sampling) -> list[Rollout]:
        """One rollout per request, in the order of the requests.

        What a request draws depends on its seed and on the expert's weights, not on the other requests.
        """

    def close(self) -> None:
        """Free what the engine holds."""
