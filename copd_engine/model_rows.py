"""The models that a run ends with, or keeps on the way: evaluated, saved, a row of the result's table each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from copd_engine import run_folder
from copd_engine.algorithms import EQUAL_FLOPS, EQUAL_STEPS, MIXED, STUDENT, Schedule, final_model
from copd_engine.branch import Branch
from copd_engine.config import MergeConfig, RunConfig
from copd_engine.flops import Work
from copd_engine.held_out import HeldOut
from copd_engine.merge import merge
from copd_engine.merge.search import SEARCH_FILE, search
from copd_engine.models.base import Policy, PromptEncoder
from copd_engine.result import result_row, save_model
from copd_engine.rollout.embedded import EmbeddedEngine
from copd_engine.step import StepRunner


class ModelRows:
    """Rows of :func:`copd_engine.result.result_row`; the models lie in ``run_dir/models``. ``steps`` counts what the
    branches' training took."""

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        base: Policy,
        encoder: PromptEncoder,
        branches: Mapping[str, Branch],
        steps: StepRunner,
        held_out: HeldOut,
    ) -> None:
        self._config = config
        self._run_dir = run_dir
        self._base = base
        self._encoder = encoder
        self._branches = branches
        self._steps = steps
        self._held_out = held_out

    def of_base(self) -> dict[str, Any]:
        """The row of the model that all branches started from."""
        return self._row("base", "base", self.model_of(self._base.full_parameters()), [])

    def after(self, step: int, schedule: Schedule, samples_step: int | None = None) -> list[dict[str, Any]]:
        """The rows that are due after ``step``, none after most: of models that have now drawn as many rollouts, taken
        as many steps or computed as much as CoPD's. Labels: :func:`copd_engine.algorithms.result_labels`."""
        rows: list[dict[str, Any]] = []
        if step == schedule.experts_step:
            rows += self.of_branches("expert", EQUAL_STEPS)
        if step == schedule.equal_steps:
            rows += self.of_result(EQUAL_STEPS)
        for suffix, end in (("", schedule.equal_rollouts), (EQUAL_FLOPS, schedule.equal_flops)):
            if step == end and self._config.method in ("copd", "expert"):
                rows += self.of_branches("branch" if self._config.method == "copd" else "expert", suffix)
            if step == end:
                rows += self.of_result(suffix, samples_step)
        return rows

    def of_branches(self, kind: str, suffix: str = "") -> list[dict[str, Any]]:
        """A row for each branch as it stands now."""
        own = {name: branch for name, branch in self._branches.items() if name != STUDENT}
        return [self._row(f"{kind}:{name}{suffix}", kind, branch.policy, [name]) for name, branch in own.items()]

    def of_result(self, suffix: str = "", samples_step: int | None = None) -> list[dict[str, Any]]:
        """The row of the model that the run is for: the merge of its branches, or the one that everything went into;
        none where a lone branch has nothing to be merged with. Some samples are kept under ``samples_step``."""
        label, kind = final_model(self._config)
        single = next((name for name in (MIXED, STUDENT) if name in self._branches), None)
        if single is not None:
            return [self._row(label + suffix, kind, self._branches[single].policy, self._branches, samples_step)]
        if len(self._branches) == 1:
            return []
        merged = self.model_of(self.merged_parameters(suffix))
        return [self._row(label + suffix, kind, merged, self._branches, samples_step)]

    def merged_parameters(self, suffix: str = "") -> dict[str, torch.Tensor]:
        """theta*, the merge of the branches as they are now, by Hugging Face names. ``suffix``: of its row's label, by
        which a search is kept: ``search.json``, ``search-equal-steps.json``."""
        branches = {name: branch.full_parameters() for name, branch in self._branches.items()}
        base, recipe = self._base.full_parameters(), self._config.merge
        if recipe.method == "search":

            def model_of(candidate: MergeConfig) -> tuple[Policy, PromptEncoder]:
                return self.model_of(merge(base, branches, candidate)), self._encoder

            found = search(self._config, len(branches), model_of, self._config.eval.final_num_prompts)
            file = Path(SEARCH_FILE)
            named = file.with_stem(run_folder.file_name(file.stem + suffix))
            run_folder.write_json(self._run_dir / named, found.as_json())
            tqdm.write(found.table())
            recipe = found.best
        return merge(base, branches, recipe)

    def model_of(self, tensors: Mapping[str, torch.Tensor]) -> Policy:
        """The plain model with these weights, by Hugging Face names, on the run's device."""
        policy = self._base.with_full_parameters(tensors)
        policy.module.to(self._config.device)
        return policy

    def _row(
        self, label: str, kind: str, policy: Policy, made_of: Iterable[str], samples_step: int | None = None
    ) -> dict[str, Any]:
        """Evaluate a model and save it unless it is the base; ``made_of``: whose training it took."""
        rollout = self._config.rollout
        # It is no expert of the run's own engine.
        engine = EmbeddedEngine({label: policy}, self._encoder, rollout.max_running, rollout.max_cached_tokens)
        accuracies, samples = self._held_out.evaluate(engine, label, self._config.eval.final_num_prompts)
        names = list(made_of)
        if samples_step is not None:
            self._held_out.keep_samples(samples_step, label, samples)
        run_folder.save_scores(self._run_dir, label, samples)
        if kind != "base":
            save_model(policy, self._encoder, self._run_dir / "models" / run_folder.file_name(label))
        return result_row(
            label,
            kind,
            accuracies,
            rollouts=sum(self._steps.rollouts_drawn[name] for name in names),
            steps=sum(self._steps.steps_taken[name] for name in names),
            work=sum((self._steps.work[name] for name in names), Work()),
        )
