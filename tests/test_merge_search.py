"""The search for a merge, in the trainer and on the command line; what the merged model keeps."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import copd_engine.merge.command
from copd_engine.algorithms import EQUAL_FLOPS, EQUAL_STEPS
from copd_engine.config import MergeConfig, build_config
from copd_engine.evaluate import Accuracy, evaluate
from copd_engine.merge import merge
from copd_engine.merge.search import Search, Tried, grid, search
from copd_engine.model_rows import ModelRows
from copd_engine.models.base import Policy
from copd_engine.prompts import HeldOutPrompts
from copd_engine.rollout.base import Sampling
from copd_engine.rollout.embedded import EmbeddedEngine
from copd_engine.step import derive_seed
from copd_engine.validation import validation_examples
from tests import cli_site
from tests.cli_site import Ended, Site
from tests.helpers import tiny_model

finished, site, copd, _no_figures = cli_site.finished, cli_site.site, cli_site.copd, cli_site._no_figures
MODELS = [f"runs/small/models/branch-{name}" for name in ("text", "image")]


def tried(recipe: MergeConfig, *means: float) -> Tried:
    return Tried(recipe, {f"domain{i}": Accuracy(mean, 0.01, 50) for i, mean in enumerate(means)})


def test_the_grid_begins_with_the_papers_merge_and_repeats_nothing():
    recipes = grid(3)
    assert recipes[0] == MergeConfig()
    assert len({str(recipe) for recipe in recipes}) == len(recipes) == 13
    # Task arithmetic is about the mean, whose scale would be 1 / K.
    scales = [recipe.factor * 3 for recipe in recipes if recipe.method == "task_arithmetic"]
    assert scales == pytest.approx([0.75, 1.25, 1.5, 2.0])


def test_the_best_is_the_first_of_the_highest_averages():
    one, two, three, four = grid(2)[:4]
    found = Search([tried(one, 0.5, 0.5), tried(two, 0.25, 1.0), tried(three, 1.0, 0.25), tried(four, 0.75, 0.25)])
    assert found.best == two
    order = [line.split("  ")[0] for line in found.table().splitlines()[1:5]]
    assert order == [str(recipe) for recipe in (two, three, one, four)]
    assert "62.5 ±0.7" in found.table().splitlines()[1]
    assert "50 validation prompts per domain" in found.table()
    rows = found.as_json()["rows"]
    assert [row["accuracy"]["average"] for row in rows] == [0.5, 0.625, 0.625, 0.5]
    assert found.as_json()["best"] == {"method": "task_arithmetic", "scale": 0.375}


def test_every_recipe_is_evaluated_on_the_validation_prompts_one_model_at_a_time():
    config = build_config(
        {
            "branches": [{"name": name, "data": {"domain": name}} for name in ("text", "image")],
            "rollout": {"max_new_tokens": 6},
            "seed": 3,
        }
    )
    alive: list[weakref.ref[Policy]] = []
    given = []

    def model_of(recipe: MergeConfig):
        gc.collect()
        assert not any(ref() for ref in alive)
        policy, encoder = tiny_model(seed=len(alive))
        alive.append(weakref.ref(policy))
        given.append(recipe)
        return policy, encoder

    found = search(config, 2, model_of, num_prompts=5)
    assert given == grid(2) == [row.recipe for row in found.tried]
    policy, encoder = tiny_model(seed=7)
    prompts = {
        branch.name: HeldOutPrompts(validation_examples(branch.data, 5, ""), branch.data, encoder, 16_384, 5)
        for branch in config.branches
    }
    engine = EmbeddedEngine({"x": policy}, encoder, 256, 262_144)
    expected = evaluate(engine, "x", prompts, Sampling(1.0, 6), derive_seed(3, "validation"))[0]
    assert found.tried[7].accuracies == expected
    assert {a.num_prompts for a in expected.values()} == {5}


# The command


@pytest.mark.parametrize("method", ["ties", "dare_ties", "dare", "task_arithmetic"])
def test_the_command_merges_by_any_method_streamed_or_in_memory(
    site: Site, copd: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    options = ["--method", method, "--scale", "0.7"]
    options += [] if method == "task_arithmetic" else ["--density", "0.3"]
    options += ["--seed", "4"] if method.startswith("dare") else []
    ended = copd("merge", "base", *MODELS, "--out", "streamed", *options)
    assert ended.code == 0, ended
    density = "" if method == "task_arithmetic" else "density 0.3 "
    assert f"merged 2 branches into streamed ({method} {density}scale 0.7)" in ended.out
    monkeypatch.setattr(copd_engine.merge.command, "weight_folder", lambda path: None)
    ended = copd("merge", "base", *MODELS, "--out", "loaded", *options)
    assert "all of them in memory" in ended.out
    one, two, base = (load_file(site.root / f"{folder}/model.safetensors") for folder in ("streamed", "loaded", "base"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], base[name]) for name in one)


def test_search_and_retention_of_the_command(site: Site, copd: Callable[..., Ended]) -> None:
    ended = copd("merge", "base", *MODELS, "--out", "found", "--search", "--retention", "--config", site.write())
    assert ended.code == 0, ended
    record = json.loads((site.root / "found/search.json").read_text())
    assert len(record["rows"]) == len(grid(2))
    averages = [row["accuracy"]["average"] for row in record["rows"]]
    assert record["best"] == record["rows"][averages.index(max(averages))]["recipe"]
    shown = ended.out.splitlines()
    assert shown[0].split() == ["merge", "text", "image", "average"]
    assert f"{100 * max(averages):.1f}" in shown[1]
    assert not [path.name for path in site.root.iterdir() if path.name.startswith(".")]
    # The model is the best recipe's.
    best = record["best"]
    options = [part for key, value in best.items() for part in (f"--{key}", str(value))]
    assert copd("merge", "base", *MODELS, "--out", "again", *options).code == 0
    one, two = (load_file(site.root / f"{folder}/model.safetensors") for folder in ("found", "again"))
    assert all(torch.equal(one[name], two[name]) for name in two)
    assert "paired by prompt" in ended.out


def test_retention_of_the_command_is_that_of_the_runs_result(
    site: Site, copd: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a search: same prompts, same draws, so the same accuracies."""
    seeds = []

    def watched(*arguments: Any) -> Any:
        seeds.append(arguments[4])
        return evaluate(*arguments)

    monkeypatch.setattr(copd_engine.merge.command, "evaluate", watched)
    ended = copd("merge", "base", *MODELS, "--out", "mean", "--retention", "--config", "runs/small/config.yaml")
    assert ended.code == 0, ended
    assert seeds == [derive_seed(0, "eval")] * 3  # as in the trainer; so few prompts would not show it
    rows = {row["model"]: row for row in json.loads((site.root / "runs/small/result.json").read_text())["rows"]}
    lines = {line.split()[0]: line.split() for line in ended.out.splitlines() if line.startswith("branch:")}
    assert set(lines) == {"branch:text", "branch:image"}
    for name, (_, had, label, has, *_) in lines.items():
        domain = name.partition(":")[2]
        assert label == "merged"
        assert had == f"{100 * rows[name]['accuracy'][domain]:.1f}"
        assert has == f"{100 * rows['merged']['accuracy'][domain]:.1f}"


def test_every_row_keeps_its_own_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run may merge more than once: at equal steps, at its end, at equal FLOPs."""
    recipes = iter(grid(2)[:3])
    monkeypatch.setattr("copd_engine.model_rows.search", lambda *_: Search([tried(next(recipes), 0.5)]))
    config = build_config(
        {
            "branches": [{"name": name, "data": {"domain": name}} for name in ("text", "image")],
            "merge": {"method": "search"},
        }
    )
    model = SimpleNamespace(full_parameters=dict)
    rows = ModelRows(config, tmp_path, model, None, {"text": model, "image": model}, None, None)  # type: ignore[arg-type]
    for suffix in (EQUAL_STEPS, "", EQUAL_FLOPS):
        assert rows.merged_parameters(suffix) == {}
    files = ["search-equal-steps.json", "search.json", "search-equal-FLOPs.json"]
    assert {path.name for path in tmp_path.iterdir()} == set(files)
    found = [MergeConfig(**json.loads((tmp_path / name).read_text())["best"]) for name in files]
    assert found == grid(2)[:3]


@pytest.mark.usefixtures("_no_figures")
def test_a_run_that_searches_its_merge(site: Site, copd: Callable[..., Ended]) -> None:
    ended = copd("train", site.write(name="searched", merge={"method": "search"}, schedule={"cycles": 1}))
    assert ended.code == 0, ended
    run = site.root / "runs/searched"
    record = json.loads((run / "search.json").read_text())
    branches = {name: load_file(run / f"models/branch-{name}/model.safetensors") for name in ("text", "image")}
    again = merge(load_file(site.root / "base/model.safetensors"), branches, MergeConfig(**record["best"]))
    merged = load_file(run / "models/merged/model.safetensors")
    assert merged.keys() == again.keys()
    assert all(torch.equal(merged[name], again[name]) for name in merged)
    # Rows of the tables are no validation rows.
    num_prompts = {row["num_prompts"] for row in json.loads((run / "result.json").read_text())["rows"]}
    assert max(num_prompts) < 8
    assert "on its own domain" in ended.out
    assert "± standard error of the difference, paired by prompt" in ended.out
