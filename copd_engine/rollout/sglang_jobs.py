"""What is asked of sglang's host and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


class EngineDiedError(RuntimeError):
    """A process of sglang is gone; requests that were running are lost."""


@dataclass(frozen=True)
class Job:
    """One response to sample. ``images`` and ``videos``: pixel arrays and grids under transformers' names."""

    index: int
    input_ids: list[int]
    sampling: Mapping[str, Any]
    images: Mapping[str, np.ndarray] | None = None
    videos: Mapping[str, np.ndarray] | None = None
    lora: str | None = None


@dataclass(frozen=True)
class Answer:
    """What came of a job: token ids, their log-probs and weight versions, or why there is none (``failure``)."""

    index: int
    token_ids: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    finish_reason: str = ""
    version_spans: tuple[tuple[str, int, int], ...] = ()
    failure: str = ""
