"""The command line: ``copd train | eval | eval-table | merge | report | study | plan | data check | testbed build``.

A mistake in the input ends in one line on standard error and exit code 2; nothing is overwritten.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from copd_engine import run_folder
from copd_engine.config import load_config
from copd_engine.types import UserError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
testbed_app = typer.Typer(no_args_is_help=True, help="The testbed: tiny tasks and a tiny Qwen3-VL.")
app.add_typer(testbed_app, name="testbed")
data_app = typer.Typer(no_args_is_help=True, help="Data files.")
app.add_typer(data_app, name="data")


@app.command()
def train(
    config: Annotated[Path | None, typer.Argument(help="YAML file, e.g. configs/demo.yaml")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. schedule.cycles=2")] = None,
    resume: Annotated[Path | None, typer.Option(help="Continue the run in this folder.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Delete the run folder first.")] = False,
) -> None:
    """Train, evaluate and merge; writes a run folder with a report. A run that was stopped goes on where it was."""
    if resume is not None:
        if config is not None or overwrite:
            raise UserError("--resume RUN takes the config from the run folder: leave out CONFIG and --overwrite")
        if not (resume / run_folder.CONFIG).is_file():
            raise UserError(f"{resume} is not a run folder (no {run_folder.CONFIG})")
        settings, run_dir = load_config(resume / run_folder.CONFIG), resume
    else:
        if config is None:
            raise UserError("copd train needs CONFIG, e.g. configs/demo.yaml, or --resume RUN")
        if "=" in str(config) and not config.exists():
            raise UserError(f"copd train needs CONFIG before {config}, e.g. copd train configs/demo.yaml {config}")
        settings = load_config(config, overrides)
        run_dir = run_folder.run_dir_of(settings)
    from copd_engine.runs import run_with_baselines

    result = run_with_baselines(settings, run_dir, overwrite, _command())
    _print_result(run_dir, result)


@app.command("eval")
def evaluate_model(
    model: Annotated[str, typer.Argument(help="Hugging Face folder, e.g. runs/demo/models/merged, or 'testbed'")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value")] = None,
    config: Annotated[Path | None, typer.Option(help="Run config: held-out prompts, lengths, limits, engine.")] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="BENCHMARK=PATH, or a file of docs/data.md; may be repeated.")
    ] = None,
    num_prompts: Annotated[int | None, typer.Option(min=1, help="The first so many prompts of each.")] = None,
    num_samples: Annotated[int, typer.Option(min=1, help="Responses to each prompt.")] = 1,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="0 takes the most likely token.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest response.")] = None,
    engine: Annotated[Literal["auto", "embedded", "sglang"] | None, typer.Option(help="Rollout engine.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Equal seeds give equal draws for all models.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for all outputs and scores; goes on where it was.")] = None,
) -> None:
    """Scores of a model on benchmarks (docs/eval.md), or on the held-out prompts of a config's branches."""
    if config is None and not data:
        raise UserError("copd eval needs --data, e.g. --data aime_2024=aime.parquet, or --config")
    from copd_engine.evaluation.run import eval_config, report

    changes = {"engine": engine, "seed": seed, "temperature": temperature, "max_new_tokens": max_new_tokens}
    settings = eval_config(model, config, overrides or [], changes)
    typer.echo(report(settings, data or [], num_samples, num_prompts, out, _command()))


@app.command("eval-table")
def evaluation_table(
    folders: Annotated[list[Path], typer.Argument(help="Folders of copd eval; the first is compared with.")],
    out: Annotated[Path | None, typer.Option(help="Write it there too.")] = None,
) -> None:
    """Evaluated models in one Markdown table, with paired differences to the first."""
    from copd_engine.evaluation.compare import compare

    table = compare(folders)
    if out is not None:
        out.write_text(table + "\n", encoding="utf-8")
    typer.echo(table)


@app.command("merge")
def merge_models(
    base: Annotated[str, typer.Argument(help="Base model: Hugging Face folder, 'testbed' or 'smollm2'")],
    branches: Annotated[list[str], typer.Argument(help="Branch models, optionally FOLDER=WEIGHT")],
    out: Annotated[Path, typer.Option(help="Folder for the merged model; must not exist.")],
    method: Annotated[
        str | None, typer.Option(help="mean, weighted, task_arithmetic, ties, dare or dare_ties (docs/merge.md).")
    ] = None,
    density: Annotated[float | None, typer.Option(help="Share of the changes that ties and dare keep.")] = None,
    scale: Annotated[float | None, typer.Option(help="Factor of what is added to the base.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of dare's draws.")] = None,
    search: Annotated[bool, typer.Option(help="Choose the method on validation prompts of CONFIG.")] = False,
    retention: Annotated[bool, typer.Option(help="Show what the merged model keeps of each branch.")] = False,
    config: Annotated[Path | None, typer.Option(help="The run config whose prompts are used.")] = None,
    num_prompts: Annotated[int | None, typer.Option(min=1, help="Prompts per branch.")] = None,
) -> None:
    """theta_0 + the (weighted) mean of the branches' changes, or another merge, saved in Hugging Face format."""
    from copd_engine.merge.command import Judge, MergeModels, recipe_of, run

    if out.exists():
        raise UserError(f"--out {out} exists already; name a new folder")
    if (search or retention) != (config is not None):
        raise UserError("--search and --retention need --config CONFIG, and only they take it")
    if search and (method, density, scale, seed) != (None,) * 4:
        raise UserError("--search chooses the method: leave out --method, --density, --scale and --seed")
    settings = load_config(config, ["merge={method: search}"] if search else []) if config else None
    models = MergeModels.open(base, branches)
    recipe = recipe_of(method, models.weights, density=density, scale=scale, seed=seed)
    typer.echo(run(models, out, recipe, Judge(settings, num_prompts) if settings else None, search, retention))


@app.command()
def report(run: Annotated[Path, typer.Argument(help="Run folder, e.g. runs/demo")]) -> None:
    """(Re)write RUN/report.html and its figures."""
    from copd_engine.report import write_report

    typer.echo(f"report: {write_report(run)}")


@app.command("study")
def run_a_study(
    config: Annotated[Path, typer.Argument(help="YAML file of a study, e.g. configs/testbed.yaml (docs/study.md)")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. name=mine")] = None,
    fast: Annotated[bool, typer.Option(help="The config's short version, to see that all of it runs.")] = False,
    markdown: Annotated[Path | None, typer.Option(help="Write the page there too, its figures beside it.")] = None,
) -> None:
    """Methods x seeds, and one page of what was measured. One that was stopped goes on where it was."""
    from copd_engine.study.config import load_study
    from copd_engine.study.page import write_page
    from copd_engine.study.run import run_study

    study = load_study(config, overrides, fast)
    try:
        errors = run_study(study, _command(), fast)
    except KeyboardInterrupt:
        typer.echo("copd: stopped; the same command goes on", err=True)
        raise typer.Exit(130) from None
    typer.echo(f"page: {write_page(study, _command(), errors, markdown, fast)}")
    for unit, error in errors.items():
        typer.echo(f"copd: {unit} failed: {error}", err=True)
    if errors:
        raise typer.Exit(1)


@app.command("plan")
def plan_memory(
    config: Annotated[Path, typer.Argument(help="YAML file, e.g. configs/qwen3_vl.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. model.dtype=bfloat16")] = None,
    gpus: Annotated[int | None, typer.Option(help="How many GPUs; default those of this machine.")] = None,
    gpu_memory: Annotated[float | None, typer.Option(help="Memory of one in GB (10^9 bytes).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Numbers in bytes instead of tables.")] = False,
) -> None:
    """What a run holds in GPU memory, whether it fits, and what a step moves. Arithmetic: nothing is run or loaded."""
    settings = load_config(config, overrides)
    from copd_engine.plan_text import plan_json, plan_text

    typer.echo((plan_json if as_json else plan_text)(settings, gpus, gpu_memory))


@data_app.command("check")
def check_data(
    file: Annotated[Path, typer.Argument(help="JSONL or Parquet file, or a folder of Parquet files.")],
    model: Annotated[str | None, typer.Option(help="Count tokens as this model would (without its weights).")] = None,
    columns: Annotated[
        list[str] | None, typer.Option(help="ours=theirs, e.g. prompt=problem,answer=solution; may be repeated.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="A run config that reads FILE: its section, model, limits.")
    ] = None,
) -> None:
    """Read every row, decode its media; prints counts, a histogram of lengths and what fails (exit code 1)."""
    from copd_engine.data_check import check

    report = check(file, model, columns or [], load_config(config) if config else None)
    typer.echo(report.text())
    if report.failures:
        raise typer.Exit(1)


@testbed_app.command("build")
def build_testbed(
    out: Annotated[Path, typer.Argument(help="Folder for the base checkpoint; must not exist.")],
    seed: Annotated[int | None, typer.Option(help="Seed of weights and data.")] = None,
    hidden_size: Annotated[int | None, typer.Option(help="Width, a multiple of 32.")] = None,
    num_layers: Annotated[int | None, typer.Option(min=1, help="Decoder layers.")] = None,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Give up after so many steps.")] = None,
    band: Annotated[tuple[float, float] | None, typer.Option(help="Accuracy to end with, low and high.")] = None,
) -> None:
    """Make the testbed's base checkpoint from its seed. Without options: the one that ships with the project."""
    import torch

    from copd_engine.testbed.build import BuildSettings, build

    if out.exists():
        raise UserError(f"{out} exists already; name a new folder")
    if hidden_size is not None and (hidden_size < 32 or hidden_size % 32):
        raise UserError(f"--hidden-size {hidden_size}: must be a multiple of 32")
    torch.set_num_threads(1)  # the numbers must not depend on how many cores the machine has
    given: dict[str, Any] = {
        "seed": seed, "hidden_size": hidden_size, "num_layers": num_layers, "max_steps": max_steps, "band": band
    }  # fmt: skip
    accuracy = build(BuildSettings(**{key: value for key, value in given.items() if value is not None}), out)
    typer.echo(f"{out}: " + ", ".join(f"{domain} {value:.2f}" for domain, value in accuracy.items()))


def _print_result(run_dir: Path, result: dict[str, Any]) -> None:
    from copd_engine.report import result_table, retention_table

    typer.echo()
    typer.echo(result_table(result))
    if kept := retention_table(result):
        typer.echo(f"\n{kept}\n")
    typer.echo(f"models: {run_dir / 'models'}")
    typer.echo(f"report: {run_dir / 'report.html'}")


def _command() -> str:
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def main() -> None:
    """Entry point: runs a command; a :class:`UserError` becomes one line and exit code 2."""
    if os.getcwd() not in sys.path:  # of a console script it is not there, and the user's own verifiers may be
        sys.path.append(os.getcwd())
    try:
        app()
    except UserError as error:
        typer.echo(f"copd: {' '.join(str(error).split())}", err=True)
        sys.exit(2)
