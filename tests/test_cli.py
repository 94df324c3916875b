"""The command line: a mistake ends in one line and exit code 2, and nothing on the disk has changed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

import copd_engine.report
from copd_engine import cli
from copd_engine.checkpoint import complete_checkpoints
from copd_engine.trainer import Trainer
from tests.small_run import NUM_ROWS, contents, small_config, train, write_base, write_config, write_data, write_rows


@dataclass
class Site:
    """Everything a command may touch: model, data, config and runs in one folder that is also the working directory."""

    root: Path
    config: dict[str, Any]

    def write(self, **changes: Any) -> str:
        config = {**self.config, **changes}
        return str(write_config(self.root / "config.yaml", config))


SETTINGS: dict[str, Any] = {
    "schedule": {"cycles": 1, "rl_steps": 1, "opd_steps": 1},
    "eval": {"every": 0, "final_num_prompts": 8},
    "checkpoint": {"every": 1, "keep": 2},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A site with a run that has ended, report and all; never changed by a test."""
    root = tmp_path_factory.mktemp("finished")
    config = small_config(write_base(root / "base"), write_data(root / "data"), root / "runs", **SETTINGS)
    config["branches"] = config["branches"][:2]
    for branch in config["branches"]:
        branch["data"]["eval_size"] = 8
    train(config)
    return Site(root, config)


@pytest.fixture
def site(finished: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """A copy of it to spoil."""
    root = tmp_path / "site"
    shutil.copytree(finished.root, root)
    monkeypatch.chdir(root)
    for file in (root / "runs/small").glob("*.yaml"):
        file.write_text(file.read_text().replace(str(finished.root), "."))
    config = json.loads(json.dumps(finished.config).replace(str(finished.root), "."))
    return Site(root, config)


@pytest.fixture
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than the runs."""
    monkeypatch.setattr(copd_engine.report, "write_report", lambda run_dir: run_dir / "report.html")


@dataclass
class Ended:
    code: int
    out: str
    err: str


@pytest.fixture
def copd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    def run(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["copd", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return Ended(0 if ended.value.code is None else int(ended.value.code), out, err)

    return run


def assert_refused(ended: Ended, *says: str) -> None:
    bar, _, last = ended.err.rstrip("\n").rpartition("\n")
    assert ended.code == 2, ended
    assert last.startswith("copd: ")
    assert set(bar.splitlines()) <= {line for line in bar.splitlines() if "Loading weights" in line}
    assert ended.out == ""
    for part in says:
        assert part in last


def first_rows(file: Path, count: int = NUM_ROWS) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()[:count]]


def flip_last_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def change_row(site: Site, **changes: Any) -> None:
    """The third row of the text data; a value of None removes the field."""
    rows = first_rows(site.root / "data/text.jsonl")
    rows[2] = {key: value for key, value in {**rows[2], **changes}.items() if value is not None}
    write_rows(site.root / "data/text.jsonl", rows)


def with_data(site: Site, **changes: Any) -> list[dict[str, Any]]:
    """The branches with other ``data`` in the first."""
    first, *rest = site.config["branches"]
    return [{**first, "data": {**first["data"], **changes}}, *rest]


Bad = Callable[[Site], tuple[list[str], tuple[str, ...]]]


def bad_value(site: Site) -> tuple[list[str], tuple[str, ...]]:
    return ["train", site.write(method="copdd")], ("config.yaml: method = 'copdd': must be one of", "'copd'")


def unknown_key(site: Site) -> tuple[list[str], tuple[str, ...]]:
    return ["train", site.write(shedule={})], ("unknown key 'shedule' (did you mean 'schedule'?)",)


def bad_override(site: Site) -> tuple[list[str], tuple[str, ...]]:
    return ["train", site.write(), "schedule.cycles=none"], ("schedule.cycles = 'none'",)


def broken_yaml(site: Site) -> tuple[list[str], tuple[str, ...]]:
    (site.root / "config.yaml").write_text("a: [\n\n  b: 1\n")
    return ["train", "config.yaml"], ("config config.yaml is not valid YAML",)


def missing_config(_: Site) -> tuple[list[str], tuple[str, ...]]:
    return ["train", "nothing.yaml"], ("config nothing.yaml does not exist",)


def no_config(_: Site) -> tuple[list[str], tuple[str, ...]]:
    return ["train"], ("copd train needs CONFIG", "--resume RUN")


def another_config(site: Site) -> tuple[list[str], tuple[str, ...]]:
    return ["train", site.write(seed=5)], ("runs/small holds a run with another config (seed was 0, is 5)",)


def no_run_folder(site: Site) -> tuple[list[str], tuple[str, ...]]:
    return ["train", site.write(name="data", output_dir=".")], ("data exists and is not a run folder",)


def overwrite_no_run_folder(site: Site) -> tuple[list[str], tuple[str, ...]]:
    arguments = ["train", site.write(name="data", output_dir="."), "--overwrite"]
    return arguments, ("data exists and is not a run folder",)


def resume_nothing(_: Site) -> tuple[list[str], tuple[str, ...]]:
    return ["train", "--resume", "runs/other"], ("runs/other is not a run folder (no config.yaml)",)


def resume_no_run(_: Site) -> tuple[list[str], tuple[str, ...]]:
    return ["train", "--resume", "data"], ("data is not a run folder (no config.yaml)",)


def resume_with_config(site: Site) -> tuple[list[str], tuple[str, ...]]:
    return ["train", site.write(), "--resume", "runs/small"], ("--resume RUN takes the config from the run folder",)


def all_checkpoints_damaged(site: Site) -> tuple[list[str], tuple[str, ...]]:
    (site.root / "runs/small/result.json").unlink()
    for path in complete_checkpoints(site.root / "runs/small/checkpoints"):
        flip_last_byte(path / "optim-image.safetensors")
    says = ("step-000002: optim-image.safetensors is damaged", "no other checkpoint is whole", "--overwrite")
    return ["train", "--resume", "runs/small"], says


def unknown_verifier(site: Site) -> tuple[list[str], tuple[str, ...]]:
    branches = with_data(site, verifier="exakt")
    return ["train", site.write(name="new", branches=branches)], ("branches.0.data.verifier:", "exakt", "'exact'")


def unknown_verifier_in_a_row(site: Site) -> tuple[list[str], tuple[str, ...]]:
    change_row(site, verifier="exakt")
    return ["train", site.write(name="new")], ("text.jsonl:3: verifier:", "'exact'")


def empty_data(site: Site) -> tuple[list[str], tuple[str, ...]]:
    (site.root / "data/text.jsonl").write_text("\n\n")
    return ["train", site.write(name="new")], ("branches.0.data.path:", "text.jsonl is empty")


def missing_data(site: Site) -> tuple[list[str], tuple[str, ...]]:
    (site.root / "data/image.jsonl").unlink()
    return ["train", site.write(name="new")], ("branches.1.data.path:", "image.jsonl does not exist")


def row_without_answer(site: Site) -> tuple[list[str], tuple[str, ...]]:
    change_row(site, answer=None)
    return ["train", site.write(name="new")], ("text.jsonl:3: field 'answer' is missing",)


def missing_picture(site: Site) -> tuple[list[str], tuple[str, ...]]:
    (site.root / "data/image-4.png").unlink()
    return ["train", site.write(name="new")], ("image.jsonl:5: images:", "image-4.png does not exist")


def missing_model(site: Site) -> tuple[list[str], tuple[str, ...]]:
    return ["train", site.write(name="new", model={"path": "bass"})], ("model.path = 'bass': no such folder",)


def folder_that_is_no_model(site: Site) -> tuple[list[str], tuple[str, ...]]:
    return ["train", site.write(name="new", model={"path": "data"})], ("model.path = 'data'", "no config.json")


def model_without_weights(site: Site) -> tuple[list[str], tuple[str, ...]]:
    (site.root / "base/model.safetensors").unlink()
    return ["train", site.write(name="new")], ("model.path = './base': the model cannot be read:",)


def model_with_damaged_weights(site: Site) -> tuple[list[str], tuple[str, ...]]:
    weights = site.root / "base/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    return ["train", site.write(name="new")], ("model.path = './base': the model cannot be read:",)


def model_with_a_missing_weight(site: Site) -> tuple[list[str], tuple[str, ...]]:
    from safetensors.torch import save_file

    tensors = load_file(site.root / "base/model.safetensors")
    del tensors["model.language_model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, site.root / "base/model.safetensors", metadata={"format": "pt"})
    return ["train", site.write(name="new")], ("the weights lack model.language_model.layers.1.mlp.up_proj.weight",)


def model_with_a_broken_config(site: Site) -> tuple[list[str], tuple[str, ...]]:
    (site.root / "base/config.json").write_text("{")
    return ["train", site.write(name="new")], ("model.path = './base': the model cannot be read:",)


def unknown_device(site: Site) -> tuple[list[str], tuple[str, ...]]:
    return ["train", site.write(name="new", device="gpu")], ("device = 'gpu'",)


def output_is_a_file(site: Site) -> tuple[list[str], tuple[str, ...]]:
    return ["train", site.write(output_dir="base/config.json")], ("cannot create the run folder",)


def overwrite_with_bad_data(site: Site) -> tuple[list[str], tuple[str, ...]]:
    change_row(site, answer=None)
    return ["train", site.write(), "--overwrite"], ("text.jsonl:3: field 'answer' is missing",)


def overwrite_with_a_missing_model(site: Site) -> tuple[list[str], tuple[str, ...]]:
    return ["train", site.write(model={"path": "bass"}), "--overwrite"], ("no such folder",)


def eval_missing_model(site: Site) -> tuple[list[str], tuple[str, ...]]:
    return ["eval", "runs/small/models/marged", "--config", site.write()], (
        "'runs/small/models/marged': no such folder",
    )


def eval_missing_config(_: Site) -> tuple[list[str], tuple[str, ...]]:
    return ["eval", "base", "--config", "nothing.yaml"], ("config nothing.yaml does not exist",)


def merge_into_a_folder_that_exists(_: Site) -> tuple[list[str], tuple[str, ...]]:
    arguments = ["merge", "base", "runs/small/models/branch-text", "--out", "runs/small/models/merged"]
    return arguments, ("--out runs/small/models/merged exists already",)


def merge_missing_branch(_: Site) -> tuple[list[str], tuple[str, ...]]:
    return ["merge", "base", "runs/small/models/branch-txt", "--out", "new"], ("no such folder",)


def merge_bad_weight(_: Site) -> tuple[list[str], tuple[str, ...]]:
    return ["merge", "base", "base=much", "--out", "new"], (
        "branch 'base=much': the weight after '=' must be a number",
    )


def merge_weight_of_nan(_: Site) -> tuple[list[str], tuple[str, ...]]:
    return ["merge", "base", "base=nan", "--out", "new"], ("merge weights must be finite",)


def merge_one_branch_twice(_: Site) -> tuple[list[str], tuple[str, ...]]:
    return ["merge", "base", "base", "base=2", "--out", "new"], ("branch 'base' is named twice",)


def report_of_nothing(_: Site) -> tuple[list[str], tuple[str, ...]]:
    return ["report", "runs/other"], ("run folder runs/other does not exist",)


def report_of_no_run(_: Site) -> tuple[list[str], tuple[str, ...]]:
    return ["report", "data"], ("data is not a run folder: it has no metrics.jsonl",)


def build_into_a_folder_that_exists(_: Site) -> tuple[list[str], tuple[str, ...]]:
    return ["testbed", "build", "base"], ("base exists already; name a new folder",)


BAD: list[Bad] = [
    bad_value,
    unknown_key,
    bad_override,
    broken_yaml,
    missing_config,
    no_config,
    another_config,
    no_run_folder,
    overwrite_no_run_folder,
    resume_nothing,
    resume_no_run,
    resume_with_config,
    all_checkpoints_damaged,
    unknown_verifier,
    unknown_verifier_in_a_row,
    empty_data,
    missing_data,
    row_without_answer,
    missing_picture,
    missing_model,
    folder_that_is_no_model,
    model_without_weights,
    model_with_damaged_weights,
    model_with_a_missing_weight,
    model_with_a_broken_config,
    unknown_device,
    output_is_a_file,
    overwrite_with_bad_data,
    overwrite_with_a_missing_model,
    eval_missing_model,
    eval_missing_config,
    merge_into_a_folder_that_exists,
    merge_missing_branch,
    merge_bad_weight,
    merge_weight_of_nan,
    merge_one_branch_twice,
    report_of_nothing,
    report_of_no_run,
    build_into_a_folder_that_exists,
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.__name__)
def test_bad_input_is_one_line_and_changes_nothing(site: Site, copd: Callable[..., Ended], bad: Bad) -> None:
    arguments, says = bad(site)
    before = contents(site.root)
    assert_refused(copd(*arguments), *says)
    assert contents(site.root) == before


def test_bad_input_in_a_process_of_its_own(site: Site) -> None:
    """The very text and exit code that a user sees."""
    arguments, says = row_without_answer(site)
    before = contents(site.root)
    start = [sys.executable, "-c", "from copd_engine.cli import main; main()"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    ended = subprocess.run([*start, *arguments], capture_output=True, text=True, check=False, env=environment)
    assert_refused(Ended(ended.returncode, ended.stdout, ended.stderr), *says)
    assert contents(site.root) == before


@pytest.mark.usefixtures("_no_figures")
def test_after_a_mistake_in_the_data_the_corrected_config_may_use_the_folder(
    site: Site, copd: Callable[..., Ended]
) -> None:
    assert copd("train", site.write(name="new", branches=with_data(site, verifier="exakt"))).code == 2
    assert copd("train", site.write(name="new", branches=with_data(site, verifier="exact"))).code == 0
    assert (site.root / "runs/new/result.json").is_file()


def test_a_finished_run_is_shown_again_and_not_trained(
    site: Site, copd: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_training(*_: object) -> None:
        raise AssertionError("trains")

    monkeypatch.setattr(Trainer, "__init__", no_training)
    before = contents(site.root / "runs")
    shown = [
        copd("train", site.write()),
        copd("train", "--resume", "runs/small"),
        copd("train", site.write(name="small")),
    ]
    assert contents(site.root / "runs") == before
    for ended in shown:
        assert ended.code == 0
        assert ended.out == shown[0].out
        for model in ("base", "branch:text", "branch:image", "merged"):
            assert model in ended.out
        assert "report: runs/small/report.html" in ended.out


def test_a_finished_run_without_its_report_gets_one(site: Site, copd: Callable[..., Ended]) -> None:
    """As a kill between the two leaves it."""
    (site.root / "runs/small/report.html").unlink()
    assert copd("train", "--resume", "runs/small").code == 0
    assert (site.root / "runs/small/report.html").stat().st_size > 1000


@pytest.mark.usefixtures("_no_figures")
def test_overwrite_trains_again(site: Site, copd: Callable[..., Ended]) -> None:
    (site.root / "runs/small/old-note.txt").write_text("of the old run")
    before = contents(site.root / "runs/small/models")
    assert copd("train", site.write(seed=5), "--overwrite").code == 0
    assert not (site.root / "runs/small/old-note.txt").exists()
    assert yaml.safe_load((site.root / "runs/small/config.yaml").read_text())["seed"] == 5
    after = contents(site.root / "runs/small/models")
    assert after.keys() == before.keys()
    assert after["merged/model.safetensors"] != before["merged/model.safetensors"]


@pytest.mark.usefixtures("_no_figures")
def test_the_newest_checkpoint_is_damaged(
    site: Site, copd: Callable[..., Ended], caplog: pytest.LogCaptureFixture
) -> None:
    """It is passed over for the older one, said so, and the run ends with the same weights."""
    run = site.root / "runs/small"
    before = contents(run / "models")
    (run / "result.json").unlink()
    shutil.rmtree(run / "models")
    flip_last_byte(run / "checkpoints/step-000002/model-text.safetensors")
    assert copd("train", site.write()).code == 0
    assert contents(run / "models") == before
    (warning,) = [record.getMessage() for record in caplog.records if "checkpoint" in record.getMessage()]
    assert "step-000002: model-text.safetensors is damaged" in warning
    assert "going on from step-000001" in warning


def test_a_divergence_ends_the_command_with_its_last_checkpoint(
    site: Site, copd: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    from copd_engine.branch import Branch

    score = Branch.score
    monkeypatch.setattr(Branch, "score", lambda self, rollouts: [s * float("nan") for s in score(self, rollouts)])
    schedule = {"cycles": 1, "rl_steps": 2, "opd_steps": 12}
    config = site.write(name="new", schedule=schedule, checkpoint={"every": 2})
    ended = copd("train", config)
    assert ended.code == 2
    last = ended.err.rstrip("\n").split("\n")[-1]
    assert last == (
        "copd: branch 'text': 10 updates in a row had a NaN or infinite loss or gradient; stopped. "
        "Last checkpoint: runs/new/checkpoints/step-000010"
    )


# The other commands


def test_eval_gives_the_accuracies_of_the_result(site: Site, copd: Callable[..., Ended]) -> None:
    rows = json.loads((site.root / "runs/small/result.json").read_text())["rows"]
    best = max((row for row in rows if row["kind"] == "branch"), key=lambda row: row["accuracy"]["average"])
    accuracy = best["accuracy"]
    assert accuracy["average"] > 0
    folder = f"runs/small/models/{best['model'].replace(':', '-')}"
    ended = copd("eval", folder, "--config", "runs/small/config.yaml")
    assert ended.code == 0
    (line,) = [line for line in ended.out.splitlines() if line.startswith(folder)]
    shown = [float(value) for value in re.findall(r"([0-9.]+) ±", line)]
    assert shown == pytest.approx([100 * accuracy[key] for key in ("text", "image", "average")], abs=0.05)
    assert "8 held-out prompts per domain" in ended.out
    wider = copd("eval", "base", "--config", "runs/small/config.yaml", "--num-prompts", "3", "seed=4")
    assert wider.code == 0
    assert "3 held-out prompts per domain" in wider.out
    assert copd("eval", "base", "--config", "runs/small/config.yaml", "--num-prompts", "0").code == 2


def test_merge_weighs_the_changes(site: Site, copd: Callable[..., Ended]) -> None:
    text, image = (f"runs/small/models/branch-{name}" for name in ("text", "image"))
    shutil.copytree(site.root / image, site.root / "a=b")
    assert copd("merge", "base", text, image, "--out", "mean").code == 0
    ended = copd("merge", "base", f"{text}=3", "a=b", "--out", "deep/weighted")
    assert ended.code == 0
    assert "merged 2 branches into deep/weighted" in ended.out
    base, one, two, mean, weighted = (
        load_file(site.root / folder / "model.safetensors") for folder in ("base", text, image, "mean", "deep/weighted")
    )
    for name, start in base.items():
        first, second = one[name].double() - start.double(), two[name].double() - start.double()
        assert (mean[name] - (start + (first + second) / 2)).abs().max() < 1e-6
        assert (weighted[name] - (start + (3 * first + second) / 4)).abs().max() < 1e-6
    assert (
        contents(site.root / "mean")["model.safetensors"]
        == (site.root / "runs/small/models/merged/model.safetensors").read_bytes()
    )
    assert copd("eval", "deep/weighted", "--config", site.write()).code == 0


def test_report_is_written_again(site: Site, copd: Callable[..., Ended]) -> None:
    (site.root / "runs/small/report.html").unlink()
    ended = copd("report", "runs/small")
    assert ended.code == 0
    assert ended.out == "report: runs/small/report.html\n"
    text = (site.root / "runs/small/report.html").read_text()
    assert "branch:text" in text


@pytest.mark.usefixtures("_no_figures")
def test_the_result_names_the_command(site: Site, copd: Callable[..., Ended]) -> None:
    assert copd("train", site.write(), "name=new run").code == 0
    result = json.loads((site.root / "runs/new run/result.json").read_text())
    assert result["command"] == f"copd train {site.root / 'config.yaml'} 'name=new run'"


@pytest.mark.parametrize("command", [[], ["train"], ["eval"], ["merge"], ["report"], ["testbed"]])
def test_help(copd: Callable[..., Ended], command: list[str]) -> None:
    ended = copd(*command, "--help")
    assert ended.code == 0
    assert "Usage: " in ended.out
