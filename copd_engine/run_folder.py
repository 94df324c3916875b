"""The run folder on disk: who may write into it, its config, samples with their media, and the result.

What stands in it is described in ``metrics.py``.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
from collections.abc import Collection, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from copd_engine.config import MediaConfig, RunConfig, load_config
from copd_engine.media import open_image, open_video
from copd_engine.metrics import read_jsonl
from copd_engine.types import Example, Rollout, UserError

CONFIG, SAMPLES, RESULT, CHECKPOINTS = "config.yaml", "samples.jsonl", "result.json", "checkpoints"
SCORES = "scores"
#: Of a video's frames every second one is shown.
FILMSTRIP = MediaConfig(video_max_frames=16)
LARGEST_PICTURE = (2048, 1024)
PACKAGES = ("copd-engine", "torch", "transformers", "numpy")


def run_dir_of(config: RunConfig) -> Path:
    return config.output_dir / config.name


def check(run_dir: Path, config: RunConfig) -> None:
    """UserError unless ``run_dir`` is free or holds a run of this config. Writes nothing."""
    file = run_dir / CONFIG
    if file.is_file():
        found = difference(comparable(load_config(file)), comparable(config))
        if found:
            raise UserError(
                f"{run_dir} holds a run with another config ({found}): "
                "choose another name=... or output_dir=..., or remove the folder"
            )
        return
    # A kill between the two writes of `claim` leaves the file written aside.
    if run_dir.exists() and (not run_dir.is_dir() or any(path.name != f".{CONFIG}" for path in run_dir.iterdir())):
        raise UserError(
            f"{run_dir} exists and is not a run folder (no {CONFIG}): choose another name=... or output_dir=..."
        )


def claim(run_dir: Path, config: RunConfig) -> None:
    """Make ``run_dir`` the folder of this config. UserError as in :func:`check`; nothing is overwritten."""
    check(run_dir, config)
    file = run_dir / CONFIG
    if file.is_file():
        return
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create the run folder {run_dir}: {error.strerror}") from None
    aside = run_dir / f".{CONFIG}"
    aside.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
    os.replace(aside, file)


def comparable(config: RunConfig) -> dict[str, Any]:
    """The config without what may differ between a run and its continuation."""
    # Experts from another run are what this one would have trained.
    left_out = {"output_dir": True, "name": True, "tensorboard": True, "static_opd": {"experts"}, "mopd": {"experts"}}
    kept = config.model_dump(mode="json", exclude=left_out)  # type: ignore[arg-type]
    return {**kept, "flops_of": config.flops_of is not None}  # its folder may be moved


def difference(old: Any, new: Any, path: str = "") -> str | None:
    """The first place where two JSON values differ, ``a.b was 1, is 2``; None where they are equal."""
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = [(key, old.get(key), new.get(key)) for key in dict.fromkeys([*old, *new])]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(str(i), x, y) for i, (x, y) in enumerate(zip(old, new, strict=True))]
    else:
        return None if old == new else f"{path} was {old!r}, is {new!r}"
    return next((d for key, x, y in pairs if (d := difference(x, y, f"{path}.{key}" if path else key))), None)


def save_sample(run_dir: Path, step: int, branch: str, domain: str, rollout: Rollout, reward: float) -> None:
    """Append one response to ``samples.jsonl``; images and videos (as filmstrips) go to ``media/``."""
    example = rollout.request.prompt.example
    row = {
        "step": step,
        "branch": branch,
        "domain": domain,
        "prompt": example.prompt,
        "response": rollout.text,
        "answer": example.answer,
        "reward": reward,
        "media": _save_media(run_dir, example),
    }
    with (run_dir / SAMPLES).open("a") as file:
        file.write(json.dumps(row) + "\n")


def file_name(model: str) -> str:
    """The label of a model in the result table as a file name."""
    return model.replace(",", "").replace(":", "-").replace(" ", "-").replace("→", "-to-")


def save_scores(run_dir: Path, model: str, samples: Iterable[tuple[str, Rollout, float]]) -> None:
    """Write ``scores/<model>.json``: the score of every held-out prompt by domain, in the order of the prompts."""
    scores: dict[str, list[float]] = {}
    for domain, _, score in samples:
        scores.setdefault(domain, []).append(score)
    _write_scores(run_dir, model, scores)


def copy_scores(run_dir: Path, model: str, source: Path) -> None:
    """As :func:`save_scores`, of a model that another run has evaluated."""
    _write_scores(run_dir, model, json.loads(source.read_text()))


def scores_file(run_dir: Path, model: str) -> Path:
    return run_dir / SCORES / f"{file_name(model)}.json"


def _write_scores(run_dir: Path, model: str, scores: dict[str, list[float]]) -> None:
    file = scores_file(run_dir, model)
    file.parent.mkdir(exist_ok=True)
    write_json(file, scores)


def drop_later_samples(run_dir: Path, step: int, branches: Collection[str]) -> None:
    """Forget what a run resumed from ``step`` draws again. A last line torn by a kill goes too.

    These are the samples of later steps, and those of the models made after the last step, which are no ``branches``.
    """
    file = run_dir / SAMPLES
    if not file.exists():
        return
    rows = [row for row in read_jsonl(file) if row["step"] <= step and row["branch"] in branches]
    aside = run_dir / f".{SAMPLES}"
    aside.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    os.replace(aside, file)


def _save_media(run_dir: Path, example: Example) -> list[str]:
    pictures = [open_image(image, f"{example.name}: images") for image in example.images]
    for video in example.videos:
        frames = open_video(video, example.fps, FILMSTRIP, f"{example.name}: videos").frames[::2]
        pictures.append(Image.fromarray(np.concatenate(list(frames), axis=1)))
    names = []
    for picture in pictures:
        picture.thumbnail(LARGEST_PICTURE)  # smaller ones stay as they are
        # By content: rows of two data files may have the same uid.
        name = f"media/{hashlib.sha256(f'{picture.size}'.encode() + picture.tobytes()).hexdigest()[:16]}.png"
        names.append(name)
        if not (run_dir / name).exists():
            (run_dir / "media").mkdir(exist_ok=True)
            aside = run_dir / "media" / ".writing.png"
            picture.save(aside)
            os.replace(aside, run_dir / name)
    return names


def write_json(file: Path, data: dict[str, Any]) -> None:
    """Written aside and renamed."""
    aside = file.with_name(f".{file.name}")
    aside.write_text(json.dumps(data, indent=1) + "\n")
    os.replace(aside, file)


def machine() -> str:
    """Processor and number of usable cores."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{model}, {len(os.sched_getaffinity(0))} cores"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()
