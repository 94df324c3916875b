"""``copd merge``: from models to a merged folder, with a search before it and a retention table after it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from copd_engine.config import MergeConfig, ModelConfig, RunConfig
from copd_engine.evaluate import evaluate, mean_accuracy
from copd_engine.inputs import held_out_prompts
from copd_engine.merge.methods import check_weights, merge
from copd_engine.merge.search import SEARCH_FILE, Search, search
from copd_engine.merge.streaming import StoredTensor, merge_folders, stored_tensors, weight_folder, written_beside
from copd_engine.models.base import Policy, PromptEncoder
from copd_engine.models.loading import load_model
from copd_engine.report.retention import retention_table
from copd_engine.resolve import resolve
from copd_engine.result import result_row, save_model
from copd_engine.rollout.base import Sampling
from copd_engine.rollout.embedded import EmbeddedEngine
from copd_engine.run_folder import write_json
from copd_engine.step import derive_seed
from copd_engine.types import UserError

Write = Callable[[MergeConfig, Path], None]


@dataclass(frozen=True)
class MergeModels:
    """What is to be merged. ``branches``: paths by the command line's ``PATH`` or ``PATH=WEIGHT``."""

    base: str
    branches: tuple[str, ...]
    weights: dict[str, float] | None
    streamed: bool
    write: Write

    @classmethod
    def open(cls, base: str, items: Sequence[str]) -> MergeModels:
        """Folders of safetensors are streamed; if any model is something else, all are loaded.

        UserError for models that cannot be read and weights that are none.
        """
        weights: dict[str, float] = {}
        weighted = False
        for item in items:
            # A folder's own name may hold a '='.
            path, equals, weight = (item, "", "") if Path(item).is_dir() else item.rpartition("=")
            try:
                value = float(weight) if equals else 1.0
            except ValueError:
                raise UserError(f"branch {item!r}: the weight after '=' must be a number") from None
            if (path or item) in weights:
                raise UserError(f"branch {path or item!r} is named twice; give it a weight instead, e.g. FOLDER=2")
            weights[path or item] = value
            weighted = weighted or bool(equals)
        check_weights(weights, weights)
        start, ends = weight_folder(base), {path: weight_folder(path) for path in weights}
        folders = {path: folder for path, folder in ends.items() if folder is not None}
        shares = weights if weighted else None
        if start is not None and len(folders) == len(ends):
            return cls(base, tuple(weights), shares, True, _streaming(start, folders))
        return cls(base, tuple(weights), shares, False, _in_memory(base, start, list(weights)))


def _streaming(base: Path, branches: dict[str, Path]) -> Write:
    return lambda recipe, out: merge_folders(base, branches, out, recipe)


def _in_memory(base: str, folder: Path | None, branches: Sequence[str]) -> Write:
    """``folder``: of the base's safetensors, if it has any."""
    policy, encoder = load_model(ModelConfig(path=base))
    if folder is not None:
        _as_stored(policy, stored_tensors(folder))
    tensors = {path: load_model(ModelConfig(path=path))[0].full_parameters() for path in branches}

    def write(recipe: MergeConfig, out: Path) -> None:
        merged = policy.with_full_parameters(merge(policy.full_parameters(), tensors, recipe))
        with written_beside(out) as aside:
            save_model(merged, encoder, aside)

    return write


def _as_stored(policy: Policy, stored: Mapping[str, StoredTensor]) -> None:
    """Each weight of ``policy`` in its dtype on disk; one that has another name there in the widest of them."""
    widest = max(
        (tensor.dtype for tensor in stored.values() if tensor.dtype.is_floating_point), key=lambda d: d.itemsize
    )
    for name, parameter in policy.module.named_parameters():
        parameter.data = parameter.data.to(stored[name].dtype if name in stored else widest)


def recipe_of(method: str | None, weights: dict[str, float] | None, **options: float | None) -> MergeConfig:
    """The recipe of a command line; without a method the mean, or the weighted mean where there are weights.

    UserError for options that do not fit.
    """
    method = method or ("mean" if weights is None else "weighted")
    if method == "search":
        raise UserError("--method search: the command takes --search --config CONFIG for that")
    if (method == "weighted") != (weights is not None):
        raise UserError(f"weights (FOLDER=WEIGHT) go with --method weighted, which needs them; it is {method}")
    given: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    try:
        return MergeConfig(method=method, weights=weights, **given)  # type: ignore[arg-type]
    except ValidationError as error:
        problem = error.errors()[0]
        message = problem["msg"].removeprefix("Value error, ")
        where = f"--{problem['loc'][0]} {problem['input']}: " if problem["loc"] else ""
        raise UserError(f"{where}{message[0].lower()}{message[1:]}") from None


class Judge:
    """Evaluates models on the prompts of a run's config. ``num_prompts`` per branch; None: ``final_num_prompts``."""

    def __init__(self, config: RunConfig, num_prompts: int | None) -> None:
        self.config = resolve(config)
        self.num_prompts = num_prompts or config.eval.final_num_prompts
        torch.set_num_threads(self.config.num_threads)

    def load(self, path: str) -> tuple[Policy, PromptEncoder]:
        model = ModelConfig(path=path, dtype=self.config.model.dtype, attention=self.config.model.attention)
        return load_model(model, self.config.media, self.config.device)

    def search(self, models: MergeModels, beside: Path) -> Search:
        """One merged model at a time is written beside ``beside``, loaded and deleted."""
        beside.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=beside.parent, prefix=f".{beside.name}.") as scratch:
            folder = Path(scratch) / "model"

            def model_of(recipe: MergeConfig) -> tuple[Policy, PromptEncoder]:
                shutil.rmtree(folder, ignore_errors=True)
                models.write(recipe, folder)
                return self.load(str(folder))

            return search(self.config, len(models.branches), model_of, self.num_prompts)

    def retention(self, models: MergeModels, merged: Path) -> str:
        """Table of what the merged model keeps: each branch on its own domain, paired by prompt."""
        names = own_domains(models.branches, self.config.branch_names)
        rows = [self._row(path, f"branch:{name}", "branch", [name]) for path, name in names.items()]
        rows.append(self._row(str(merged), "merged", "merged", list(names.values())))
        return retention_table({"rows": rows})

    def _row(self, path: str, label: str, kind: str, domains: Sequence[str]) -> dict[str, Any]:
        policy, encoder = self.load(path)
        rollout = self.config.rollout
        engine = EmbeddedEngine({label: policy}, encoder, rollout.max_running, rollout.max_cached_tokens)
        prompts = {
            name: held_out_prompts(self.config, number, encoder, self.num_prompts)
            for number, name in enumerate(self.config.branch_names)
            if name in domains
        }
        sampling = Sampling(rollout.temperature, rollout.max_new_tokens)
        samples = evaluate(engine, label, prompts, sampling, derive_seed(self.config.seed, "eval"))[1]
        rewards = {name: [reward for domain, _, reward in samples if domain == name] for name in domains}
        row = result_row(label, kind, {name: mean_accuracy(values) for name, values in rewards.items()}, 0)
        return row | {"rewards": rewards}


def own_domains(paths: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """Which branch of a config each folder is, by its name: ``NAME``, ``branch-NAME`` or ``expert-NAME``."""
    found: dict[str, str] = {}
    for path in paths:
        folder = Path(path).name
        name = next((n for n in names if folder in (n, f"branch-{n}", f"expert-{n}")), None)
        if name is None or name in found.values():
            ways = ", ".join(f"branch-{n}" for n in names)
            raise UserError(f"--retention: {path} must be the folder of one branch of the config, named {ways}")
        found[path] = name
    return found


def run(
    models: MergeModels, out: Path, recipe: MergeConfig, judge: Judge | None, searching: bool, retention: bool
) -> str:
    """Merge into ``out``, which must not exist; returns what the command prints."""
    lines = []
    if searching and models.weights is not None:
        raise UserError("--search takes no weights (FOLDER=WEIGHT)")
    if judge is not None and retention:
        own_domains(models.branches, judge.config.branch_names)  # an error before the work
    if judge is not None and searching:
        found = judge.search(models, out)
        recipe = found.best
        lines += [found.table(), ""]
    models.write(recipe, out)
    if judge is not None and searching:
        write_json(out / SEARCH_FILE, found.as_json())
    how = "" if models.streamed else ", all of them in memory"
    lines.append(f"merged {len(models.branches)} branches into {out} ({recipe}{how})")
    if judge is not None and retention:
        lines += ["", judge.retention(models, out)]
    return "\n".join(lines)
