"""An expert: where its prompts come from, and what its reward is made of."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from copd_engine.config.base import Float, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section
from copd_engine.types import suggest

#: What a row of a data file may hold.
COLUMNS = (
    "prompt",
    "messages",
    "images",
    "videos",
    "answer",
    "verifier",
    "uid",
    "fps",
    "metadata",
    "pass_rate",
)


class SourceConfig(Section):
    """Where prompts come from.

    ``source: testbed`` takes ``domain`` (text, image, video) and ``conflict``, the share of its prompts with a symbol
    that means something else in each domain; ``jsonl`` and ``parquet`` take ``path``;
    ``reasoning_gym`` takes ``task`` and its ``task_config``. ``verifier`` overrides the verifier that the rows name.

    ``columns`` maps our fields (prompt, messages, images, videos, answer, verifier, uid, fps, metadata, pass_rate) to
    the file's column names; dots go into nested columns (``answer: reward_model.ground_truth``).
    ``pass_rate`` keeps the rows whose pass rate lies in [low, high]. ``on_error: skip`` leaves out rows and media that
    cannot be read, counts them, and stops above 1 %.
    """

    source: Literal["testbed", "jsonl", "parquet", "reasoning_gym"] = "testbed"
    domain: str | None = None
    conflict: Annotated[Float, Field(ge=0, le=1)] = 0.0
    path: Path | None = None
    eval_path: Path | None = None
    task: str | None = None
    task_config: dict[str, Any] = Field(default_factory=dict)
    size: PositiveInt = 20_000
    eval_size: PositiveInt = 400
    seed: NonNegativeInt = 0
    verifier: str | None = None
    instruction: str = ""
    columns: dict[str, str] = Field(default_factory=dict)
    pass_rate: tuple[Float, Float] | None = None
    on_error: Literal["raise", "skip"] = "raise"

    @model_validator(mode="after")
    def _source_has_its_fields(self) -> SourceConfig:
        needed = {"testbed": "domain", "jsonl": "path", "parquet": "path", "reasoning_gym": "task"}.get(self.source)
        if needed is not None and getattr(self, needed) is None:
            raise ValueError(f"source '{self.source}' needs '{needed}'")
        if self.conflict and self.source != "testbed":
            raise ValueError(f"conflict = {self.conflict}: only the testbed's prompts have a conflict dial")
        for key in self.columns:
            if key not in COLUMNS:
                raise ValueError(f"columns: unknown field {key!r}{suggest(key, COLUMNS)}")
        if self.pass_rate is not None and not 0 <= self.pass_rate[0] <= self.pass_rate[1] <= 1:
            raise ValueError(f"pass_rate = {list(self.pass_rate)}: must be [low, high] with 0 <= low <= high <= 1")
        return self


class MixtureSource(SourceConfig):
    """One of several sources. ``weight``: its share of the prompts, relative to the other weights."""

    weight: PositiveFloat = 1.0


class DataConfig(SourceConfig):
    """One source, or ``source: mixture`` of several ``sources`` by weight; ``verifier``, ``instruction`` and
    ``on_error`` stand with each of them then."""

    source: Literal["testbed", "jsonl", "parquet", "reasoning_gym", "mixture"] = "testbed"  # type: ignore[assignment]
    sources: tuple[MixtureSource, ...] = ()

    @model_validator(mode="after")
    def _mixture_has_sources(self) -> DataConfig:
        if (self.source == "mixture") != bool(self.sources):
            raise ValueError("source 'mixture' needs 'sources', and only it takes them")
        return self


class RewardTerm(Section):
    """One term of the reward: ``weight`` times what it gives.

    ``kind: verifier`` gives the verifier of ``name``, by default the row's own; ``format`` gives 1 where the whole
    response matches the regular expression ``pattern`` (DOTALL), else 0; ``overlong`` gives 0 up to
    ``max_new_tokens - buffer_tokens``, then falls in a line to -1 at ``max_new_tokens`` (DAPO's soft punishment).
    """

    kind: Literal["verifier", "format", "overlong"] = "verifier"
    weight: PositiveFloat = 1.0
    name: str | None = None
    pattern: str | None = None
    buffer_tokens: PositiveInt | None = None

    @model_validator(mode="after")
    def _kind_has_its_fields(self) -> RewardTerm:
        needed = {"verifier": None, "format": "pattern", "overlong": "buffer_tokens"}[self.kind]
        for key, kind in (("name", "verifier"), ("pattern", "format"), ("buffer_tokens", "overlong")):
            if key == needed and getattr(self, key) is None:
                raise ValueError(f"kind '{self.kind}' needs '{key}'")
            if kind != self.kind and getattr(self, key) is not None:
                raise ValueError(f"kind '{self.kind}' takes no '{key}'")
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except re.error as error:
                raise ValueError(f"pattern {self.pattern!r} is no regular expression: {error}") from None
        return self


class BranchConfig(Section):
    """One expert. ``beta`` weighs its cross-branch advantage (OPD-ADV); ``reward`` is the sum of its terms."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]+$")]
    data: DataConfig
    beta: NonNegativeFloat = 1.0
    reward: Annotated[tuple[RewardTerm, ...], Field(min_length=1)] = (RewardTerm(),)
