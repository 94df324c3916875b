"""The paper's benchmarks from their own files: which columns they have, and how a row becomes an example.

``docs/eval.md`` says for each which file it reads and what that rests on.
"""

from __future__ import annotations

from copd_engine.data.benchmarks.read import BenchmarkExamples, read_benchmark
from copd_engine.data.benchmarks.specs import BENCHMARKS, Benchmark

__all__ = ["BENCHMARKS", "Benchmark", "BenchmarkExamples", "read_benchmark"]
