"""A benchmark's files to examples, read from disk when they are asked for."""

from __future__ import annotations

import csv
import glob
import io
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from copd_engine.data.benchmarks.questions import Media, Row
from copd_engine.data.benchmarks.specs import BENCHMARKS, Benchmark
from copd_engine.data.files import JsonlRows, ParquetRows, Rows
from copd_engine.media import check_image, check_video
from copd_engine.types import Example, UserError, suggest
from copd_engine.verifiers import check_example
from copd_engine.verifiers.extract import last_boxed

SUFFIXES = (".parquet", ".jsonl", ".json", ".tsv")
#: ``-00000-of-00002`` of a file's stem, with the hash that older files have, or a stem that is a number.
_SHARD = re.compile(r"(?:^|[-_.])\d+-of-\d+(?:-[0-9a-f]+)?$|^\d+$")
_SPLITS = frozenset({"train", "dev", "val", "validation", "test", "testmini"})


class BenchmarkExamples(Sequence[Example]):
    """The examples of a benchmark; nothing is decoded, and of Parquet files only the row groups used last are kept.

    Each has in its metadata ``group`` and ``together`` where the benchmark has such columns.
    """

    def __init__(self, benchmark: Benchmark, rows: Sequence[Rows], indices: Sequence[tuple[int, int]]) -> None:
        self.benchmark, self._rows, self._indices = benchmark, rows, indices

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> BenchmarkExamples: ...
    def __getitem__(self, index: int | slice) -> Example | BenchmarkExamples:
        if isinstance(index, slice):
            return BenchmarkExamples(self.benchmark, self._rows, self._indices[index])
        file, row = self._indices[index]
        example = _example(self.benchmark, self._rows[file], row)
        assert example is not None  # rows that are none were left out at load
        return example

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))


def read_benchmark(name: str, path: str | Path, group: str | None = None) -> BenchmarkExamples:
    """Every row of benchmark ``name``, each checked: columns, gold, options, that its media exist.

    ``path``: a file (Parquet, JSON, JSONL, TSV), a folder of such files, or a pattern such as ``MMMU/*/val*.parquet``.
    Several files are the shards of one split, and where the benchmark has them its tasks or subjects. ``group`` keeps
    the rows of that group alone (``vision_only`` of MathVerse). UserError with file and row, and for several splits.
    """
    if name not in BENCHMARKS:
        raise UserError(f"unknown benchmark {name!r}{suggest(name, BENCHMARKS)}")
    benchmark = BENCHMARKS[name]
    rows = [_open(file, name) for file in _one_split(_files(Path(path), name), benchmark, name)]
    for part in rows:
        _check_columns(benchmark, part, name)
    indices: list[tuple[int, int]] = []
    groups: set[str] = set()
    seen: dict[str, str] = {}
    for number, part in enumerate(rows):
        for index in range(len(part)):
            example = _example(benchmark, part, index)
            if example is None:
                continue
            own = _plain(str(example.metadata.get("group", "")))
            groups.add(own)
            if group is not None and own != _plain(group):
                continue
            _check(example)
            if example.uid in seen:
                raise UserError(f"{example.where}: {example.uid!r} is already the name of {seen[example.uid]}")
            seen[example.uid] = example.where
            indices.append((number, index))
    if group is not None and not indices:
        raise UserError(f"{name}:{group}: no row of {path} is in it{suggest(_plain(group), groups)}")
    if not indices:
        raise UserError(f"{name}: {path} has no rows")
    return BenchmarkExamples(benchmark, rows, indices)


def _plain(group: str) -> str:
    return group.strip().lower().replace(" ", "_").replace("-", "_")


# Files


class ListRows(Rows):
    """Rows of a file that is read as a whole."""

    def __init__(self, path: Path, rows: list[Any]) -> None:
        self.path, self.rows = path, rows

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> Any:
        return self.rows[index]

    def file(self, index: int) -> Path:
        return self.path

    def number(self, index: int) -> int:
        return index + 1


def _files(path: Path, name: str) -> list[Path]:
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    elif path.exists():
        found = [path]
    else:
        found = sorted(map(Path, glob.glob(str(path))))
    if not found:
        raise UserError(f"{name}: {path} " + ("holds no data files" if path.is_dir() else "does not exist"))
    return found


def _one_split(files: list[Path], benchmark: Benchmark, name: str) -> list[Path]:
    """``files``, of the benchmark's split alone where it has one. UserError where they are of several splits."""
    if benchmark.split is not None:
        own = [file for file in files if benchmark.split in file.stem]
        if not own:
            wanted = f"the split that {benchmark.title} reads: give its files *{benchmark.split}*"
            raise UserError(f"{name}: {files[0]} is not of {wanted}")
        files = own
    splits = {_split(file, benchmark.several_files): file for file in reversed(files)}
    if len(splits) > 1:
        a, b, *_ = sorted(splits.values())
        raise UserError(
            f"{name}: {a} and {b} look like several splits: give one of them, or each with a --data {name}= of its own"
        )
    return files


def _split(file: Path, several_files: bool) -> str:
    """What files of one split have in common: the stem without the shard's number; where files are tasks or subjects,
    the name of a split in it."""
    stem = _SHARD.sub("", file.stem)
    if not several_files:
        return stem
    return " ".join(word for word in re.split(r"[^a-z]+", stem.lower()) if word in _SPLITS)


def _open(path: Path, name: str) -> Rows:
    if path.suffix == ".parquet":
        return ParquetRows(path, name)
    if path.suffix == ".jsonl":
        return JsonlRows(path, name)
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".tsv":
            csv.field_size_limit(sys.maxsize)
            rows: Any = list(csv.DictReader(io.StringIO(text, newline=""), delimiter="\t"))
        elif path.suffix == ".json":
            rows = json.loads(text)
        else:
            raise UserError(f"{name}: {path}: the name must end in {', '.join(SUFFIXES)}")
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise UserError(f"{name}: {path} cannot be read: {error}") from None
    if isinstance(rows, Mapping):  # MathVista's JSON: number to row
        rows = list(rows.values())
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{name}: {path} must be a list of rows, with at least one")
    return ListRows(path, rows)


def _check_columns(benchmark: Benchmark, rows: Rows, name: str) -> None:
    first = rows.row(0)
    found = list(first) if isinstance(first, Mapping) else []
    missing = [c for c, others in benchmark.columns.items() if not {c, *others} & set(found)]
    if benchmark.boxed_in in found:
        missing = [column for column in missing if column != "answer"]
    if missing:
        expected = ", ".join(" or ".join((c, *others)) for c, others in benchmark.columns.items())
        raise UserError(
            f"{rows.file(0)}: no column {missing[0]!r}: {name} expects {expected}; found {', '.join(found) or 'none'}"
        )


# Rows


def _example(benchmark: Benchmark, rows: Rows, index: int) -> Example | None:
    at, row = rows.at(index), _renamed(benchmark, rows.row(index), rows.at(index))
    media = Media(rows.file(index), benchmark.media)
    try:
        question = benchmark.read(row, media)
    except UserError as error:
        raise UserError(f"{at}: {error}") from None
    except (KeyError, ValueError, TypeError, AttributeError) as error:  # a row that is not as its columns promise
        raise UserError(f"{at}: not a row of {benchmark.title}: {type(error).__name__}: {error}") from None
    if question is None:
        return None
    parts = [str(row[column]) for column in benchmark.uid if row.get(column) is not None]
    if question.kind:
        parts.insert(0, question.kind)
    metadata = dict(question.metadata)
    group = question.group or (row.get(benchmark.group) if benchmark.group else None)
    if group is not None:
        metadata["group"] = str(group)
    if benchmark.together:
        metadata["together"] = str(row[benchmark.together])
    return Example(
        uid="/".join(parts) or rows.default_uid(index),
        prompt=question.prompt,
        answer=question.answer,
        verifier=question.verifier,
        images=question.images,
        videos=question.videos,
        fps=question.fps,
        metadata=metadata,
        where=at,
    )


def _renamed(benchmark: Benchmark, row: Any, at: str) -> Row:
    if not isinstance(row, Mapping):
        raise UserError(f"{at}: a row must be a mapping, it is {type(row).__name__}")
    renamed = dict(row)
    for column, others in {**benchmark.columns, **benchmark.optional}.items():
        for other in others:
            if column not in renamed and other in renamed:
                renamed[column] = row[other]
    if benchmark.boxed_in in renamed and "answer" not in renamed:
        renamed["answer"] = last_boxed(str(renamed[benchmark.boxed_in]))
        if renamed["answer"] is None:
            raise UserError(f"{at}: there is no 'answer', and {benchmark.boxed_in!r} has no \\boxed{{}}")
    return renamed


def _check(example: Example) -> None:
    for image in example.images:
        check_image(image, f"{example.where}: images")
    for video in example.videos:
        check_video(video, f"{example.where}: videos")
    check_example(example)
