"""A row of a data file to an :class:`Example`: columns, conversations, media and answers, each checked.

Nothing is decoded here; that files exist is checked, so that a mistake is found at load and not in step 500.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from copd_engine.config import COLUMNS
from copd_engine.media import check_image, check_video
from copd_engine.types import Example, UserError, suggest
from copd_engine.verifiers import check_example

DEFAULT_VERIFIER = "exact"
QUESTION = "{question}"
MARKERS = {"images": "<image>", "videos": "<video>"}
ROLES = ("system", "user", "assistant", "tool")
#: A pass rate as "solved of tried", as in Polaris' ``difficulty``.
FRACTION = re.compile(r"\s*(\d+)\s*/\s*(\d+)\s*")
ANSWER_TAGS = re.compile(r"\s*<answer>(.*)</answer>\s*", re.DOTALL)


def with_instruction(prompt: str, instruction: str) -> str:
    """``instruction`` filled in where it is a template, else after the prompt."""
    if QUESTION in instruction:
        return instruction.replace(QUESTION, prompt)
    return f"{prompt}\n{instruction}" if instruction else prompt


def instructed(example: Example, instruction: str) -> Example:
    """The example with :func:`with_instruction` applied to its last user turn."""
    if not instruction:
        return example
    prompt = with_instruction(example.prompt, instruction)
    turns = (*example.messages[:-1], {"role": "user", "content": prompt}) if example.messages else ()
    return dataclasses.replace(example, prompt=prompt, messages=turns)


class RowReader:
    """Reads rows. ``columns`` maps our fields to the file's columns, empty where they have our names; ``verifier``
    overrides the rows'; ``instruction`` as in :func:`with_instruction`."""

    def __init__(self, columns: Mapping[str, str], verifier: str | None, instruction: str) -> None:
        self.columns, self.verifier, self.instruction = columns, verifier, instruction

    def fields(self, row: Any, at: str) -> dict[str, Any]:
        """Our fields of a row, those that are None left out. UserError for a row that is no mapping, or for an unknown
        field where there is no mapping of columns."""
        if not isinstance(row, dict):
            raise UserError(f"{at}: a row must be a JSON object, it is {type(row).__name__}")
        if self.columns:
            found = {ours: _dig(row, column) for ours, column in self.columns.items()}
        else:
            for key in row:
                if key not in COLUMNS:
                    raise UserError(
                        f"{at}: unknown field {key!r}{suggest(key, COLUMNS)}; your own values go under 'metadata', "
                        "other names of columns into the config's 'columns'"
                    )
            found = row
        return {key: value for key, value in found.items() if value is not None}

    def example(self, fields: Mapping[str, Any], at: str, uid: str, folder: Path, check: bool = True) -> Example:
        """``at`` (``data.jsonl:7``) opens error lines and becomes ``where``; ``uid`` is the default one; media lie
        relative to ``folder``. ``check``: look whether media exist and whether the verifier can score the row."""
        if ("prompt" in fields) == ("messages" in fields):
            raise UserError(
                f"{at}: {self._called('prompt')} is missing"
                if "prompt" not in fields
                else f"{at}: 'prompt' and 'messages' exclude each other"
            )
        if "answer" not in fields:
            raise UserError(f"{at}: {self._called('answer')} is missing")
        turns, inline = _turns(fields, at, folder)
        media = {key: self._media(fields.get(key), key, turns, inline[key], at, folder) for key in MARKERS}
        fps = fields.get("fps", 2.0)
        if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps < math.inf:
            raise UserError(f"{at}: fps = {fps!r}: must be a number above 0")
        metadata = fields.get("metadata", {})
        if not isinstance(metadata, dict):
            raise UserError(f"{at}: metadata = {_short(metadata)}: must be a mapping")
        name = fields.get("uid", uid)
        if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
            raise UserError(f"{at}: uid = {_short(name)}: must be text or a whole number")
        verifier = self.verifier or fields.get("verifier", DEFAULT_VERIFIER)
        if not isinstance(verifier, str):
            raise UserError(f"{at}: verifier = {verifier!r}: must be a name")
        example = Example(
            uid=str(name),
            prompt=turns[-1]["content"],
            answer=_answer(fields["answer"], at),
            verifier=verifier,
            images=media["images"],
            videos=media["videos"],
            fps=float(fps),
            metadata=metadata,
            messages=tuple(turns) if len(turns) > 1 else (),
            where=at,
        )
        if check:
            self._check(example)
        return instructed(example, self.instruction)

    def _check(self, example: Example) -> None:
        for image in example.images:
            check_image(image, f"{example.where}: images")
        for video in example.videos:
            check_video(video, f"{example.where}: videos")
        try:
            check_example(example)
        except UserError as error:
            reason = str(error).removeprefix(f"{example.name}: ").removeprefix("verifier ")
            raise UserError(f"{example.where}: verifier: {reason}") from None

    def _called(self, field: str) -> str:
        column = self.columns.get(field)
        if self.columns and column is None:
            return f"field {field!r} (name its column in 'columns')"
        return f"field {field!r}" + (f" (column {column!r})" if column else "")

    def _media(
        self, value: Any, key: str, turns: list[dict[str, str]], inline: list[Any], at: str, folder: Path
    ) -> tuple[Any, ...]:
        """The files of ``images`` or ``videos`` in the order of their markers. ``inline``: for each marker the file
        that stands in the conversation itself, or None for the next one of the column."""
        values = [] if value is None else value
        if not isinstance(values, list) and key in self.columns:
            values = [values]
        if not isinstance(values, list):
            raise UserError(f"{at}: {key} = {_short(value)}: must be a list of paths")
        try:
            read = _image if key == "images" else _video
            media = [read(item, folder) for item in values]
        except _NoMediaError as error:
            raise UserError(f"{at}: {key} = {_short(value)}: must be a list of paths{error}") from None
        num_open = sum(item is None for item in inline)
        if inline and num_open != len(media):
            raise UserError(f"{at}: the prompt has {num_open} {MARKERS[key]} markers, {key!r} has {len(media)} files")
        rest = iter(media)
        return tuple(next(rest) if item is None else item for item in inline) if inline else tuple(media)


def pass_rate(fields: Mapping[str, Any], at: str) -> float:
    """The row's pass rate in [0, 1], a number or text such as ``3/8``. UserError for a missing or other value."""
    value = fields.get("pass_rate")
    if value is None:
        raise UserError(f"{at}: field 'pass_rate' is missing, the config filters by it")
    match = FRACTION.fullmatch(value) if isinstance(value, str) else None
    if match and int(match[2]):
        value = int(match[1]) / int(match[2])
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise UserError(f"{at}: pass_rate = {_short(value)}: must be a number from 0 to 1, or text such as '3/8'")
    return float(value)


def _dig(row: Any, column: str) -> Any:
    """The value of a column; dots go into nested ones, unless a column has just that name."""
    if column in row:
        return row[column]
    value = row
    for part in column.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


# Conversations


def _turns(fields: Mapping[str, Any], at: str, folder: Path) -> tuple[list[dict[str, str]], dict[str, list[Any]]]:
    """The turns as text with markers, and for each marker the file that stands inline, or None."""
    inline: dict[str, list[Any]] = {key: [] for key in MARKERS}
    if "prompt" in fields:
        prompt = fields["prompt"]
        if isinstance(prompt, list):
            raise UserError(f"{at}: prompt is a list of turns: map that column to 'messages'")
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f"{at}: prompt = {_short(prompt)}: must be text that is not empty")
        for key, marker in MARKERS.items():
            inline[key] = [None] * prompt.count(marker)
        return [{"role": "user", "content": prompt}], inline
    messages = fields["messages"]
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{at}: messages = {_short(messages)}: must be a list of turns")
    turns = []
    for number, message in enumerate(messages):
        where = f"{at}: messages[{number}]"
        if not isinstance(message, dict) or message.get("content") is None:
            raise UserError(f"{where} = {_short(message)}: must be {{role, content}}")
        role = message.get("role")
        if role not in ROLES:
            raise UserError(f"{where}.role = {role!r}: must be one of {', '.join(ROLES)}")
        turns.append({"role": role, "content": _content(message["content"], where, folder, inline)})
    if turns[-1]["role"] != "user":
        raise UserError(f"{at}: messages end with a turn of {turns[-1]['role']!r}: the last turn must be the user's")
    if not turns[-1]["content"].strip():
        raise UserError(f"{at}: messages: the last turn is empty")
    return turns, inline


def _content(content: Any, where: str, folder: Path, inline: dict[str, list[Any]]) -> str:
    """Text of a turn; parts become markers, their files are appended to ``inline``."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise UserError(f"{where}.content = {_short(content)}: must be text or a list of parts")
    text = ""
    for part in parts:
        kind = str(part.get("type")).removesuffix("_url")
        if kind == "text" and isinstance(part.get("text"), str):
            text += part["text"]
            for key, marker in MARKERS.items():
                inline[key] += [None] * part["text"].count(marker)
        elif kind in ("image", "video"):
            value = part.get(kind) if part.get(kind) is not None else part.get(f"{kind}_url")
            if isinstance(value, dict) and "url" in value:
                value = value["url"]
            try:
                read = _image if kind == "image" else _video
                inline[f"{kind}s"].append(None if value is None else read(value, folder))
            except _NoMediaError as error:
                raise UserError(f"{where}.content: {kind} = {_short(value)}: must be a path{error}") from None
            text += MARKERS[f"{kind}s"]
        else:
            raise UserError(f"{where}.content: part {_short(part)}: must be of type text, image or video")
    return text


# Media


class _NoMediaError(Exception):
    """Not what an image or a video may be; the text says why where that is not plain."""


def _image(value: Any, folder: Path) -> Path | bytes:
    """A path, an encoded file's bytes, or ``{bytes, path}`` as Hugging Face writes images into Parquet."""
    if isinstance(value, dict) and value.get("bytes") is not None:
        value = value["bytes"]
    if isinstance(value, bytes) and value:
        return value
    return _path(value, folder)


def _video(value: Any, folder: Path) -> Path | tuple[Path | bytes, ...]:
    """A path, ``{path}``, or a list of images as frames."""
    if isinstance(value, list) and value:
        return tuple(_image(frame, folder) for frame in value)
    if isinstance(value, bytes) or (isinstance(value, dict) and value.get("bytes") is not None):
        raise _NoMediaError(" or lists of frames: videos inside a data file are not read, write them to files")
    return _path(value, folder)


def _path(value: Any, folder: Path) -> Path:
    if isinstance(value, dict):
        value = value.get("path")
    if not isinstance(value, str) or not value or "\0" in value:
        raise _NoMediaError
    if value.startswith(("http://", "https://", "data:")):
        raise _NoMediaError(": URLs are not fetched")
    return folder / value


# Answers


def _answer(answer: Any, at: str) -> str:
    """Text, without blanks around it or the ``<answer>`` tags of Video-R1 and its kin. A box, a time span or a mapping
    becomes JSON, as the verifiers for them read it."""
    if isinstance(answer, dict) or (isinstance(answer, list) and _is_numeric(answer)):
        try:
            return json.dumps(answer, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise UserError(f"{at}: answer = {_short(answer)}: {error}") from None
    if isinstance(answer, list):
        raise UserError(
            f"{at}: answer = {_short(answer)}: must be text or a number; a list may hold numbers alone (a box or a "
            "time span), alternatives are not known"
        )
    if isinstance(answer, bool) or not isinstance(answer, str | int | float) or answer == "":
        raise UserError(f"{at}: answer = {_short(answer)}: must be text or a number")
    if isinstance(answer, float) and not math.isfinite(answer):  # 1e999
        raise UserError(f"{at}: answer = {answer!r}: must be a finite number")
    # Verifiers compare with stripped text, so an answer with outer blanks could never be right.
    text = str(answer).strip()
    tags = ANSWER_TAGS.fullmatch(text)
    text = tags[1].strip() if tags else text
    if not text:
        raise UserError(f"{at}: answer = {answer!r}: must not be blank")
    return text


def _is_numeric(values: list[Any]) -> bool:
    return bool(values) and all(
        _is_numeric(v) if isinstance(v, list) else isinstance(v, int | float) and not isinstance(v, bool)
        for v in values
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
