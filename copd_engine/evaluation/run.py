"""``copd eval``: sample, score and keep every output; what is in the folder already is not sampled again."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from copd_engine.config import RunConfig, build_config, load_config
from copd_engine.evaluate import mean_accuracy
from copd_engine.evaluation.results import BenchmarkScores, averages, collect
from copd_engine.evaluation.samples import (
    RESULT,
    TABLE,
    Records,
    SampleFile,
    default_folder,
    settings_of,
)
from copd_engine.evaluation.scores import mean_at_n
from copd_engine.evaluation.sources import Source, open_sources
from copd_engine.evaluation.table import markdown
from copd_engine.models.loading import load_model
from copd_engine.prompts import in_chunks
from copd_engine.report.tables import result_table
from copd_engine.resolve import resolve
from copd_engine.result import result_row
from copd_engine.rollout.base import RolloutEngine, Sampling
from copd_engine.rollout.select import create_engine
from copd_engine.run_folder import machine, today, versions, write_json
from copd_engine.types import RolloutRequest, UserError
from copd_engine.verifiers import Failures, shared_pool, verify_all

#: A config must name a branch; none of its prompts is read when there is --data.
WITHOUT_CONFIG = {"branches": [{"name": "text", "data": {"source": "testbed", "domain": "text"}}]}
EXPERT = "model"


def eval_config(model: str, path: Path | None, overrides: Sequence[str], changes: Mapping[str, Any]) -> RunConfig:
    """The config of an evaluation of ``model``: that of ``path``, or the defaults. ``changes``: ``seed`` and keys of
    the section ``rollout``, None where the command line does not give them."""
    config = load_config(path, list(overrides)) if path else build_config(WITHOUT_CONFIG, overrides=overrides)
    plain = {"path": model, "lora": None, "gradient_checkpointing": False, "freeze_vision": False}
    given = {key: value for key, value in changes.items() if value is not None}
    seed = given.pop("seed", config.seed)
    parts = {"model": config.model.model_copy(update=plain), "rollout": config.rollout.model_copy(update=given)}
    return resolve(config.model_copy(update={**parts, "seed": seed}))


def report(
    config: RunConfig, data: Sequence[str], num_samples: int, num_prompts: int | None, out: Path | None, command: str
) -> str:
    """:func:`evaluate_model`, and what is printed: the table, and where the outputs lie."""
    folder, scores = evaluate_model(config, data, num_samples, num_prompts, out, command)
    if data:
        table = (folder / TABLE).read_text(encoding="utf-8")
    else:  # as the closing table of a run
        accuracies = {score.name: mean_accuracy(mean_at_n(score.rewards_PG).tolist()) for score in scores}
        row = result_row(config.model.path, "merged", accuracies, 0)
        table = result_table({"domains": list(accuracies), "rows": [row]}) + "\n"
    return f"{table}outputs: {folder}"


def evaluate_model(
    config: RunConfig,
    data: Sequence[str],
    num_samples: int,
    num_prompts: int | None,
    out: Path | None,
    command: str,
) -> tuple[Path, list[BenchmarkScores]]:
    """Evaluate ``config.model`` on the sources of ``data`` (:func:`open_sources`), ``num_samples`` a prompt, at the
    temperature and length of ``config.rollout``.

    Every output goes to ``samples.jsonl`` of the folder ``out`` (default: one of its own for model, data and settings),
    the scores to ``eval.json`` and ``table.md``. Returns the folder and the scores. UserError for what cannot be read,
    for a folder of other settings, and where the engine lost samples.
    """
    torch.set_num_threads(config.num_threads)
    policy, encoder = load_model(config.model, config.media, config.device)
    sources = open_sources(data, config, encoder, num_prompts)
    settings = settings_of(config)
    folder = out or default_folder(config, data, settings)
    samples = SampleFile(folder, settings)
    try:
        if any(_missing(source, samples, num_samples) for source in sources):
            with tempfile.TemporaryDirectory() as scratch:
                engine = create_engine(config.rollout, config.model, {EXPERT: policy}, encoder, Path(scratch))
                try:
                    for source in sources:
                        _sample(engine, source, samples, config, num_samples)
                finally:
                    engine.close()
    finally:
        samples.close()
    remembered = [_remembered(source) for source in sources]
    scores = [collect_scores(source, samples.records, num_samples) for source in remembered]
    result = {
        "model": config.model.path,
        "command": command,
        "date": today(),
        "machine": machine(),
        "device": torch.cuda.get_device_name(config.device) if config.device.startswith("cuda") else config.device,
        "versions": versions() | ({"sglang": version("sglang")} if config.rollout.engine == "sglang" else {}),
        "settings": settings,
        "num_samples": num_samples,
        "sources": remembered,
        "benchmarks": {score.name: score.to_dict(config.seed) for score in scores},
        "averages": {name: interval._asdict() for name, interval in averages(scores, config.seed).items()},
    }
    write_json(folder / RESULT, result)
    (folder / TABLE).write_text(markdown({config.model.path: scores}, config.seed) + "\n", encoding="utf-8")
    return folder, scores


def _missing(source: Source, samples: SampleFile, num_samples: int) -> dict[int, list[int]]:
    """Index of each prompt that lacks samples, and their numbers."""
    found = {index: samples.missing(source.name, item, num_samples) for index, item in enumerate(source.items)}
    return {index: numbers for index, numbers in found.items() if numbers}


def _sample(engine: RolloutEngine, source: Source, samples: SampleFile, config: RunConfig, num_samples: int) -> None:
    sampling = Sampling(config.rollout.temperature, config.rollout.max_new_tokens)
    missing = _missing(source, samples, num_samples)
    queue = iter(missing)
    total = sum(map(len, missing.values()))
    with tqdm(total=total, desc=source.name, unit="sample", dynamic_ncols=True, delay=1.0, disable=None) as bar:
        for chunk in in_chunks(source.encode(index) for index in missing):
            requests, number_of = [], {}
            for prompt, index in zip(chunk, queue, strict=False):
                for number in missing[index]:
                    request = RolloutRequest(prompt, seed=source.seed(config.seed, index, number), group=index)
                    number_of[index, request.seed] = number
                    requests.append(request)
            for group in engine.generate_groups(EXPERT, requests, sampling):
                before = shared_pool().failures
                rewards = verify_all([(rollout.text, rollout.request.prompt.example) for rollout in group])
                index = group[0].request.group
                drawn = [
                    (number_of[index, rollout.request.seed], rollout, reward)
                    for rollout, reward in zip(group, rewards, strict=True)
                ]
                samples.add(source.name, source.items[index], drawn, _since(before))
                bar.update(len(group))
    lost = sum(map(len, _missing(source, samples, num_samples).values()))
    if lost:
        raise UserError(f"{source.name}: the engine lost {lost} of {total} samples; the same command draws them again")


def _since(before: Failures) -> Failures:
    """Failures of the verifiers' workers since there were so many."""
    now = shared_pool().failures
    return Failures(*(a - b for a, b in zip(astuple(now), astuple(before), strict=True)))


def _remembered(source: Source) -> dict[str, Any]:
    """What ``eval.json`` keeps of a source, from which its scores can be computed again."""
    return {
        "name": source.name,
        "title": source.title,
        "domain": source.domain,
        "uids": [item.name for item in source.items],
        "groups": {item.name: item.group for item in source.items if item.group is not None},
        "together": {item.name: item.together for item in source.items if item.together is not None},
    }


def collect_scores(source: Mapping[str, Any], records: Records, num_samples: int) -> BenchmarkScores:
    """Scores of a source as ``eval.json`` describes it. KeyError for a sample that is not there."""
    prompts = [(uid, [records[source["name"], uid][sample] for sample in range(num_samples)]) for uid in source["uids"]]
    return collect(source["name"], source["title"], source["domain"], prompts, source["groups"], source["together"])
