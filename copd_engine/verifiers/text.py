"""Answers that are compared as text."""

from __future__ import annotations

import re
import unicodedata

from copd_engine.types import Example
from copd_engine.verifiers.extract import ascii_signs, find_answer

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_LATEX_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf|textit)\s*\{([^{}]*)\}")
_DROPPED = frozenset(".,;:!?'\"`*_…$")
_SPACED = frozenset("/\\|~")


def answer_after_hash(response: str, example: Example) -> float:
    """1 when the text after the last ``#``, stripped, is the answer; 0 without ``#``."""
    _, hash_mark, answer = response.rpartition("#")
    return float(bool(hash_mark) and answer.strip() == example.answer)


def exact(response: str, example: Example) -> float:
    """1 when the whole response or the answer that it states, stripped, is the answer, letter by letter.

    A sentence's full stop is no part of the answer: "The answer is Paris." gives Paris.
    """
    if response.strip() == example.answer.strip():
        return 1.0
    answer = find_answer(response)
    stated = [answer.text, answer.text.removesuffix(".")] if answer.source == "statement" else [answer.text]
    return float(example.answer.strip() in stated)


def normalized(response: str, example: Example) -> float:
    """As :func:`exact` after :func:`normalize` of both."""
    gold = normalize(example.answer)
    return float(gold in (normalize(response), normalize(find_answer(response).text)))


def normalize(text: str) -> str:
    """Without what does not change an answer: case, articles, punctuation, kinds of blanks, width (Unicode NFKC).

    A full stop, comma or minus that belongs to a number stays, and so do currencies, percent and other signs, so that
    -3.5 %, 3.5 and 35 differ. Where nothing would be left ("A", "..."), less is taken away.
    """
    text = _LATEX_TEXT.sub(r"\1", ascii_signs(unicodedata.normalize("NFKC", text))).casefold()
    # Folding the case can leave letters that compose again.
    text = unicodedata.normalize("NFKC", text)
    bare = "".join(_keep(text, index) for index in range(len(text)))
    for candidate in (_ARTICLES.sub(" ", bare), bare, text):
        words = " ".join(candidate.split())
        if words:
            return words
    return ""


def matches_format(response: str, pattern: str) -> float:
    """1 where the whole response matches ``pattern`` (DOTALL), else 0.

    A pattern such as ``(a+)+b`` takes exponential time on some texts: call it through the pool.
    """
    return float(re.fullmatch(pattern, response, re.DOTALL) is not None)


def _keep(text: str, index: int) -> str:
    """The character, a blank in its place, or nothing."""
    character = text[index]
    before, after = text[index - 1 : index], text[index + 1 : index + 2]
    if character in ".," and after.isdigit() and (before.isdigit() or character == "."):
        return character
    if character == "-":
        sign = after.isdigit() or after == "."
        return "-" if sign and not before.isalnum() else " "
    category = unicodedata.category(character)
    if character in _SPACED or category in {"Ps", "Pe", "Pd"}:
        return " "
    if character in _DROPPED or category in {"Pi", "Pf"}:
        return ""
    return character
