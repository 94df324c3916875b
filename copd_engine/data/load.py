"""From the ``data`` section of a branch to its examples."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from copd_engine.config import DataConfig, SourceConfig
from copd_engine.data.examples import FileExamples, Mixture, file_examples
from copd_engine.data.reasoning_gym import reasoning_gym_examples
from copd_engine.data.rows import instructed
from copd_engine.types import Example, UserError
from copd_engine.verifiers import get_verifier

Split = Literal["train", "eval"]
logger = logging.getLogger(__name__)


def load_examples(config: SourceConfig, split: Split, where: str = "branches.0.data") -> Sequence[Example]:
    """All examples of a split; train and eval never share a question.

    - ``testbed``: ``size`` or ``eval_size`` generated examples, a share ``conflict`` of them with the symbol.
    - ``jsonl``, ``parquet``: every row of ``path`` (``size`` does not apply) whose pass rate fits. Eval is every row of
      ``eval_path`` if given, else the last ``eval_size`` rows of ``path`` are held out; half of the rows where the file
      has no more than ``eval_size``. Rows are checked now and parsed again when they are asked for.
    - ``reasoning_gym``: ``size`` generated questions, repeats included; eval up to ``eval_size`` different questions
      drawn from seeds of their own that are not among the train questions.
    - ``mixture``: the splits of all sources, one example of each in turn (:class:`Mixture`).

    ``config.verifier`` overrides the rows' verifier. ``config.instruction`` is a template if it contains
    ``{question}``, else it follows the prompt on a line of its own. Raises :class:`UserError` that names ``where``
    (the section of the config) or file, line and field.
    """
    if isinstance(config, DataConfig) and config.source == "mixture":
        _check_mixture(config, where)
        return Mixture(
            [load_examples(source, split, f"{where}.sources.{i}") for i, source in enumerate(config.sources)]
        )
    if config.verifier is not None:
        try:
            get_verifier(config.verifier)
        except UserError as error:
            raise UserError(f"{where}.verifier: {error}") from None
    if config.source in ("jsonl", "parquet"):
        return _from_file(config, split, where)
    if config.source == "testbed":
        from copd_engine.testbed.tasks import testbed_examples

        size = config.size if split == "train" else config.eval_size
        try:
            examples = testbed_examples(str(config.domain), split, size, config.seed, config.conflict)
        except UserError as error:
            raise UserError(f"{where}.domain: {error}") from None
        if config.verifier is not None:
            examples = [dataclasses.replace(example, verifier=config.verifier) for example in examples]
    else:
        examples = reasoning_gym_examples(config, split, where)
    return [instructed(example, config.instruction) for example in examples] if config.instruction else examples


def _check_mixture(config: DataConfig, where: str) -> None:
    """What is set beside ``sources`` would be read by nobody."""
    for key in sorted(config.model_fields_set - {"source", "sources"}):
        if getattr(config, key) != type(config).model_fields[key].get_default(call_default_factory=True):
            raise UserError(f"{where}.{key}: of a mixture, {key!r} stands with each of the 'sources'")


def _from_file(config: SourceConfig, split: Split, where: str) -> FileExamples:
    path = Path(str(config.path))
    if config.eval_path is not None:
        eval_path = Path(config.eval_path)
        if path.exists() and eval_path.exists() and path.samefile(eval_path):
            raise UserError(
                f"{where}.eval_path: {eval_path} is the training file; without eval_path its last rows are held out"
            )
        if split == "eval":
            return file_examples(config, eval_path, f"{where}.eval_path")
        return file_examples(config, path, f"{where}.path")
    rows = file_examples(config, path, f"{where}.path")
    if len(rows) < 2:
        raise UserError(f"{where}.path: {path} has 1 row; holding out eval rows needs at least 2, or give eval_path")
    held_out = config.eval_size
    if held_out >= len(rows):
        held_out = len(rows) // 2
        logger.warning("%s has %d rows, eval_size is %d: %d rows held out", path, len(rows), config.eval_size, held_out)
    return rows[-held_out:] if split == "eval" else rows[:-held_out]
