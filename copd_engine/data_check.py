"""``copd data check``: read every row as training would, decode its media, count its tokens, and say what fails."""

from __future__ import annotations

import math
import re
from array import array
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from copd_engine.config import COLUMNS, MediaConfig, RunConfig, SourceConfig
from copd_engine.data.examples import doubled_rows, open_rows, read_example
from copd_engine.data.rows import RowReader, pass_rate
from copd_engine.media import open_image, open_video
from copd_engine.models.base import PromptEncoder
from copd_engine.prompts import encode_prompt
from copd_engine.types import Example, UserError, suggest

BAR_WIDTH = 40


@dataclass
class Report:
    """What was found. ``failures``: one line for each row that fails, with file, line and reason; ``lengths``: of the
    other rows, in ``unit``."""

    file: Path
    unit: str
    num_rows: int = 0
    num_filtered: int = 0
    lengths: list[int] = field(default_factory=list)
    modalities: Counter[str] = field(default_factory=Counter)
    verifiers: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def text(self) -> str:
        """Counts, a histogram of lengths, and the rows that fail."""
        lines = [f"{self.file}: {self.num_rows} rows, {len(self.failures)} fail"]
        if self.num_filtered:
            lines.append(f"outside of pass_rate: {self.num_filtered}")
        for name, counts in (("modality", self.modalities), ("verifier", self.verifiers)):
            if counts:
                lines.append(f"{name}: " + ", ".join(f"{key} {count}" for key, count in counts.most_common()))
        if self.lengths:
            quantiles = np.quantile(self.lengths, [0, 0.5, 0.95, 1], method="lower").astype(int).tolist()
            names = ("min", "median", "95 %", "max")
            lines.append(
                f"{self.unit} of a prompt: " + ", ".join(f"{n} {q}" for n, q in zip(names, quantiles, strict=True))
            )
            lines += _histogram(self.lengths)
        return "\n".join([*lines, *self.failures])


def check_file(
    file: Path,
    config: SourceConfig,
    media: MediaConfig,
    encoder: PromptEncoder | None = None,
    max_tokens: int | None = None,
) -> Report:
    """Read every row of ``file`` by the columns, verifier, instruction and pass rate of ``config``.

    With ``encoder`` lengths are tokens, media as the model takes them included, and more than ``max_tokens`` fail;
    without, they are characters. UserError for a file that cannot be read at all.
    """
    rows = open_rows(config.source, file, "FILE", tuple(config.columns.values()))
    reader = RowReader(config.columns, config.verifier, config.instruction)
    report = Report(file, "characters" if encoder is None else "tokens", len(rows))
    failures: dict[int, str] = {}
    good, hashes = array("q"), array("q")
    for index in tqdm(range(len(rows)), desc="rows", unit="row", dynamic_ncols=True, delay=1.0, disable=None):
        at = rows.at(index)
        try:
            example = read_example(rows, reader, index)
            if config.pass_rate is not None:
                low, high = config.pass_rate
                report.num_filtered += not low <= pass_rate(reader.fields(rows.row(index), at), at) <= high
            if encoder is not None:
                length = encode_prompt(encoder, example, max_tokens or 2**62).num_tokens
            else:
                _decode_media(example, media)
                length = sum(len(turn["content"]) for turn in example.turns)
        except UserError as error:
            line = " ".join(str(error).split())
            failures[index] = line if line.startswith(f"{at}:") else f"{at}: {line}"
            continue
        good.append(index)
        hashes.append(hash(example.uid))
        report.lengths.append(length)
        report.modalities[_modality(example)] += 1
        report.verifiers[example.verifier] += 1
    failures |= doubled_rows(rows, reader, np.array(good, np.int64), np.array(hashes, np.int64))
    report.failures = [failures[index] for index in sorted(failures)]
    return report


def check(file: Path, model: str | None, columns: list[str], config: RunConfig | None) -> Report:
    """What the command does. ``columns``: ``ours=theirs``; ``config``: the run whose section for ``file``, limits of
    media and prompts, and model are taken. UserError for arguments that do not fit."""
    source = _section(config, file) if config else _plain(file, {})
    mapping = _mapping(columns)
    if mapping:
        source = source.model_copy(update={"columns": mapping})
    media = config.media if config else MediaConfig()
    path = model or (config.model.path if config else None)
    encoder = None
    if path is not None:
        from copd_engine.models.processor import load_encoder

        encoder = load_encoder(path, media)
    return check_file(file, source, media, encoder, config.rollout.max_prompt_tokens if config else None)


def _plain(file: Path, columns: dict[str, str]) -> SourceConfig:
    is_parquet = file.is_dir() or file.suffix.lower() in (".parquet", ".pq")
    return SourceConfig(source="parquet" if is_parquet else "jsonl", path=file, columns=columns)


def _section(config: RunConfig, file: Path) -> SourceConfig:
    """The source of ``config`` that reads ``file``."""
    named: list[str] = []
    for branch in config.branches:
        for source in branch.data.sources or (branch.data,):
            for path in (source.path, source.eval_path):
                if path is None:
                    continue
                named.append(str(path))
                if path.resolve() == file.resolve():
                    return source
    raise UserError(f"--config: no source of it reads {file}{suggest(str(file), named) if named else ''}")


def _mapping(columns: list[str]) -> dict[str, str]:
    mapping: dict[str, str] = {}
    for item in (part for text in columns for part in re.split(r"[,\s]+", text) if part):
        ours, equals, theirs = item.partition("=")
        if not equals or not theirs:
            raise UserError(f"--columns {item!r}: must look like ours=theirs, e.g. prompt=problem")
        if ours not in COLUMNS:
            raise UserError(f"--columns {item!r}: unknown field {ours!r}{suggest(ours, COLUMNS)}")
        mapping[ours] = theirs
    return mapping


def _decode_media(example: Example, media: MediaConfig) -> None:
    for image in example.images:
        open_image(image, f"{example.where}: images")
    for video in example.videos:
        # Every frame is decoded and one pixel of it kept: a long video would not fit otherwise.
        open_video(video, example.fps, media, f"{example.where}: videos", lambda frame, _: frame[:1, :1])


def _modality(example: Example) -> str:
    kinds = [name for name, media in (("image", example.images), ("video", example.videos)) if media]
    return "+".join(kinds) or "text"


def _histogram(lengths: list[int]) -> list[str]:
    """A line for each doubling of the length."""
    buckets = Counter(int(math.log2(length)) if length else 0 for length in lengths)
    most = max(buckets.values())
    low, high = min(buckets), max(buckets)
    width = len(str(2 ** (high + 1) - 1))
    return [
        f"  {2**b if b else 0:>{width}} - {2 ** (b + 1) - 1:>{width}}  {'#' * math.ceil(BAR_WIDTH * buckets[b] / most)}"
        f"{' ' if buckets[b] else ''}{buckets[b]}"
        for b in range(low, high + 1)
    ]
