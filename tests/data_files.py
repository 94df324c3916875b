"""Small data files for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from copd_engine.config import DataConfig

GOOD = {"prompt": "q", "answer": "1"}


def jsonl(path: Path, **options: Any) -> DataConfig:
    return DataConfig(source="jsonl", path=path, **options)


def write(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def rows(n: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"prompt": f"q{i}", "answer": i} for i in range(start, start + n)]
