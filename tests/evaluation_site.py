"""A benchmark for the site's small model, and ``copd eval`` of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.benchmark_files import parquet
from tests.cli_site import Ended, Site


@pytest.fixture
def aime(site: Site) -> str:
    """Answers 1 and 2 are what the small model gives."""
    rows = [{"id": i, "problem": f"{i}+{i}=", "answer": str(1 + i % 2)} for i in range(6)]
    return f"aime_2024={parquet(site.root / 'aime/train.parquet', rows)}"


@pytest.fixture
def evaluate(copd: Callable[..., Ended], aime: str) -> Callable[..., Ended]:
    def call(*arguments: str, model: str = "base", data: str = aime) -> Ended:
        return copd("eval", model, "num_threads=1", "--data", data, "--max-new-tokens", "4", *arguments)

    return call


def lines(folder: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(folder, "samples.jsonl").read_text().splitlines()]


def drawn(folder: str) -> dict[tuple[str, int], str]:
    return {(line["uid"], line["sample"]): line["response"] for line in lines(folder)}
