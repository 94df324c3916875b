"""The command line: a mistake ends in one line and exit code 2, and nothing on the disk has changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from copd_engine.checkpoint import complete_checkpoints
from tests import cli_site
from tests.cli_site import Ended, Site, flip_last_byte
from tests.small_run import NUM_ROWS, contents, write_rows

finished, site, copd, _no_figures = cli_site.finished, cli_site.site, cli_site.copd, cli_site._no_figures


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


def no_config_but_an_override(_: Site) -> tuple[list[str], tuple[str, ...]]:
    return ["train", "model.path=testbed"], ("needs CONFIG before model.path=testbed", "configs/demo.yaml")


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


def merge_density_of_mean(_: Site) -> tuple[list[str], tuple[str, ...]]:
    return ["merge", "base", "base", "--out", "new", "--density", "0.5"], ("method 'mean' takes no 'density'",)


def merge_unknown_method(_: Site) -> tuple[list[str], tuple[str, ...]]:
    return ["merge", "base", "base", "--out", "new", "--method", "tie"], ("--method tie: input should be 'mean'",)


def merge_bad_density(_: Site) -> tuple[list[str], tuple[str, ...]]:
    arguments = ["merge", "base", "base", "--out", "new", "--method", "ties", "--density", "1.5"]
    return arguments, ("--density 1.5: input should be less than or equal to 1",)


def merge_weights_of_ties(_: Site) -> tuple[list[str], tuple[str, ...]]:
    return ["merge", "base", "base=2", "--out", "new", "--method", "ties"], ("go with --method weighted",)


def merge_weighted_without_weights(_: Site) -> tuple[list[str], tuple[str, ...]]:
    return ["merge", "base", "base", "--out", "new", "--method", "weighted"], ("which needs them",)


def merge_search_without_config(_: Site) -> tuple[list[str], tuple[str, ...]]:
    return ["merge", "base", "base", "--out", "new", "--search"], ("--search and --retention need --config CONFIG",)


def merge_search_with_a_method(site: Site) -> tuple[list[str], tuple[str, ...]]:
    arguments = ["merge", "base", "base", "--out", "new", "--search", "--config", site.write(), "--method", "ties"]
    return arguments, ("--search chooses the method: leave out --method",)


def merge_search_with_weights(site: Site) -> tuple[list[str], tuple[str, ...]]:
    arguments = ["merge", "base", "base=2", "--out", "new", "--search", "--config", site.write()]
    return arguments, ("--search takes no weights",)


def merge_retention_of_unknown_branches(site: Site) -> tuple[list[str], tuple[str, ...]]:
    arguments = ["merge", "base", "base", "--out", "new", "--retention", "--config", site.write()]
    return arguments, ("--retention: base must be the folder of one branch of the config, named branch-text",)


def merge_damaged_shard(site: Site) -> tuple[list[str], tuple[str, ...]]:
    file = site.root / "runs/small/models/branch-text/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    return ["merge", "base", "runs/small/models/branch-text", "--out", "new"], ("model.safetensors cannot be read",)


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
    no_config_but_an_override,
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
    merge_density_of_mean,
    merge_unknown_method,
    merge_bad_density,
    merge_weights_of_ties,
    merge_weighted_without_weights,
    merge_search_without_config,
    merge_search_with_a_method,
    merge_search_with_weights,
    merge_retention_of_unknown_branches,
    merge_damaged_shard,
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
