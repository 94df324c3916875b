"""A missing or foreign library is named in one log line, and nothing breaks."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from copd_kernels._library import LIBRARY_PATH, load_library


def test_missing_library_falls_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert load_library(tmp_path / "copd_kernels_cpu.so") is False
    assert [record.getMessage() for record in caplog.records] == [
        "copd_kernels: CPU operations run on ATen: copd_kernels_cpu.so was not built"
    ]


def test_unloadable_library_falls_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    assert load_library(broken) is False
    (record,) = caplog.records
    assert "run on ATen: broken.so does not load" in record.getMessage()


def test_own_library_loads(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="copd_kernels"):
        assert load_library(LIBRARY_PATH) is True
    assert "CPU operations run on copd_kernels_cpu.so" in caplog.text
