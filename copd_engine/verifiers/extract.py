r"""Where in a response the answer stands.

What a model thought (``<think>...</think>``) is left out. Of the rest counts, in this order: the last
``<answer>...</answer>``, the last ``\boxed{...}`` whose braces close, the rest of the line after the last "the (final)
answer is", "answer:" or "####", else the whole. All of it takes time in proportion to the text.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

#: Answers stand at the end: of a longer response only so many characters are searched.
TAIL_CHARACTERS = 20_000

_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_STATEMENT = re.compile(
    r"####|(?<![A-Za-z])answers?\b(?P<between>[^\n:=.#]{0,60}?)(?:\b(?:is|are|be|equals)\b|[:=])", re.IGNORECASE
)
#: Signs that look alike, as ASCII: minus and dashes, quotes, times, fraction slash.
_ASCII_SIGNS = str.maketrans(
    {0x2212: "-", 0x2013: "-", 0x2014: "-", 0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"'}
    | {0x00D7: "*", 0x00B7: "*", 0x22C5: "*", 0x2044: "/"}
)
_SENTENCE_END = re.compile(r"[.!?]\s+(?=[A-Z])")


class Answer(NamedTuple):
    """``text``, stripped, and how it was marked as the answer; ``whole`` is a response that marks none."""

    text: str
    source: Literal["tag", "boxed", "statement", "whole"]


def find_answer(response: str) -> Answer:
    """The answer that ``response`` ends with."""
    text = without_thinking(response)[-TAIL_CHARACTERS:]
    before, tag, _ = text.rpartition("</answer>")
    if tag and "<answer>" in before:
        inside = before.rpartition("<answer>")[2].strip()
        # A model told to do both writes <answer>\boxed{7}</answer>.
        boxed = last_boxed(inside)
        return Answer(inside if boxed is None else boxed, "tag")
    boxed = last_boxed(text)
    if boxed is not None:
        return Answer(boxed, "boxed")
    statement = last_statement(text)
    if statement:
        return Answer(statement, "statement")
    return Answer(text.strip(), "whole")


def extract_answer(response: str) -> str:
    """Text of :func:`find_answer`."""
    return find_answer(response).text


def without_thinking(response: str) -> str:
    """The response outside ``<think>...</think>``.

    A template may open the thinking in the prompt, so that only ``</think>`` is in the response; a response cut while
    thinking has no answer.
    """
    *thoughts, rest = response.split("</think>")
    outside = [thought.partition("<think>")[0] for thought in thoughts if "<think>" in thought]
    return "".join([*outside, rest.partition("<think>")[0]])


def last_boxed(text: str) -> str | None:
    r"""Content of the last ``\boxed{...}`` with balanced braces, of nested ones the inner; None without one."""
    open_braces: list[int | None] = []
    last: tuple[int, int] | None = None
    for match in _BRACES.finditer(text):
        token = match.group()
        if token == "}":
            start = open_braces.pop() if open_braces else None
            if start is not None and (last is None or start > last[0]):
                last = (start, match.start())
        elif token == "{":
            open_braces.append(None)
        elif token[-1] == "{" and len(token) > 2:
            open_braces.append(match.end())
    return None if last is None else text[slice(*last)].strip()


def last_statement(text: str) -> str:
    """Rest of the line (or the next line) after the last "answer is", "answer:" or "####"; "" without one."""
    statements = list(_STATEMENT.finditer(text))
    if not statements:
        return ""
    rest = text[statements[-1].end() :].lstrip(" \t\r\n:*")
    return rest.partition("\n")[0].strip().strip("*").strip()


def ascii_signs(text: str) -> str:
    """``text`` with ASCII in place of typographic minus signs, dashes, quotes, times signs and fraction slashes."""
    return text.translate(_ASCII_SIGNS)


def first_sentence(text: str) -> str:
    """``text`` up to the end of its first sentence: "42. I hope it is correct." is "42"."""
    end = _SENTENCE_END.search(text)
    return (text[: end.start()] if end else text).strip().removesuffix(".").strip()
