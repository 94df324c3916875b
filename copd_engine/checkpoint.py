"""Checkpoints: safetensors and one JSON manifest with hashes, written aside and renamed. Nothing is unpickled.

``checkpoints/step-000020/`` holds ``model-BRANCH.safetensors`` (the trained weights, the fp32 masters of a bf16 model;
frozen ones are the base's), ``optim-BRANCH.safetensors`` (AdamW's moments) and ``manifest.json`` (step, versions, data
cursors, SHA-256 of each file and of the manifest itself). A folder without a manifest whose hashes hold is never
resumed from, so a kill at any moment leaves the last complete one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from copd_engine.branch import Branch
from copd_engine.types import UserError

MANIFEST = "manifest.json"
FORMAT = 1
logger = logging.getLogger(__name__)


def save_checkpoint(
    folder: Path,
    step: int,
    branches: Mapping[str, Branch],
    state: dict[str, Any],
    keep: int,
    further: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
) -> Path:
    """Write ``folder/step-NNNNNN`` and drop all but the newest ``keep``. ``state``: further JSON for the manifest;
    ``further``: tensors for files of these names, which :func:`load_tensors` reads."""
    target = folder / f"step-{step:06d}"
    aside = folder / f".writing-{step:06d}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    manifest: dict[str, Any] = {"format": FORMAT, "step": step, "branches": {}, "files": {}, "state": state}
    for name, branch in branches.items():
        tensors = {key: value.detach().contiguous() for key, value in branch.masters.tensors.items()}
        save_file(tensors, aside / f"model-{name}.safetensors")
        save_file(_moments(branch), aside / f"optim-{name}.safetensors")
        manifest["branches"][name] = {
            "version": branch.version,
            "num_skipped": branch.num_skipped,
            "num_skipped_in_a_row": branch.num_skipped_in_a_row,
        }
    for name, extra in (further or {}).items():
        save_file(dict(extra), aside / f"{name}.safetensors")
    for file in sorted(aside.iterdir()):
        manifest["files"][file.name] = _sha256(file)
        _sync(file)
    manifest["sha256"] = _manifest_sha256(manifest)
    (aside / MANIFEST).write_text(json.dumps(manifest, indent=1))
    _sync(aside / MANIFEST)
    _sync(aside)
    if target.exists():
        shutil.rmtree(target)
    os.replace(aside, target)
    _sync(folder)
    prune(folder, keep)
    return target


def prune(folder: Path, keep: int) -> None:
    """Drop all but the newest ``keep`` checkpoints, and what a kill left half written or half removed."""
    kept = complete_checkpoints(folder)[-keep:]
    for old in [*folder.glob("step-*"), *folder.glob(".writing-*")]:
        if old not in kept:
            shutil.rmtree(old)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders that have a manifest, oldest first."""
    return sorted(path.parent for path in folder.glob(f"step-*/{MANIFEST}"))


def load_checkpoint(path: Path, branches: Mapping[str, Branch]) -> tuple[int, dict[str, Any]]:
    """Restore branches in place; returns (step, state).

    Raises UserError for a missing or damaged checkpoint, or one of other branches or another model.
    """
    manifest = read_manifest(path)
    if set(manifest["branches"]) != set(branches):
        raise UserError(f"checkpoint {path} has branches {sorted(manifest['branches'])}, the run {sorted(branches)}")
    for name, branch in branches.items():
        _restore_parameters(branch, load_file(path / f"model-{name}.safetensors"), path)
        _restore_moments(branch, load_file(path / f"optim-{name}.safetensors"))
        saved = manifest["branches"][name]
        branch.version = saved["version"]
        branch.num_skipped = saved["num_skipped"]
        branch.num_skipped_in_a_row = saved["num_skipped_in_a_row"]
    return manifest["step"], manifest["state"]


def load_tensors(path: Path, name: str) -> dict[str, torch.Tensor]:
    """One of the ``further`` files of a checkpoint that :func:`load_checkpoint` has read; UserError if it has none."""
    file = path / f"{name}.safetensors"
    if not file.is_file():
        raise UserError(f"checkpoint {path}: has no {file.name}; it was written under another config")
    return load_file(file)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest, after every file's hash was compared."""
    file = path / MANIFEST
    if not file.is_file():
        raise UserError(f"checkpoint {path} does not exist or has no {MANIFEST}")
    try:
        manifest: dict[str, Any] = json.loads(file.read_text())
    except ValueError as error:  # no JSON, or no text at all
        raise UserError(f"checkpoint {path}: {MANIFEST} is not JSON ({error})") from None
    if not isinstance(manifest, dict) or manifest.get("sha256") != _manifest_sha256(manifest):
        raise UserError(f"checkpoint {path}: {MANIFEST} is damaged (its SHA-256 differs from the one it holds)")
    if manifest.get("format") != FORMAT:
        raise UserError(f"checkpoint {path} has format {manifest.get('format')}, this version reads {FORMAT}")
    for name, digest in manifest["files"].items():
        if not (path / name).is_file():
            raise UserError(f"checkpoint {path}: {name} is missing")
        if _sha256(path / name) != digest:
            raise UserError(f"checkpoint {path}: {name} is damaged (its SHA-256 differs from the manifest)")
    return manifest


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose hashes hold, None where none was ever written.

    Damaged ones are passed over with a warning. UserError when all are damaged: starting over is for the user to
    decide.
    """
    damage: list[UserError] = []
    for path in reversed(complete_checkpoints(folder)):
        try:
            read_manifest(path)
        except UserError as error:
            damage.append(error)
            continue
        for found in damage:
            logger.warning("%s; going on from %s", found, path.name)
        return path
    if damage:
        raise UserError(f"{damage[0]}; no other checkpoint is whole: start over with another name=... or --overwrite")
    return None


def _moments(branch: Branch) -> dict[str, torch.Tensor]:
    """AdamW's state as flat tensors ``NAME/exp_avg``, ``NAME/exp_avg_sq``, ``NAME/step``."""
    return {
        f"{name}/{key}": value.contiguous()
        for name, parameter in branch.masters.tensors.items()
        for key, value in branch.optimizer.state.get(parameter, {}).items()
    }


def _restore_parameters(branch: Branch, tensors: dict[str, torch.Tensor], path: Path) -> None:
    different = set(tensors) ^ set(branch.parameters)
    if different:
        raise UserError(f"checkpoint {path} is of another model: {sorted(different)[0]} is only in one of the two")
    with torch.no_grad():
        for name, parameter in branch.masters.tensors.items():
            if tensors[name].shape != parameter.shape:
                raise UserError(
                    f"checkpoint {path}: {name} has shape {tuple(tensors[name].shape)}, "
                    f"the model {tuple(parameter.shape)}"
                )
            parameter.copy_(tensors[name])
    branch.masters.round_into_model()


def _restore_moments(branch: Branch, tensors: dict[str, torch.Tensor]) -> None:
    branch.optimizer.state.clear()
    for key, value in tensors.items():
        name, _, field = key.rpartition("/")
        parameter = branch.masters.tensors[name]
        branch.optimizer.state[parameter][field] = value.to(parameter.device)
    if branch.host_states:
        branch.host_states.to_host()


def _manifest_sha256(manifest: dict[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
