"""A run beside its baselines, and who may train in a folder."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
from pathlib import Path

import pytest

from copd_engine.config import RunConfig, build_config
from copd_engine.report.retention import retention
from copd_engine.runs import _Child, run_with_baselines
from copd_engine.types import UserError
from tests.small_run import contents, numbers, small_config, write_base, write_data


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("material")
    return write_base(folder / "base"), write_data(folder / "data")


def config_of(material: tuple[Path, Path], output_dir: Path, **changes: object) -> RunConfig:
    settings = {"baselines": ["expert"], "schedule": {"cycles": 1, "rl_steps": 1, "opd_steps": 1}, **changes}
    config = small_config(*material, output_dir, **settings)
    return build_config({**config, "branches": config["branches"][:2]})


def test_baselines_beside_the_run_give_what_they_give_before_it(
    material: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = config_of(material, tmp_path / "before")
    beside = config_of(material, tmp_path / "beside", parallel_baselines=True)
    folders = [config.output_dir / config.name for config in (before, beside)]
    children = multiprocessing.active_children()
    daemons = []
    join = _Child.join
    monkeypatch.setattr(_Child, "join", lambda self: (daemons.append(self._process.daemon), join(self)))
    results = [run_with_baselines(config, folder) for config, folder in zip((before, beside), folders, strict=True)]
    assert results[0]["rows"] == results[1]["rows"]
    assert "average of experts" in [row["model"] for row in results[1]["rows"]]
    for part in (".", "baselines/expert"):
        assert numbers(folders[0] / part) == numbers(folders[1] / part)
    assert multiprocessing.active_children() == children
    assert daemons == [False]  # a daemon could not start sglang's process
    # As the command prints them: with the score of each prompt, of the baseline's models too.
    for result in results:
        scored = [row["model"] for row in result["rows"] if "rewards" in row]
        assert {"merged", "branch:text", "expert:text", "average of experts"} <= set(scored)
        assert all(entry.paired for entry in retention(result))
    assert "rewards" not in (folders[0] / "result.json").read_text()


def test_a_baseline_that_fails_beside_the_run_is_named(
    material: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(material, tmp_path, parallel_baselines=True)
    folder = config.output_dir / config.name
    # A foreign file where the baseline's folder belongs: its process finds it, the run's own check does not look there.
    (folder / "baselines" / "expert").mkdir(parents=True)
    (folder / "baselines" / "expert" / "notes.txt").write_text("mine")
    (folder / "config.yaml").write_text("")
    (folder / "config.yaml").unlink()
    monkeypatch.setattr("copd_engine.run_folder.check", lambda *_: None)
    with pytest.raises(UserError, match=r"baseline 'expert': .*notes|baseline 'expert': .*is not a run folder"):
        run_with_baselines(config, folder)
    assert (folder / "baselines" / "expert" / "notes.txt").read_text() == "mine"


def test_two_processes_cannot_train_in_one_folder(material: tuple[Path, Path], tmp_path: Path) -> None:
    config = config_of(material, tmp_path, baselines=[])
    folder = config.output_dir / config.name
    run_with_baselines(config, folder)
    (folder / "result.json").unlink()
    before = contents(folder)
    with (folder / "config.yaml").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is training in"):
            run_with_baselines(config, folder)
    assert contents(folder) == before
    run_with_baselines(config, folder)
    assert json.loads((folder / "result.json").read_text())["method"] == "copd"
