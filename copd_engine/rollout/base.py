"""What the trainer asks of a rollout engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass

import torch

from copd_engine.types import Rollout, RolloutRequest


@dataclass(frozen=True)
class Sampling:
    """``temperature`` 0 takes the most likely token (log-probs are then those at temperature 1)."""

    temperature: float
    max_new_tokens: int


class RolloutEngine(ABC):
    """Samples responses for several experts, each at a known weight version.

    An engine must implement :meth:`sync`, :meth:`generate` and :meth:`close`. By default :meth:`generate_groups` and
    :meth:`generate_mixed` wait for :meth:`generate`, one expert after the other, and :meth:`sleep` gives nothing back:
    both engines here have their own.
    """

    @abstractmethod
    def sync(self, expert: str, named_tensors: Mapping[str, torch.Tensor], version: int) -> None:
        """Make ``named_tensors`` (Hugging Face names) the weights of ``expert``, known as ``version`` from now on.

        The engine keeps the mapping itself and may read the tensors at any time until the next sync of ``expert``.
        """

    @abstractmethod
    def generate(self, expert: str, requests: Sequence[RolloutRequest], sampling: Sampling) -> list[Rollout]:
        """One rollout per request, in the order of the requests.

        What a request draws depends on its seed and on the expert's weights, not on the other requests. An engine that
        can lose requests leaves out those that failed twice, and what remains of a group of which one member is left;
        :meth:`stats` counts them.
        """

    def generate_groups(
        self, expert: str, requests: Sequence[RolloutRequest], sampling: Sampling
    ) -> Generator[list[Rollout], None, None]:
        """Whole groups (requests of equal ``group``) as they finish, in any order, so that rewards can be computed
        while the rest is sampled. Groups of which nothing remained are left out."""
        for _, group in self.generate_mixed({expert: requests}, sampling):
            yield group

    def generate_mixed(
        self, requests: Mapping[str, Sequence[RolloutRequest]], sampling: Sampling
    ) -> Generator[tuple[str, list[Rollout]], None, None]:
        """Groups of several experts as they finish, each with its expert. A caller that stops early closes it.

        Only an engine that holds all experts' weights at once samples them in one running batch.
        """
        for expert, asked in requests.items():
            groups: dict[int, list[Rollout]] = {}
            for rollout in self.generate(expert, asked, sampling):
                groups.setdefault(rollout.request.group, []).append(rollout)
            for group in groups.values():
                yield expert, group

    def sleep(self) -> None:
        """Give back the GPU memory of weights and KV cache while the trainer works; no requests may be running."""
        return

    def wake(self) -> None:
        """Take the memory again. Sampling wakes a sleeping engine by itself."""
        return

    def stats(self) -> dict[str, float]:
        """Counts, bytes and seconds since the last call, which starts them anew at 0."""
        return {}

    @abstractmethod
    def close(self) -> None:
        """Free what the engine holds."""
