"""Endless streams of examples: shuffled, seeded, and resumed at exactly the next one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from copd_engine.config import DataConfig
from copd_engine.data.examples import Mixture
from copd_engine.data.load import load_examples
from copd_engine.types import Example, UserError

OnError = Literal["raise", "skip"]


class Stream(ABC):
    """Examples without end. The state is a few integers."""

    @abstractmethod
    def draw(self, n: int) -> list[tuple[Example, OnError]]:
        """The next ``n`` examples, each with what its source says of one that cannot be encoded."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]: ...

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`. Raises UserError when the state cannot belong to this data."""

    def take(self, n: int) -> list[Example]:
        """The next ``n`` examples."""
        return [example for example, _ in self.draw(n)]


class DataStream(Stream):
    """Endless shuffled examples: every epoch is a fresh permutation drawn from (seed, epoch).

    The state is two integers, so that a resumed stream continues with exactly the next example.
    """

    def __init__(self, examples: Sequence[Example], seed: int, on_error: OnError = "raise") -> None:
        if not len(examples):
            raise UserError("a data stream needs at least one example")
        self.examples = examples
        self.seed = seed
        self.on_error: OnError = on_error
        self._go_to(epoch=0, cursor=0)

    def take(self, n: int) -> list[Example]:
        """The next ``n`` examples; one example may come twice where the epoch ends within them."""
        if n < 0:
            raise ValueError(f"n = {n}: must be at least 0")
        taken: list[Example] = []
        while len(taken) < n:
            if self.cursor == len(self.examples):
                self._go_to(self.epoch + 1, cursor=0)
            indices = self._order[self.cursor : self.cursor + n - len(taken)]
            taken += [self.examples[int(index)] for index in indices]
            self.cursor += len(indices)
        return taken

    def draw(self, n: int) -> list[tuple[Example, OnError]]:
        return [(example, self.on_error) for example in self.take(n)]

    def state_dict(self) -> dict[str, int]:
        """``epoch`` and ``cursor``, the number of examples handed out in this epoch."""
        return {"epoch": self.epoch, "cursor": self.cursor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "epoch" not in state or "cursor" not in state:
            raise UserError("data stream state has no epoch and cursor: the data was a mixture when it was saved")
        epoch, cursor = int(state["epoch"]), int(state["cursor"])
        if epoch < 0 or not 0 <= cursor <= len(self.examples):
            raise UserError(
                f"data stream state (epoch {epoch}, cursor {cursor}) does not fit {len(self.examples)} examples: "
                "the data set has changed since the checkpoint"
            )
        self._go_to(epoch, cursor)

    def _go_to(self, epoch: int, cursor: int) -> None:
        self.epoch, self.cursor = epoch, cursor
        self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self.examples))


class MixtureStream(Stream):
    """Several streams, each with epochs of its own; the source of prompt i is drawn by ``weights`` from (seed, i)."""

    def __init__(self, streams: Sequence[DataStream], weights: Sequence[float], seed: int) -> None:
        self.streams, self.seed, self.counter = tuple(streams), seed, 0
        self._upper = np.cumsum(weights) / np.sum(weights)

    def draw(self, n: int) -> list[tuple[Example, OnError]]:
        if n < 0:
            raise ValueError(f"n = {n}: must be at least 0")
        return [self._next() for _ in range(n)]

    def _next(self) -> tuple[Example, OnError]:
        at = np.random.default_rng([self.seed, self.counter]).random()
        self.counter += 1
        source = min(int(np.searchsorted(self._upper, at, side="right")), len(self.streams) - 1)
        return self.streams[source].draw(1)[0]

    def state_dict(self) -> dict[str, Any]:
        """``counter``, the number of examples handed out, and the state of each source."""
        return {"counter": self.counter, "sources": [stream.state_dict() for stream in self.streams]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        sources = state.get("sources")
        if sources is None or len(sources) != len(self.streams):
            raise UserError(
                f"data stream state of {1 if sources is None else len(sources)} source(s) does not fit a mixture of "
                f"{len(self.streams)}: the data has changed since the checkpoint"
            )
        for stream, saved in zip(self.streams, sources, strict=True):
            stream.load_state_dict(saved)
        self.counter = int(state["counter"])


def make_stream(config: DataConfig, examples: Sequence[Example], seed: int) -> Stream:
    """A stream over ``examples``, which :func:`load_examples` gave for ``config``: loaded once, streamed by many."""
    if not isinstance(examples, Mixture):
        return DataStream(examples, seed, config.on_error)
    streams = [
        DataStream(part, int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0]), source.on_error)
        for number, (part, source) in enumerate(zip(examples.parts, config.sources, strict=True))
    ]
    return MixtureStream(streams, [source.weight for source in config.sources], seed)


def load_stream(config: DataConfig, seed: int, where: str = "branches.0.data") -> Stream:
    """The stream of the train split: ``take(n)``, ``state_dict()``, ``load_state_dict()``."""
    return make_stream(config, load_examples(config, "train", where), seed)
