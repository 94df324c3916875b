"""What a response answers, written so that equal answers are equal text: for votes, and to be read beside the gold."""

from __future__ import annotations

import json
import re

from copd_engine.types import Example
from copd_engine.verifiers.alternatives import ALTERNATIVES
from copd_engine.verifiers.choice import chosen_letters
from copd_engine.verifiers.extract import find_answer, first_sentence
from copd_engine.verifiers.gym import last_number
from copd_engine.verifiers.json_fields import last_object
from copd_engine.verifiers.numeric import Number, numbers, stated_number
from copd_engine.verifiers.text import normalize

#: Of a line that answers a response which marks none, so much of its end.
MAX_LINE_CHARACTERS = 80
_FORMULA = re.compile(r"\$([^$]+)\$|\\\((.+?)\\\)")


def extracted_answer(response: str, example: Example) -> str | None:
    """What the verifier looks at, whether it is right or wrong.

    Multiple choice: the letters. A number: its value, of a response that marks no answer the last one. JSON: the last
    object. Else the marked answer, normalised, or the last line: of mathematics the last formula or number in it. None
    where there is nothing of the kind.
    """
    verifiers = _verifiers(example)
    if verifiers == ["multiple_choice"]:
        return chosen_letters(response, example)
    if verifiers == ["answer_after_hash"]:
        _, mark, text = response.rpartition("#")
        return text.strip() if mark else None
    if verifiers == ["reasoning_gym_number"]:
        return last_number(response)
    if verifiers == ["json_fields"]:
        found = last_object(response)
        return None if found is None else json.dumps(found, sort_keys=True, ensure_ascii=False)
    if "numeric" in verifiers and (number := stated_number(response)) is not None:
        return _value(number)
    answer = find_answer(response)
    if answer.source == "boxed":
        return normalize(answer.text) or None
    if answer.source == "whole":
        return normalize(_last_line(answer.text, "math" in verifiers)) or None
    return normalize(first_sentence(answer.text)) or None


def _verifiers(example: Example) -> list[str]:
    """The example's, or those of its golds where it has several."""
    if example.verifier != ALTERNATIVES:
        return [example.verifier]
    return [way["verifier"] for way in example.metadata["alternatives"]]


def _last_line(text: str, is_math: bool) -> str:
    line = text.rstrip().rpartition("\n")[2].strip()
    if is_math:
        formulas: list[str] = [a or b for a, b in _FORMULA.findall(line)]
        if formulas:
            return formulas[-1]
        found = numbers(line)
        if found and re.search(r"[A-Za-z]{2}", line):  # "so it is 5"
            return _value(found[-1])
    return first_sentence(line)[-MAX_LINE_CHARACTERS:]


def _value(number: Number) -> str:
    value = f"{number.value.normalize():f}"
    return f"{value}%" if number.percent else value
