"""From a study to its units, and the folder that holds them: one run folder per seed and variant."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from copd_engine import run_folder
from copd_engine.config import RunConfig, build_config
from copd_engine.study.config import PILOT, StudyConfig
from copd_engine.study.models import check_models
from copd_engine.types import UserError, suggest

STUDY = "study.json"
GENERATED = ("testbed", "reasoning_gym")
#: reasoning-gym draws question i from seed + i: seeds of a study stand so far apart, or they would be shifted copies of
#: each other, and below what its held-out and validation questions add to a seed (2**30 and 2**29).
GYM_SPACING, GYM_LIMIT = 2**20, 2**29
#: What may differ between two starts of one study.
FREE = {"name", "output_dir", "processes"}


@dataclass(frozen=True)
class Unit:
    """A variant with a seed. ``needs``: the variants of the same seed that are trained before it."""

    variant: str
    seed: int
    folder: Path
    config: RunConfig
    needs: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"seed-{self.seed}/{self.variant}"

    @property
    def is_finished(self) -> bool:
        return (self.folder / run_folder.RESULT).is_file()


def study_dir_of(study: StudyConfig) -> Path:
    return study.output_dir / study.name


def units_of(study: StudyConfig, fast: bool = False) -> list[Unit]:
    """All units, seed by seed, in the config's order, the pilot behind the experts that it takes: it is a long one, and
    at the end it would leave the other processes idle. UserError for a run config that is wrong, and
    where a table, a figure or a claim names a model that no run will have."""
    root = study_dir_of(study)
    units = []
    for seed in study.seeds:
        folder = root / f"seed-{seed}"
        for name, variant in study.variants.items():
            config = run_config(study, name, seed, fast)
            units.append(Unit(name, seed, folder / name, config, variant.needs))
        if study.pilot is not None:
            at, config = next(
                (i, u.config) for i, u in enumerate(units) if u.name == f"seed-{seed}/{study.pilot.experts}"
            )
            if config.model.lora is not None:
                raise UserError(
                    "pilot: its students stand between whole models and all of their weights are trained, which is "
                    f"another training than that of variant {study.pilot.experts!r} under model.lora; leave one out"
                )
            for branch in (study.pilot.teacher, *study.pilot.students):
                if branch not in config.branch_names:
                    raise UserError(f"pilot: no branch of variant {study.pilot.experts!r} is named {branch!r}")
            units.insert(at + 1, Unit(PILOT, seed, folder / PILOT, config, (study.pilot.experts,)))
    check_models(study, {unit.variant: unit.config for unit in units if unit.seed == study.seeds[0]})
    return units


def run_config(study: StudyConfig, name: str, seed: int, fast: bool = False) -> RunConfig:
    """The config of a variant with a seed, in the study's folder."""
    variant, folder = study.variants[name], study_dir_of(study) / f"seed-{seed}"
    data = merged(study.run, variant.changes)
    where = f"variants.{name}"
    branches = data.get("branches")
    if not isinstance(branches, list) or not all(isinstance(branch, dict) for branch in branches):
        raise UserError(f"{where}: run.branches must be a list of branches")
    if variant.branches is not None:
        known = [branch.get("name") for branch in branches]
        for branch in variant.branches:
            if branch not in known:
                raise UserError(f"{where}.branches: no branch is named {branch!r}{suggest(branch, map(str, known))}")
        branches = [branch for branch in branches if branch.get("name") in variant.branches]
    changes = merged(variant.each_branch, study.fast.each_branch) if fast else variant.each_branch
    data["branches"] = [_with_seed(merged(branch, changes), seed) for branch in branches]
    data |= {"name": name, "seed": seed, "output_dir": str(folder), "baselines": [], "parallel_baselines": False}
    data["flops_of"] = variant.flops_of and str(folder / variant.flops_of)
    if fast:
        data = merged(data, study.fast.run)
    if variant.experts is not None:
        method = data.get("method")
        if method not in ("static_opd", "mopd"):
            raise UserError(f"{where}.experts: only static_opd and mopd take experts, its method is {method!r}")
        if isinstance(model := data.get("model"), dict) and model.get("lora") is not None:
            raise UserError(f"{where}.experts: under model.lora a run has no adapters to go on with; leave it out")
        data = merged(data, {method: {"experts": str(folder / variant.experts)}})
    return build_config(data, where)


def merged(data: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``data`` with ``changes``; sections are merged key by key, everything else is replaced."""
    result = copy.deepcopy(dict(data))
    for key, value in changes.items():
        old = result.get(key)
        both = isinstance(old, dict) and isinstance(value, Mapping)
        result[key] = merged(old, value) if both else copy.deepcopy(value)  # type: ignore[arg-type]
    return result


def _with_seed(branch: dict[str, Any], seed: int) -> dict[str, Any]:
    """Generated prompts are drawn anew for every seed, so that an interval over seeds covers the choice of prompts."""
    data = _seeded(dict(branch.get("data") or {}), seed)
    if isinstance(data.get("sources"), list):
        data["sources"] = [_seeded(source, seed) if isinstance(source, dict) else source for source in data["sources"]]
    return {**branch, "data": data}


def _seeded(source: dict[str, Any], seed: int) -> dict[str, Any]:
    kind, own = source.get("source", "testbed"), int(source.get("seed", 0))
    if kind == "reasoning_gym":
        if own + (seed + 1) * GYM_SPACING > GYM_LIMIT:
            raise UserError(
                f"seeds: {seed} is too large: with source reasoning_gym data.seed + seed * {GYM_SPACING} must not pass "
                f"{GYM_LIMIT - GYM_SPACING} (data.seed is {own})"
            )
        return {**source, "seed": own + seed * GYM_SPACING}
    return {**source, "seed": own + seed} if kind in GENERATED else source


# The folder


def fingerprint(study: StudyConfig, fast: bool = False) -> str:
    """SHA-256 of everything in the config that could change a number or a claim."""
    config = study.model_dump(mode="json", exclude=FREE) | {"is_fast": fast}
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def _difference(known: dict[str, Any], study: StudyConfig) -> str:
    """The first one; two configs that are the same differ in ``--fast``."""
    old = {key: value for key, value in known.items() if key not in FREE}
    found = run_folder.difference(old, study.model_dump(mode="json", exclude=FREE)) or "with or without --fast"
    return found if len(found) <= 300 else f"{found[:297]}..."


def claim_folder(study: StudyConfig, fast: bool = False) -> Path:
    """Make the study's folder, or find it made by the same config; UserError where another config made it.

    The config is so fixed before the first seed is trained.
    """
    root = study_dir_of(study)
    file, sha256 = root / STUDY, fingerprint(study, fast)
    if file.is_file():
        known = json.loads(file.read_text())
        if known["sha256"] != sha256:
            raise UserError(
                f"{root} holds a study with another config ({_difference(known['config'], study)}; sha256 "
                f"{known['sha256'][:12]}, this one {sha256[:12]}): its claims and settings were fixed before its seeds "
                "were run; choose another name=..., or remove the folder"
            )
        return root
    # A kill between the two writes leaves the file written aside.
    if root.exists() and any(path.name != f".{STUDY}" for path in root.iterdir()):
        raise UserError(f"{root} exists and is not a study's folder (no {STUDY}): choose another name=...")
    root.mkdir(parents=True, exist_ok=True)
    run_folder.write_json(file, {"sha256": sha256, "date": run_folder.today(), "config": study.model_dump(mode="json")})
    return root
