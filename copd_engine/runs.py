"""A run with its baselines: each in its own folder, one after the other or side by side, nothing trained twice."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import shutil
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from copd_engine import report, run_folder
from copd_engine.child_process import end_with_parent
from copd_engine.config import RunConfig
from copd_engine.report.retention import with_scores
from copd_engine.resolve import resolve
from copd_engine.trainer import Trainer
from copd_engine.types import UserError

END_TIMEOUT_S = 10.0


def run_with_baselines(config: RunConfig, run_dir: Path, overwrite: bool = False, command: str = "") -> dict[str, Any]:
    """Train the config's baselines and its method; returns the result with the rows of all, and with the score of each
    held-out prompt beside them (:func:`copd_engine.report.retention.with_scores`).

    What is finished is not trained again. With ``overwrite`` the old run is deleted, but only after data and model of
    the new one were read without an error. Raises UserError for bad input, for a folder that holds another run, and
    while another process trains in it.
    """
    config = resolve(config)
    if not overwrite:
        run_folder.check(run_dir, config)
        finished = run_dir / run_folder.RESULT
        if finished.is_file():
            result: dict[str, Any] = json.loads(finished.read_text())
            if not (run_dir / "report.html").is_file():
                report.write_report(run_dir)
            return with_scores(result, run_dir)
    trainer = Trainer(config, run_dir, command)
    if overwrite and (run_dir / run_folder.CONFIG).is_file():
        shutil.rmtree(run_dir)
    run_folder.claim(run_dir, config)
    with _lock(run_dir):
        baselines = [(_baseline(config, method, run_dir), run_dir / "baselines" / method) for method in _order(config)]
        todo = [(settings, folder) for settings, folder in baselines if not (folder / run_folder.RESULT).is_file()]
        children: list[_Child] = []

        def baseline_rows() -> list[dict[str, Any]]:
            for child in children:
                child.join()
            results = [json.loads((folder / run_folder.RESULT).read_text()) for _, folder in baselines]
            rows = [row for result in results for row in result["rows"] if row["kind"] != "base"]
            return list({row["model"]: row for row in reversed(rows)}.values())[::-1]  # experts may be in several

        try:
            if config.parallel_baselines:
                children.extend(_Child(*of_one, command, row) for row, of_one in enumerate(todo, 1))
            else:
                for settings, folder in todo:
                    Trainer(settings, folder, command).run()
            result = trainer.run(baseline_rows)
        finally:
            for child in children:
                child.stop()
    report.write_report(run_dir)
    return with_scores(result, run_dir)


def _order(config: RunConfig) -> list[str]:
    """Single experts first: others may take theirs from them."""
    return sorted(config.baselines, key=lambda method: method != "expert")


def _baseline(config: RunConfig, method: str, run_dir: Path) -> RunConfig:
    """The config of a baseline. Behind single experts, static distillation takes those instead of training its own."""
    changes: dict[str, Any] = {"method": method, "baselines": ()}
    at_hand = "expert" in config.baselines and not config.parallel_baselines and config.model.lora is None
    if at_hand and method in ("static_opd", "mopd") and getattr(config, method).experts is None:
        changes[method] = getattr(config, method).model_copy(update={"experts": run_dir / "baselines" / "expert"})
    return config.model_copy(update=changes)


class _Child:
    """A baseline in a process of its own. It ends with its parent, however that ends: :func:`end_with_parent` sees to
    that, not multiprocessing, whose daemons may have no children, such as sglang's process."""

    def __init__(self, config: RunConfig, folder: Path, command: str, bar_position: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._method = config.method
        self._error, error = context.Pipe(duplex=False)
        arguments = (config.model_dump_json(), folder, command, bar_position, error)
        self._process = context.Process(target=_train_in_child, args=arguments)
        self._process.start()
        error.close()

    def join(self) -> None:
        """Wait for its end; UserError with what it reported."""
        try:
            message = self._error.recv()
        except EOFError:
            message = None
        self._process.join(None if message is None else END_TIMEOUT_S)  # stop() ends what an engine holds up
        if message is not None:
            raise UserError(f"baseline {self._method!r}: {message}")
        if self._process.exitcode:
            raise RuntimeError(f"baseline {self._method!r} ended with exit code {self._process.exitcode}")

    def stop(self) -> None:
        self._process.terminate()
        self._process.join()


def _train_in_child(config: str, folder: Path, command: str, bar_position: int, error: Connection) -> None:
    end_with_parent()
    try:
        Trainer(RunConfig.model_validate_json(config), folder, command, bar_position).run()
    except UserError as problem:
        error.send(str(problem))
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # an exit would wait for the process of an engine that was left open


@contextmanager
def _lock(run_dir: Path) -> Iterator[None]:
    """One process at a time trains in a folder; the lock ends with the process."""
    with (run_dir / run_folder.CONFIG).open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is training in {run_dir}; wait for it, or choose another name=..."
            ) from None
        yield
