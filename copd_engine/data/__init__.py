"""Prompts of a branch: rows of JSONL and Parquet files, generated questions, and the streams that hand them out.

A JSONL row::

    {"prompt": "How many cats?", "answer": "2", "images": ["cats.png"], "verifier": "exact", "uid": "cats-1"}

``docs/data.md`` describes the columns, the mapping of other names, and what is an error.
"""

from __future__ import annotations

from copd_engine.data.load import Split, load_examples
from copd_engine.data.rows import with_instruction
from copd_engine.data.streams import DataStream, MixtureStream, Stream, load_stream, make_stream

__all__ = [
    "DataStream",
    "MixtureStream",
    "Split",
    "Stream",
    "load_examples",
    "load_stream",
    "make_stream",
    "with_instruction",
]
