"""Tiny files of the benchmarks with the column names of their own, and what reading them gives."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from copd_engine.data.benchmarks import read_benchmark
from copd_engine.types import Example, UserError
from tests.video_files import write_video


def png(value: int = 0) -> dict[str, Any]:
    """An image as Hugging Face writes it into Parquet."""
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(file, "png")
    return {"bytes": file.getvalue(), "path": f"{value}.png"}


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


def dump(path: Path, rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows))
    return path


def dump_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def video(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path)
    return path


def mmmu_row(number: int, **changes: Any) -> dict[str, Any]:
    images = {f"image_{i}": png(i) if i == 1 else None for i in range(1, 8)}
    return {
        "id": f"validation_Math_{number}",
        "question": "What is <image 1>?",
        "options": "['a cat', \"a dog's tail\"]",
        "explanation": "?",
        **images,
        "img_type": "['Photos']",
        "answer": "B",
        "topic_difficulty": "Easy",
        "question_type": "multiple-choice",
        "subfield": "Animals",
        **changes,
    }


def read(name: str, path: Path, group: str | None = None) -> list[Example]:
    return list(read_benchmark(name, path, group))


def error_of(name: str, path: Path | str, group: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        read_benchmark(name, path, group)
    return str(caught.value)
