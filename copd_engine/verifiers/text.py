"""Answers that are compared as text."""

from __future__ import annotations

import re
import unicodedata

from copd_engine.types import Example
from copd_engine.verifiers.extract import ascii_signs, find_answer

_LATEX_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf|textit)\s*\{([^{}]*)\}")
#: LaTeX that is seen but not read: sizes and math delimiters, escapes, blanks. A command's own backslash stays.
_LATEX_MARKS = re.compile(r"\\(?:left|right)(?![^\W\d_])|\\[()\[\]]|\\(?![^\W\d_]|[%#&])")
_ESCAPES = re.compile(r"\\([%#&])")
_DROPPED = frozenset("!?'\"`…$")
#: Dropped too, unless between digits or letters: 2*3, 1:2, x_1.
_INFIX = frozenset("*:_")
_SPACED = frozenset(";|~")
#: Every comma but a thousands separator.
_LIST_COMMA = re.compile(r"(?<!\d),|,(?!\d{3}(?!\d))")
_TOKEN = re.compile(r"\\?[^\W_]+|.", re.DOTALL)
_BRACKETS = {"(": ")", "[": "]", "{": "}"}
_INSIDE = re.compile(r"(?<=[(\[{]) +| +(?=[)\]}])")
_PROSE = re.compile(r"[^\W\d_]{2}")


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

    What a number or a formula needs stays, so that -3.5 %, 3.5 and 35 differ, and so do -x and x, (0, 1] and [0, 1):
    points, thousands separators, currencies, percent and other signs; a minus, unless it is a hyphen or a dash of
    words (``well-known``); brackets, unless they hold nothing but words. Where nothing would be left ("..."), the text
    stays as it is.
    """
    text = unicodedata.normalize("NFKC", text)
    text = "".join("-" if unicodedata.category(character) == "Pd" else character for character in ascii_signs(text))
    # Folding the case can leave letters that compose again, and so can a dropped sign.
    text = unicodedata.normalize("NFKC", _LATEX_TEXT.sub(r"\1", text).casefold())
    bare = _ESCAPES.sub(r"\1", _LATEX_MARKS.sub(" ", text))
    bare = unicodedata.normalize("NFKC", "".join(_keep(bare, index) for index in range(len(bare))))
    bare = _LIST_COMMA.sub(" ", bare)
    bare = _without_hyphens(_without_brackets_of_words(bare))
    return _without_articles(_INSIDE.sub("", " ".join(bare.split())).split()) or " ".join(text.split())


def matches_format(response: str, pattern: str) -> float:
    """1 where the whole response matches ``pattern`` (DOTALL), else 0.

    A pattern such as ``(a+)+b`` takes exponential time on some texts: call it through the pool.
    """
    return float(re.fullmatch(pattern, response, re.DOTALL) is not None)


def _keep(text: str, index: int) -> str:
    """The character, a blank in its place, or nothing."""
    character = text[index]
    before, after = text[index - 1 : index], text[index + 1 : index + 2]
    if character == ".":
        return character if after.isdigit() else ""
    if character in _INFIX:
        return character if before.isalnum() and after.isalnum() else ""
    category = unicodedata.category(character)
    if character in _SPACED or (category in {"Ps", "Pe"} and character not in "()[]{}"):
        return " "
    if character in _DROPPED or category in {"Pi", "Pf"}:
        return ""
    return character


def _without_brackets_of_words(text: str) -> str:
    """Blanks for pairs of brackets around words; an interval's two need not be of one kind."""
    characters = list(text)
    # Of each open bracket, and first of the text itself: where, whether a word is in it, whether more than words is.
    open_brackets = [(-1, False, False)]
    for match in _TOKEN.finditer(text):
        token, (begin, words, more) = match.group(), open_brackets[-1]
        if token in _BRACKETS:
            open_brackets.append((match.start(), False, False))
            continue
        if token in _BRACKETS.values() and len(open_brackets) > 1:
            open_brackets.pop()
            outer, outer_words, outer_more = open_brackets[-1]
            if words and not more and _BRACKETS[text[begin]] == token:
                characters[begin] = characters[match.start()] = " "
                open_brackets[-1] = (outer, True, outer_more)
            else:
                open_brackets[-1] = (outer, outer_words, True)
            continue
        is_word = _PROSE.match(token) is not None
        is_more = not (token[0].isalnum() or token.isspace() or token in ".-/%&")
        open_brackets[-1] = (begin, words or is_word, more or is_more)
    return "".join(characters)


def _without_hyphens(text: str) -> str:
    """Blanks for ``-`` and ``/`` that join a word to a word, a letter or digits."""
    tokens = _TOKEN.findall(text)
    kept = list(tokens)
    for index in range(1, len(tokens) - 1):
        before, after = tokens[index - 1], tokens[index + 1]
        joins = before[-1].isalnum() and after[0].isalnum()
        if tokens[index] in "-/" and joins and (_PROSE.match(before) or _PROSE.match(after)):
            kept[index] = " "
    return "".join(kept)


def _without_articles(tokens: list[str]) -> str:
    """Joined by blanks, without articles before a word and dashes between words. From the end, as both look ahead."""
    kept: list[str] = []
    for index in range(len(tokens) - 1, -1, -1):
        token, after = tokens[index], kept[-1] if kept else ""
        article = (token == "a" and _PROSE.match(after)) or (token in ("an", "the") and after[:1].isalnum())
        dash = token == "-" and _PROSE.match(after) and (index == 0 or _PROSE.match(tokens[index - 1]))
        if not article and not dash:
            kept.append(token)
    return " ".join(reversed(kept))
