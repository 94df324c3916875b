"""The peers of bench_kernels.py at a small shape under pytest-benchmark.

``pytest benchmarks/bench_ops.py --benchmark-only`` compares within a group, one task in one dtype. Peers whose package
is missing are skipped. The figures that count are those of bench_kernels.py: this one is for a quick look.
"""

from __future__ import annotations

import functools

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.adapter import package_version
from benchmarks.peers import PEERS
from benchmarks.problem import DTYPES, TASKS, Problem, make

SHAPE = (256, 256, 4096)
CASES = [
    pytest.param(task, dtype, name, id=f"{task}-{dtype}-{name}")
    for task in TASKS
    for dtype in DTYPES
    for name, peer in PEERS.items()
    if task in peer.tasks
]


@functools.cache
def problem(task: str, dtype: str) -> Problem:
    return make(task, SHAPE, DTYPES[dtype])


@pytest.mark.parametrize(("task", "dtype", "name"), CASES)
def test_op(benchmark: BenchmarkFixture, task: str, dtype: str, name: str) -> None:
    peer = PEERS[name]
    if package_version(peer) is None:
        pytest.skip(f"{peer.package} is not installed")
    benchmark.group = f"{task} {dtype}"
    call = peer.tasks[task](problem(task, dtype))
    benchmark.pedantic(call, rounds=5, warmup_rounds=1)
