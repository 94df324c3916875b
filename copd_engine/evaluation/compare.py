"""``copd eval-table``: models that were evaluated into folders of their own, in one table."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from copd_engine.evaluation.results import BenchmarkScores
from copd_engine.evaluation.run import collect_scores
from copd_engine.evaluation.samples import NOT_COMPARED, RESULT, read_questions, read_samples
from copd_engine.evaluation.table import markdown
from copd_engine.types import UserError

#: Of the settings, what models that are compared differ in.
OF_THE_MODEL = {*NOT_COMPARED, "weights", "tokenizer"}
#: Of a sample, what the model was asked and how it is scored, and what an error line calls it.
ASKED = {"prompt": "prompt", "messages": "messages", "gold": "gold", "digest": "verifier or metadata"}


def compare(folders: Sequence[Path]) -> str:
    """The table of the evaluations in ``folders``, the first of which the others are compared with, as Markdown.

    Settings other than the first's are named below it, and so are prompts that not all were asked. UserError where a
    prompt, gold, verifier or metadata of one uid differs, or samples are missing.
    """
    results = []
    for folder in folders:
        file = folder / RESULT
        if not file.is_file():
            raise UserError(f"{folder} holds no finished evaluation (no {RESULT})")
        results.append((folder, json.loads(file.read_text())))
    uses = Counter(result["model"] for _, result in results)
    models: dict[str, list[BenchmarkScores]] = {}
    asked: dict[tuple[str, str], tuple[Path, dict[str, Any]]] = {}
    for folder, result in results:
        name = result["model"] if uses[result["model"]] == 1 else str(folder)
        if name in models:
            raise UserError(f"{folder} is named twice")
        records = read_samples(folder)
        try:
            models[name] = [collect_scores(source, records, result["num_samples"]) for source in result["sources"]]
        except KeyError as error:
            raise UserError(f"{folder}: samples are missing ({error}): run its copd eval again") from None
        for (source, uid), question in _questions(result, folder).items():
            first, expected = asked.setdefault((source, uid), (folder, question))
            for key, called in ASKED.items():
                if question[key] != expected[key]:
                    raise UserError(
                        f"{source} {uid!r}: the {called} in {folder} is not that in {first}: "
                        "evaluate both models on the same data"
                    )
    table = markdown(models, results[0][1]["settings"]["seed"])
    return "\n\n".join([table, *_other_settings(dict(zip(models, (result for _, result in results), strict=True)))])


def _questions(result: Mapping[str, Any], folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """(benchmark, uid) to what was asked, of those that were scored."""
    found = read_questions(folder, tuple(ASKED))
    return {(source["name"], uid): found[source["name"], uid] for source in result["sources"] for uid in source["uids"]}


def _other_settings(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for each model whose samples were drawn with other settings than the first's."""
    (first, base), *others = ((name, _settings(result)) for name, result in results.items())
    lines = []
    for name, settings in others:
        keys = [key for key in dict.fromkeys([*base, *settings]) if base.get(key) != settings.get(key)]
        if keys:
            changes = ", ".join(f"{key} {settings.get(key)} ({first}: {base.get(key)})" for key in keys)
            lines.append(f"{name} was evaluated with other settings: {changes}.")
    return lines


def _settings(result: Mapping[str, Any]) -> dict[str, Any]:
    """Key to value, ``media.video_fps`` of nested ones."""
    flat = {"num_samples": result["num_samples"]}
    for key, value in result["settings"].items():
        if key not in OF_THE_MODEL:
            flat |= {f"{key}.{inner}": x for inner, x in value.items()} if isinstance(value, dict) else {key: value}
    return flat
