"""What a response answers, written so that equal answers are equal text: for votes, and to be read beside the gold."""

from __future__ import annotations

from copd_engine.types import Example
from copd_engine.verifiers.choice import chosen_letters
from copd_engine.verifiers.extract import find_answer, first_sentence
from copd_engine.verifiers.numeric import numbers
from copd_engine.verifiers.text import normalize

#: Of a response that marks no answer, one line up to this long is the answer itself.
MAX_WHOLE_CHARACTERS = 80


def extracted_answer(response: str, example: Example) -> str | None:
    """Multiple choice: the letters. A number: its value. Else the marked answer, normalised; of a response that marks
    none, its only line. None where there is nothing of the kind."""
    if example.verifier == "multiple_choice":
        return chosen_letters(response, example)
    if example.verifier == "answer_after_hash":
        _, mark, text = response.rpartition("#")
        return text.strip() if mark else None
    answer = find_answer(response)
    text = answer.text
    if answer.source == "whole" and ("\n" in text or len(text) > MAX_WHOLE_CHARACTERS):
        return None
    if answer.source != "boxed":
        text = first_sentence(text)
    found = numbers(text)
    if len(found) == 1 and example.verifier == "numeric":
        value = f"{found[0].value.normalize():f}"
        return f"{value}%" if found[0].percent else value
    return normalize(text) or None
