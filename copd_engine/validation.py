"""Validation prompts, on which a choice is made: neither trained on nor among those that the tables use.

Data files: the held-out rows are split in two halves by a hash of their uid; validation is one, the tables' prompts are
the other (whenever something is chosen: ``merge.method: search``). Generated data: validation prompts come from a seed
of their own, without those of the other splits; the tables' prompts stay as they are. Mixtures: source by source.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from copd_engine.config import DataConfig, SourceConfig
from copd_engine.data import load_examples
from copd_engine.data.examples import FileExamples, Mixture
from copd_engine.types import Example, UserError

SEED_OFFSET = 2**29


def validation_examples(data: SourceConfig, count: int, where: str) -> Sequence[Example]:
    """At least ``count`` examples, if there are as many. UserError, opened by ``where``, for data without any."""
    if isinstance(data, DataConfig) and data.source == "mixture":
        return Mixture(
            [validation_examples(source, count, f"{where}.sources.{i}") for i, source in enumerate(data.sources)]
        )
    if data.source in ("jsonl", "parquet"):
        return _half(data, True, where)
    tested = load_examples(data, "eval", where)
    taken = {_problem(example) for example in tested}
    if data.source == "reasoning_gym":  # the testbed's splits have no problem in common, whatever the seed
        taken |= {_problem(example) for example in load_examples(data, "train", where)}
    # As many more as could be taken already.
    changes = {"seed": data.seed + SEED_OFFSET, "eval_size": count + len(tested), "size": 1}
    drawn = load_examples(data.model_copy(update=changes), "eval", where)
    left = [example for example in drawn if _problem(example) not in taken]
    if not left:
        raise UserError(f"{where}: no question is left for validation; lower 'size' or widen 'task_config'")
    return left[:count]


def table_examples(data: SourceConfig, where: str) -> Sequence[Example]:
    """What the tables use where something was chosen on :func:`validation_examples`."""
    if isinstance(data, DataConfig) and data.source == "mixture":
        return Mixture([table_examples(source, f"{where}.sources.{i}") for i, source in enumerate(data.sources)])
    if data.source in ("jsonl", "parquet"):
        return _half(data, False, where)
    return load_examples(data, "eval", where)


def _half(data: SourceConfig, validation: bool, where: str) -> FileExamples:
    rows = load_examples(data, "eval", where)
    assert isinstance(rows, FileExamples)
    chosen = [is_validation(example.uid) == validation for example in rows]
    if not any(chosen):
        kind = "validation" if validation else "the tables"
        raise UserError(f"{where}: none of the {len(rows)} held-out rows is left for {kind}; hold out more rows")
    return FileExamples(rows.rows, rows.reader, rows.indices[chosen], rows.problems, rows.num_filtered)


def is_validation(uid: str) -> bool:
    """Whether a held-out row of a file belongs to the validation half."""
    return zlib.crc32(uid.encode()) % 2 == 0


def _problem(example: Example) -> str:
    """What two examples of the same question share. reasoning-gym's uids are numbers within a seed."""
    return example.prompt if "reasoning_gym" in example.metadata else example.uid
