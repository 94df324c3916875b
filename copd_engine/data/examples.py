"""All examples of a split, parsed when they are asked for."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from copd_engine.config import SourceConfig
from copd_engine.data.files import JsonlRows, ParquetRows, Rows
from copd_engine.data.rows import RowReader, pass_rate
from copd_engine.types import Example, UserError, suggest

logger = logging.getLogger(__name__)

#: Under ``on_error: skip`` more unreadable rows than this share of a file stop the run.
MAX_SKIPPED = 0.01
NUM_SHOWN = 3


class FileExamples(Sequence[Example]):
    """Examples of a file's rows, every one checked at load and parsed again when asked for.

    ``problems``: the error line of each row left out under ``on_error: skip``; ``num_filtered``: rows left out by their
    pass rate.
    """

    def __init__(
        self, rows: Rows, reader: RowReader, indices: np.ndarray, problems: Sequence[str] = (), num_filtered: int = 0
    ) -> None:
        self.rows, self.reader, self.indices = rows, reader, indices
        self.problems, self.num_filtered = tuple(problems), num_filtered

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> FileExamples: ...
    def __getitem__(self, index: int | slice) -> Example | FileExamples:
        if isinstance(index, slice):
            return FileExamples(self.rows, self.reader, self.indices[index], self.problems, self.num_filtered)
        return read_example(self.rows, self.reader, int(self.indices[index]), check=False)

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))


def read_example(rows: Rows, reader: RowReader, index: int, check: bool = True) -> Example:
    """The example of a row. UserError that names its file, line and field."""
    at = rows.at(index)
    fields = reader.fields(rows.row(index), at)
    return reader.example(fields, at, rows.default_uid(index), rows.file(index).parent, check)


def open_rows(source: str, path: Path, where: str, columns: Sequence[str] = ()) -> Rows:
    """The rows of a ``jsonl`` or ``parquet`` source."""
    return ParquetRows(path, where, columns) if source == "parquet" else JsonlRows(path, where)


def file_examples(config: SourceConfig, path: Path, where: str) -> FileExamples:
    """Every row of ``path``, checked, those outside of ``config.pass_rate`` left out.

    UserError for the first row that cannot be read; under ``on_error: skip`` for more than 1 % of them.
    """
    rows = open_rows(config.source, path, where, tuple(config.columns.values()))
    reader = RowReader(config.columns, config.verifier, config.instruction)
    kept, hashes = array("q"), array("q")
    problems: list[str] = []
    seen: set[str] = set()
    for index in range(len(rows)):
        try:
            at = rows.at(index)
            fields = reader.fields(rows.row(index), at)
            seen.update(fields)
            if config.pass_rate is not None:
                low, high = config.pass_rate
                if not low <= pass_rate(fields, at) <= high:
                    continue
            example = reader.example(fields, at, rows.default_uid(index), rows.file(index).parent)
        except UserError as error:
            if config.on_error == "raise":
                raise
            problems.append(str(error))
            continue
        kept.append(index)
        hashes.append(hash(example.uid))
    indices = np.array(kept, np.int64)
    doubles = doubled_rows(rows, reader, indices, np.array(hashes, np.int64))
    if doubles and config.on_error == "raise":
        raise UserError(next(iter(doubles.values())))
    problems += doubles.values()
    indices = indices[~np.isin(indices, list(doubles))]
    if len(problems) > MAX_SKIPPED * len(rows):
        shown = "; ".join(problems[:NUM_SHOWN])
        raise UserError(f"{path}: {len(problems)} of {len(rows)} rows cannot be read, more than 1 %: {shown}")
    for ours, column in config.columns.items():
        if ours not in seen and seen:
            raise UserError(f"{where}: columns.{ours}: no row has {column!r}{suggest(column, _names(rows))}")
    num_filtered = len(rows) - len(indices) - len(problems)
    if not len(indices):
        raise UserError(f"{where}: no row of {path} is left of {len(rows)}: {num_filtered} are outside of pass_rate")
    if problems:
        logger.warning("%s: %d of %d rows left out, the first: %s", path, len(problems), len(rows), problems[0])
    if num_filtered:
        logger.info("%s: %d of %d rows are outside of pass_rate", path, num_filtered, len(rows))
    return FileExamples(rows, reader, indices, problems, num_filtered)


def doubled_rows(rows: Rows, reader: RowReader, indices: np.ndarray, hashes: np.ndarray) -> dict[int, str]:
    """Rows whose uid is that of an earlier row, and what to say of them. Only hashes are kept of a million uids."""
    order = np.argsort(hashes, kind="stable")
    same = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
    first_of_uid: dict[str, int] = {}
    found: dict[int, str] = {}
    for index in np.unique(np.concatenate([indices[order[same]], indices[order[same + 1]]])).tolist():
        uid = read_example(rows, reader, index, check=False).uid
        first = first_of_uid.setdefault(uid, index)
        if first != index:
            found[index] = f"{rows.at(index)}: uid {uid!r} is already that of line {rows.number(first)}"
    return dict(sorted(found.items()))


def _names(rows: Rows) -> list[str]:
    try:
        first: Any = rows.row(0)
    except UserError:
        return []
    return list(first) if isinstance(first, dict) else []


class Mixture(Sequence[Example]):
    """The examples of several sources, one of each in turn as long as they last, so that the first ones are of all."""

    def __init__(self, parts: Sequence[Sequence[Example]]) -> None:
        self.parts = tuple(parts)
        number = np.concatenate([np.arange(len(part)) for part in parts])
        part = np.repeat(np.arange(len(parts)), [len(p) for p in parts])
        order = np.lexsort((part, number))
        self._part, self._number = part[order], number[order]

    def __len__(self) -> int:
        return len(self._part)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        return self.parts[self._part[index]][int(self._number[index])]

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))
