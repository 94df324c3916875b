"""The compiled CPU library: found beside this file, opened once."""

from __future__ import annotations

import functools
import logging
from pathlib import Path

import torch

LIBRARY_PATH = Path(__file__).with_name("copd_kernels_cpu.so")

_log = logging.getLogger("copd_kernels")


def load_library(path: Path) -> bool:
    """Open the library at ``path`` and say in one log line which implementation the CPU operations have."""
    if not path.exists():
        _log.warning("copd_kernels: CPU operations run on ATen: %s was not built", path.name)
        return False
    try:
        torch.ops.load_library(path)
    except OSError as error:
        # A library built against another torch: its symbols are missing, and ATen gives the same numbers.
        _log.warning("copd_kernels: CPU operations run on ATen: %s does not load: %s", path.name, error)
        return False
    _log.info("copd_kernels: CPU operations run on %s", path.name)
    return True


@functools.cache
def native_available() -> bool:
    """Whether the compiled CPU operations are loaded. The first call loads them."""
    return load_library(LIBRARY_PATH)
