"""What a run reads: the examples of its branches, the streams of prompts drawn from them, the held-out prompts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice

from copd_engine.config import RunConfig
from copd_engine.data import load_examples, make_stream
from copd_engine.models.base import PromptEncoder
from copd_engine.prompts import HeldOutPrompts, PromptSource
from copd_engine.step import derive_seed
from copd_engine.types import Example, UserError
from copd_engine.validation import table_examples, validation_examples
from copd_engine.verifiers import check_example

NUM_GOLDS_CHECKED = 1000


def load_train_examples(config: RunConfig) -> dict[str, Sequence[Example]]:
    """The train split of each branch. UserError for data that cannot be read or scored."""
    examples = {
        branch.name: load_examples(branch.data, "train", f"branches.{number}.data")
        for number, branch in enumerate(config.branches)
    }
    _check_reward_golds(config, examples)
    return examples


def prompt_sources(
    config: RunConfig, students: Iterable[str], examples: Mapping[str, Sequence[Example]], encoder: PromptEncoder
) -> dict[tuple[str, str], PromptSource]:
    """The prompts of each (student, source), every one in an order of its own."""
    sources = {}
    for student in students:
        for branch in config.branches:
            seed = derive_seed(config.seed, "stream", student, branch.name)
            stream = make_stream(branch.data, examples[branch.name], seed)
            sources[student, branch.name] = PromptSource(stream, encoder, config.rollout.max_prompt_tokens)
    return sources


def _check_reward_golds(config: RunConfig, examples: Mapping[str, Sequence[Example]]) -> None:
    """UserError where a reward term's own verifier cannot score the rows, as far as the first ones show."""
    for number, branch in enumerate(config.branches):
        for index, term in enumerate(branch.reward):
            if term.name is None:
                continue
            for example in islice(examples[branch.name], NUM_GOLDS_CHECKED):
                try:
                    check_example(example, term.name)
                except UserError as error:
                    raise UserError(f"branches.{number}.reward.{index}.name = {term.name!r}: {error}") from None


def held_out_prompts(config: RunConfig, number: int, encoder: PromptEncoder, count: int) -> HeldOutPrompts:
    """The first ``count`` prompts of branch ``number``'s eval split; under ``merge.method: search`` without those that
    the merge is chosen on."""
    data, where = config.branches[number].data, f"branches.{number}.data"
    if config.merge.method == "search":
        validation_examples(data, 1, where)  # an error now, not after the training
        examples = table_examples(data, where)
    else:
        examples = load_examples(data, "eval", where)
    return HeldOutPrompts(examples, data, encoder, config.rollout.max_prompt_tokens, count)
