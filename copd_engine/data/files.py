"""Rows of JSONL and Parquet files by number, read from disk when they are asked for.

A JSONL file of a million rows costs 12 MB: where each line begins, and its number. Of Parquet files the row groups used
last stay in memory, up to ``CACHE_BYTES``.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from copd_engine.types import UserError, suggest

CACHE_BYTES = 512 * 2**20


class Rows(ABC):
    """The rows of a source, 0 to ``len() - 1``."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def row(self, index: int) -> Any:
        """The row's parsed value. UserError that opens with :meth:`at` for one that cannot be read."""

    @abstractmethod
    def file(self, index: int) -> Path:
        """The file that holds the row."""

    @abstractmethod
    def number(self, index: int) -> int:
        """Its line or row in that file, from 1."""

    def at(self, index: int) -> str:
        """``data.jsonl:7``"""
        return f"{self.file(index)}:{self.number(index)}"

    def default_uid(self, index: int) -> str:
        return f"{self.file(index).name}:{self.number(index)}"


class JsonlRows(Rows):
    """The lines of a JSONL file that are not blank. UserError, opened by ``where``, for a missing or empty file."""

    def __init__(self, path: Path, where: str) -> None:
        if not path.is_file():
            raise UserError(f"{where}: {path} does not exist")
        self.path = path
        starts, numbers, position = array("q"), array("l"), 0
        # Only \n ends a row: JSON strings may hold the other line ends that str.splitlines knows.
        self._file = path.open("rb")
        for number, line in enumerate(self._file, start=1):
            if line.strip():
                starts.append(position)
                numbers.append(number)
            position += len(line)
        if not starts:
            raise UserError(f"{where}: {path} is empty")
        self._starts = np.array([*starts, position], np.int64)
        self._numbers = np.array(numbers, np.int32)
        first = b"".join(self._line(0).removeprefix(b"\xef\xbb\xbf").split())
        if first == b"[" or first.startswith(b"[{"):
            raise UserError(
                f"{where}: {path} is one JSON array; JSONL has an object a line (docs/data.md shows how to turn it)"
            )

    def __len__(self) -> int:
        return len(self._numbers)

    def file(self, index: int) -> Path:
        return self.path

    def number(self, index: int) -> int:
        return int(self._numbers[index])

    def row(self, index: int) -> Any:
        try:
            text = self._line(index).decode("utf-8-sig" if index == 0 else "utf-8")
            return json.loads(text, parse_constant=_reject_constant)
        except UnicodeDecodeError as error:
            raise UserError(f"{self.at(index)}: not UTF-8 text (byte {error.start} of the line)") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.at(index)}: not JSON: {error}") from None

    def _line(self, index: int) -> bytes:
        start, end = int(self._starts[index]), int(self._starts[index + 1])
        return os.pread(self._file.fileno(), end - start, start)


def _reject_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


class ParquetRows(Rows):
    """The rows of a Parquet file, or of all ``*.parquet`` in a folder in the order of their names.

    ``columns``: the columns to read, dots into nested ones; empty: all. UserError, opened by ``where``, for a missing,
    damaged or empty file, or one without a column.
    """

    def __init__(self, path: Path, where: str, columns: Sequence[str] = ()) -> None:
        import pyarrow
        import pyarrow.parquet

        files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        if not files or not path.exists():
            raise UserError(f"{where}: {path} " + ("holds no *.parquet" if path.is_dir() else "does not exist"))
        self._arrow_errors = (pyarrow.ArrowException, OSError, ValueError)
        self._files: list[Any] = []
        self._paths = files
        self._groups: list[tuple[int, int]] = []  # file, row group in it
        starts, firsts, total = [], [], 0
        for number, file in enumerate(files):
            try:
                opened = pyarrow.parquet.ParquetFile(file)
            except self._arrow_errors as error:
                raise UserError(f"{where}: {file} cannot be read as Parquet: {_line(error)}") from None
            names = opened.schema_arrow.names
            for column in columns:
                if column not in names and column.split(".")[0] not in names:
                    raise UserError(f"{where}: {file} has no column {column!r}{suggest(column, names)}")
            self._files.append(opened)
            before = total
            for group in range(opened.num_row_groups):
                self._groups.append((number, group))
                starts.append(total)
                firsts.append(before)
                total += opened.metadata.row_group(group).num_rows
        if not total:
            raise UserError(f"{where}: {path} is empty")
        names = self._files[0].schema_arrow.names
        self._columns = sorted({c if c in names else c.split(".")[0] for c in columns}) or None
        self._starts, self._firsts, self._total = np.array(starts), np.array(firsts), total
        self._cache: OrderedDict[int, Any] = OrderedDict()

    def __len__(self) -> int:
        return self._total

    def _group_of(self, index: int) -> int:
        return int(np.searchsorted(self._starts, index, side="right")) - 1

    def file(self, index: int) -> Path:
        return self._paths[self._groups[self._group_of(index)][0]]

    def number(self, index: int) -> int:
        return index - int(self._firsts[self._group_of(index)]) + 1

    def row(self, index: int) -> Any:
        group = self._group_of(index)
        if group not in self._cache:
            file, number = self._groups[group]
            try:
                self._cache[group] = self._files[file].read_row_group(number, columns=self._columns)
            except self._arrow_errors as error:
                raise UserError(f"{self.at(index)}: cannot be read from Parquet: {_line(error)}") from None
            while len(self._cache) > 1 and sum(table.nbytes for table in self._cache.values()) > CACHE_BYTES:
                self._cache.popitem(last=False)
        self._cache.move_to_end(group)
        return self._cache[group].slice(index - int(self._starts[group]), 1).to_pylist()[0]


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
