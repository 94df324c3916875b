"""What a model is asked: benchmarks, data files of our own format, or the held-out prompts of a config's branches."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, overload

from copd_engine.config import DataConfig, RunConfig
from copd_engine.data.benchmarks import BENCHMARKS, read_benchmark
from copd_engine.data.examples import file_examples
from copd_engine.inputs import held_out_prompts
from copd_engine.models.base import PromptEncoder
from copd_engine.prompts import encode_prompt
from copd_engine.step import derive_seed
from copd_engine.types import EncodedPrompt, Example, UserError, suggest


class Item(NamedTuple):
    """What is remembered of a prompt: ``name`` is its uid, numbered where files of a mixture share one; ``digest`` is
    that of :func:`question_digest`; ``where`` names it in error lines; ``group`` and ``together`` as in
    :class:`copd_engine.data.benchmarks.Benchmark`."""

    name: str
    digest: str
    where: str
    group: str | None
    together: str | None


def question_digest(example: Example) -> str:
    """SHA-256 of what is asked and how it is scored: the conversation, the gold, the verifier and its metadata."""
    asked = [example.turns, example.answer, example.verifier, example.metadata]
    return hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()


class Picked(Sequence[Example]):
    """Examples of several sequences, each read when it is asked for: ``chosen`` are (part, index), default all of them
    one part after the other."""

    def __init__(self, parts: Sequence[Sequence[Example]], chosen: Sequence[tuple[int, int]] | None = None) -> None:
        self.parts = parts
        everything = ((number, index) for number, part in enumerate(parts) for index in range(len(part)))
        self.chosen = list(everything) if chosen is None else chosen

    def __len__(self) -> int:
        return len(self.chosen)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Picked: ...
    def __getitem__(self, index: int | slice) -> Example | Picked:
        if isinstance(index, slice):
            return Picked(self.parts, self.chosen[index])
        part, number = self.chosen[index]
        return self.parts[part][number]

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))


@dataclass(frozen=True)
class Source:
    """Prompts of one name. ``first_seed``: of branches, prompt i's first sample has the seed ``first_seed + i``, as in
    the evaluations of a run; every other seed follows from the names of source and prompt and the sample's number."""

    name: str
    title: str
    domain: str
    items: tuple[Item, ...]
    encode: Callable[[int], EncodedPrompt]
    first_seed: int | None = None

    def seed(self, seed: int, index: int, sample: int) -> int:
        """The same for all models."""
        if self.first_seed is not None and sample == 0:
            return self.first_seed + index
        return derive_seed(seed, "eval", self.name, self.items[index].name, sample)


def open_sources(
    data: Sequence[str], config: RunConfig, encoder: PromptEncoder, num_prompts: int | None
) -> list[Source]:
    """The sources of ``--data``, each ``BENCHMARK[:GROUP]=PATH``, ``NAME=FILE`` or ``FILE``, files of one name as one;
    without any the held-out prompts of the config's branches. The first ``num_prompts`` of each, default all; prompts
    that count as one are one.

    UserError for names, files and rows that cannot be read.
    """
    if not data:
        return [_branch(config, number, encoder, num_prompts) for number in range(len(config.branches))]
    if len(set(data)) < len(data):
        raise UserError(f"--data {Counter(data).most_common(1)[0][0]} is given twice")
    found: dict[str, list[Sequence[Example]]] = {}
    for item in data:
        name, examples = _read(item)
        found.setdefault(name, []).append(examples)
    return [_listed(name, parts, config, encoder, num_prompts) for name, parts in found.items()]


def _read(item: str) -> tuple[str, Sequence[Example]]:
    name, equals, path = item.partition("=")
    if not equals or Path(item).exists():
        name, path = Path(item).name.partition(".")[0], item
    benchmark, colon, group = name.partition(":")
    if benchmark in BENCHMARKS and equals:
        return name, read_benchmark(benchmark, path, group or None)
    if colon:
        raise UserError(f"--data {item}: no benchmark is called {benchmark!r}{suggest(benchmark, BENCHMARKS)}")
    suffix = Path(path).suffix
    if suffix not in (".jsonl", ".parquet"):
        near = suggest(name, BENCHMARKS) if equals else "; a benchmark is given as NAME=PATH"
        raise UserError(f"--data {item}: must be BENCHMARK=PATH, or a .jsonl or .parquet file of docs/data.md{near}")
    config = DataConfig(source="jsonl" if suffix == ".jsonl" else "parquet", path=Path(path))
    return name, file_examples(config, Path(path), f"--data {name}")


def _listed(
    name: str, parts: list[Sequence[Example]], config: RunConfig, encoder: PromptEncoder, num_prompts: int | None
) -> Source:
    examples = first_units(parts[0] if len(parts) == 1 else Picked(parts), num_prompts)
    benchmark, _, group = name.partition(":")
    spec = BENCHMARKS.get(benchmark)
    title = name if spec is None else spec.title + (f" ({group})" if group else "")
    domain = _domain(examples) if spec is None else spec.domain
    limit = config.rollout.max_prompt_tokens
    return Source(name, title, domain, _items(examples), lambda index: encode_prompt(encoder, examples[index], limit))


def first_units(examples: Sequence[Example], num_prompts: int | None) -> Sequence[Example]:
    """The first ``num_prompts``; of prompts that count as one (metadata ``together``) all or none."""
    first = examples[:num_prompts]
    if all(example.metadata.get("together") is None for example in first):
        return first
    units = []
    for index, example in enumerate(examples):
        together = example.metadata.get("together")
        units.append(("alone", index) if together is None else ("together", str(together)))
    kept = set(list(dict.fromkeys(units))[:num_prompts])
    return Picked([examples], [(0, index) for index, unit in enumerate(units) if unit in kept])


def _branch(config: RunConfig, number: int, encoder: PromptEncoder, num_prompts: int | None) -> Source:
    name = config.branches[number].name
    prompts = held_out_prompts(config, number, encoder, num_prompts or config.eval.final_num_prompts)
    examples = [prompt.example for prompt in prompts]
    first_seed = derive_seed(config.seed, "eval")
    return Source(name, name, _domain(examples), _items(examples), lambda index: prompts[index], first_seed)


def _items(examples: Iterable[Example]) -> tuple[Item, ...]:
    seen: Counter[str] = Counter()
    items = []
    for example in examples:
        seen[example.uid] += 1
        count, metadata = seen[example.uid], example.metadata
        name = example.uid if count == 1 else f"{example.uid}#{count}"
        group, together = (None if (x := metadata.get(key)) is None else str(x) for key in ("group", "together"))
        items.append(Item(name, question_digest(example), example.name, group, together))
    return tuple(items)


def _domain(examples: Sequence[Example]) -> str:
    first = examples[0]
    return "video" if first.videos else "image" if first.images else "text"
