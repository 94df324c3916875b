"""The search for a merge: a small grid of methods, each model evaluated on validation prompts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from copd_engine.config import MergeConfig, RunConfig
from copd_engine.evaluate import Accuracy, average, evaluate
from copd_engine.models.base import Policy, PromptEncoder
from copd_engine.prompts import HeldOutPrompts
from copd_engine.rollout.base import Sampling
from copd_engine.rollout.embedded import EmbeddedEngine
from copd_engine.step import derive_seed
from copd_engine.validation import validation_examples

SEARCH_FILE = "search.json"
#: ``scale`` of task arithmetic times K: how far beyond the mean, or short of it.
MEANS = (0.75, 1.25, 1.5, 2.0)
TIES = ((0.2, 1.0), (0.2, 1.5), (0.5, 1.0), (0.5, 1.5))
DARE = ((0.5, 1.0), (0.5, 1.5))


def grid(num_branches: int) -> list[MergeConfig]:
    """What is tried, the simpler before the less simple."""
    recipes = [MergeConfig()]
    recipes += [MergeConfig(method="task_arithmetic", scale=factor / num_branches) for factor in MEANS]
    recipes += [MergeConfig(method="ties", density=density, scale=scale) for density, scale in TIES]
    recipes += [MergeConfig(method="dare", density=density, scale=scale) for density, scale in DARE]
    recipes += [MergeConfig(method="dare_ties", density=density, scale=scale) for density, scale in DARE]
    return recipes


@dataclass(frozen=True)
class Tried:
    recipe: MergeConfig
    accuracies: Mapping[str, Accuracy]

    @property
    def average(self) -> Accuracy:
        return average(self.accuracies)


@dataclass(frozen=True)
class Search:
    """Every recipe with its accuracy per domain on the validation prompts, in the order of the grid."""

    tried: list[Tried]

    @property
    def best(self) -> MergeConfig:
        """The highest average over the domains; of equal ones the first of the grid."""
        return max(self.tried, key=lambda tried: tried.average.mean).recipe

    def as_json(self) -> dict[str, Any]:
        rows = [
            {
                "recipe": _settings(tried.recipe),
                "accuracy": {domain: a.mean for domain, a in tried.accuracies.items()}
                | {"average": tried.average.mean},
                "stderr": {domain: a.stderr for domain, a in tried.accuracies.items()}
                | {"average": tried.average.stderr},
                "num_prompts": {domain: a.num_prompts for domain, a in tried.accuracies.items()},
            }
            for tried in self.tried
        ]
        return {"best": _settings(self.best), "rows": rows}

    def table(self) -> str:
        """Accuracy in percent, the best first."""
        domains = list(self.tried[0].accuracies)
        ranked = sorted(self.tried, key=lambda tried: -tried.average.mean)  # stable: equal ones as in the grid
        lines = [["merge", *domains, "average"]]
        for tried in ranked:
            means = [tried.accuracies[domain].mean for domain in domains]
            last = f"{100 * tried.average.mean:.1f} ±{100 * tried.average.stderr:.1f}"
            lines.append([str(tried.recipe), *(f"{100 * mean:.1f}" for mean in means), last])
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        text = [
            "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
            for line in lines
        ]
        counts = sorted({a.num_prompts for a in self.tried[0].accuracies.values()})
        return "\n".join([*text, f"accuracy in % on {'-'.join(map(str, counts))} validation prompts per domain"])


def search(
    config: RunConfig,
    num_branches: int,
    model_of: Callable[[MergeConfig], tuple[Policy, PromptEncoder]],
    num_prompts: int,
) -> Search:
    """Evaluate every recipe of the grid on ``num_prompts`` validation prompts per branch of ``config``.

    ``model_of`` gives the merged model; one at a time is held. All get the same prompts and draws.
    """
    prompts: dict[str, HeldOutPrompts] = {}
    sampling = Sampling(config.rollout.temperature, config.rollout.max_new_tokens)
    tried: list[Tried] = []
    seed = derive_seed(config.seed, "validation")
    for recipe in tqdm(grid(num_branches), desc="merge search", unit="model", dynamic_ncols=True):
        policy, encoder = model_of(recipe)
        prompts = prompts or _prompts(config, encoder, num_prompts)
        engine = EmbeddedEngine(
            {"merged": policy}, encoder, config.rollout.max_running, config.rollout.max_cached_tokens
        )
        tried.append(Tried(recipe, evaluate(engine, "merged", prompts, sampling, seed)[0]))
        del policy, engine  # before the next one is made
    return Search(tried)


def _prompts(config: RunConfig, encoder: PromptEncoder, count: int) -> dict[str, HeldOutPrompts]:
    max_tokens = config.rollout.max_prompt_tokens
    return {
        branch.name: HeldOutPrompts(
            validation_examples(branch.data, count, f"branches.{number}.data"), branch.data, encoder, max_tokens, count
        )
        for number, branch in enumerate(config.branches)
    }


def _settings(recipe: MergeConfig) -> dict[str, Any]:
    """As it stands in a config: without what is not set."""
    settings: dict[str, Any] = json.loads(recipe.model_dump_json(exclude_none=True, exclude_defaults=True))
    return {"method": recipe.method} | settings
