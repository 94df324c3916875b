"""A folder with a finished run for the commands to work in, and the command line called in this process."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import copd_engine.report
from copd_engine import cli
from tests.small_run import small_config, train, write_base, write_config, write_data


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


def flip_last_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
