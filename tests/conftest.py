"""Settings of every test: one thread, so that numbers do not depend on the machine; GPU tests skip without a GPU."""

from __future__ import annotations

import os

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    # Triton kernels run in its interpreter. It looks when it is imported, which is after this.
    os.environ.setdefault("TRITON_INTERPRET", "1")

hypothesis.settings.register_profile("copd", deadline=None, max_examples=50)
hypothesis.settings.load_profile("copd")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
