"""A JSON object whose fields are compared. Nothing in it is ever run."""

from __future__ import annotations

import json
import re
from typing import Any

from copd_engine.types import Example, UserError
from copd_engine.verifiers.extract import TAIL_CHARACTERS, find_answer, without_thinking

_FENCE = re.compile(r"```(?:json|JSON)?[ \t]*\n(.*?)```", re.DOTALL)
#: Openings that are tried as the begin of an object: bounds the time for a text of nothing but braces.
_MAX_OPENINGS = 200


def json_fields(response: str, example: Example) -> float:
    """1 when the last JSON object of the response has every field of the gold's object with an equal value.

    The object may stand in a ```` ```json ```` fence, in prose or alone; fields that the gold does not have are
    ignored at the top level. Values are equal as JSON: 1 and 1.0 are, 1 and true or "1" are not.
    """
    gold, found = _gold(example), last_object(response)
    return float(found is not None and all(key in found and _equal(found[key], gold[key]) for key in gold))


def check_json(example: Example) -> None:
    """Raises UserError for a gold that is no JSON object with fields."""
    _gold(example)


def last_object(response: str) -> dict[str, Any] | None:
    """The last JSON object of a response; None without one."""
    answer = find_answer(response)
    # Not the other marks of an answer: "answer": may be a field's name.
    return _last_object(answer.text if answer.source == "tag" else without_thinking(response)[-TAIL_CHARACTERS:])


def _last_object(text: str) -> dict[str, Any] | None:
    fences = _FENCE.findall(text)
    for candidate in (fences[-1], text) if fences else (text,):
        found = None
        position, openings = candidate.find("{"), 0
        while position >= 0 and openings < _MAX_OPENINGS:
            openings += 1
            try:
                value, end = _DECODER.raw_decode(candidate, position)
            except (ValueError, RecursionError):
                end = position + 1
            else:
                found = value
            position = candidate.find("{", end)
        if found is not None:
            return found
    return None


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return isinstance(a, bool) == isinstance(b, bool) and bool(a == b)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)


def _gold(example: Example) -> dict[str, Any]:
    try:
        gold = json.loads(example.answer, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        gold = None
    if not isinstance(gold, dict) or not gold:
        raise UserError(
            f"{example.name}: verifier 'json_fields': answer = {example.answer[:80]!r}: "
            "must be a JSON object with at least one field"
        )
    return gold
