"""YAML files, ``key=value`` overrides, and one line for what is wrong in them."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from copd_engine.config.run import RunConfig
from copd_engine.types import UserError, suggest

Model = TypeVar("Model", bound=BaseModel)


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a YAML file and apply ``key.sub=value`` overrides (values are YAML; list items by number:
    ``branches.0.beta=2``).

    Raises :class:`UserError` for a missing file, broken YAML, unknown keys or bad values.
    """
    return build_config(read_mapping(path, overrides), where=str(path))


def read_mapping(path: str | Path, overrides: list[str] | None = None) -> dict[str, Any]:
    """The file's mapping with the overrides applied; UserError for a missing file or what is no mapping."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"config {path} does not exist")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:  # ValueError: no UTF-8, or a date such as 2026-13-01
        raise UserError(f"config {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise UserError(f"config {path} must be a mapping of keys to values, it is {type(data).__name__}")
    for override in overrides or []:
        _apply_override(data, override)
    return data


def build_config(data: dict[str, Any], where: str = "config", overrides: Sequence[str] = ()) -> RunConfig:
    """Validate a mapping, after ``overrides`` as in :func:`load_config`; ``where`` opens the error line."""
    data = copy.deepcopy(data)
    for override in overrides:
        _apply_override(data, override)
    return validate(RunConfig, data, where)


def validate(model: type[Model], data: dict[str, Any], where: str) -> Model:
    """``data`` as a config of that kind; UserError, opened by ``where``, for the first thing that is wrong."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{where}: {_explain(error, model)}") from None


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, equals, raw = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r} must look like key=value, e.g. schedule.cycles=2")
    try:
        value = yaml.safe_load(raw)
    except (yaml.YAMLError, ValueError):
        raise UserError(f"override {override!r}: the value is not valid YAML") from None
    if re.fullmatch(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+", raw.strip()):  # YAML 1.1 reads 1e-4 as text
        value = float(raw)
    node: Any = data
    *parents, last = key.split(".")
    for depth, part in enumerate(parents):
        node = node[_index(part, node, override)] if isinstance(node, list) else node.setdefault(part, {})
        if not isinstance(node, dict | list):
            raise UserError(f"override {override!r}: {'.'.join(parents[: depth + 1])} is a value, not a section")
    if isinstance(node, list):
        node[_index(last, node, override)] = value
    else:
        node[last] = value


def _index(part: str, items: list[Any], override: str) -> int:
    if not part.isdecimal() or int(part) >= len(items):
        raise UserError(f"override {override!r}: {part!r} must be a number from 0 to {len(items) - 1}")
    return int(part)


def _explain(error: ValidationError, model: type[BaseModel]) -> str:
    """One problem in one line: key, what it was, what it must be.

    An unknown key goes before others: it may be the misspelt one that is missing.
    """
    problems = error.errors()
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    loc = [str(part) for part in problem["loc"] if not str(part).startswith(("literal[", "list["))]
    key = ".".join(loc)
    if problem["type"] == "extra_forbidden":
        known = _known_keys(model, loc[:-1])
        return f"unknown key '{key}'{suggest(loc[-1], known)}"
    if problem["type"] == "missing":
        return f"key '{key}' is missing"
    message, value = problem["msg"].removeprefix("Value error, "), _short(problem["input"])
    if key == "schedule.topology":
        # Two kinds of value, so pydantic reports two problems; this names both.
        near = _nearest(value, ["hub", "full", "ring"])
        return f"{key} = {value}: must be hub, full, ring{near} or a list of [student, teacher] pairs"
    if problem["type"] == "value_error" and isinstance(problem["input"], dict):
        return f"{key}: {message}" if key else message
    if problem["type"] == "literal_error" and isinstance(problem["input"], str):
        choices = [c.strip(" '") for c in problem["ctx"]["expected"].replace(" or ", ", ").split(",")]
        return f"{key} = {value}: must be one of {', '.join(choices)}{_nearest(problem['input'], choices)}"
    known_types = {
        "model_type": "must be a section of keys",
        "dict_type": "must be a section of keys",
        "tuple_type": "must be a list",
        "too_short": "must not be empty",
        "string_pattern_mismatch": "must be letters, digits, _ and -",
    }
    message = known_types.get(problem["type"], message[0].lower() + message[1:])
    return f"{key} = {value}: {message}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _nearest(word: str, choices: list[str]) -> str:
    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _known_keys(model: type[BaseModel], path: list[str]) -> list[str]:
    """Field names of the section of ``model`` at ``path``."""
    section: Any = model
    for part in path:
        if part not in section.model_fields:  # a number of a list, or a key of a mapping
            continue
        annotation = section.model_fields[part].annotation
        while not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            # tuple[BranchConfig, ...], Annotated, X | None; of a mapping the values
            annotation = annotation.__args__[1 if get_origin(annotation) is dict else 0]
        section = annotation
    return list(section.model_fields)
