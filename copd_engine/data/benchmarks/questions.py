r"""From a row of a benchmark's file to a question: text, options, gold, media."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from copd_engine.types import UserError
from copd_engine.verifiers.choice import LETTERS
from copd_engine.verifiers.numeric import numbers

Row = Mapping[str, Any]

IMAGE = "<image>"
REASON = "Please reason step by step, and put "
FREE_FORM = REASON + r"your final answer within \boxed{}."
LETTER = REASON + r"the letter of the correct option within \boxed{}."
#: "A. x; B. y" or one option a line: where the next option begins.
_LABEL = re.compile(r"(?:^|[;\n])\s*\(?([A-J])\s*[).:\uff1a]\s*")
#: What no word has: a LaTeX command other than for a typeface, a power, a root ...
_MATHEMATICS = re.compile(r"\\(?!(?:text|textbf|mathrm|mathbf|textit)\b)[A-Za-z]+|[\^√π∞]")
#: ... or, without two letters in a row, an operator or a bracket beside a digit or a variable.
_FORMULA = re.compile(
    r"(?!.*[^\W\d_]{2})(?=.*[\da-z])(?=.*[-\u2212+*/=<>(\[{])[\w\s.,$|°\u2212+*/=<>(){}\[\]-]+", re.DOTALL
)
_DIGITS = r"\$?\d+(?:\.\d+)?"
#: Ranges, scores, dates: 10-20, 3-1, 2021-05-03, 12/25/2020, $5-$10. Of one slash it is a fraction.
_JOINED_NUMBERS = re.compile(rf"[-\u2212]?(?!{_DIGITS}\s*/\s*{_DIGITS}$){_DIGITS}(?:\s*[-\u2212/]\s*{_DIGITS})+")
_NUMBERED_IMAGE = re.compile(r"<image\s*(\d+)>")


@dataclass(frozen=True)
class Question:
    """``text`` ends without an instruction. ``images`` and ``videos`` as an :class:`Example` takes them; ``options``
    letter to text, shown after the text unless ``shown`` is false. ``kind``: set for rows that are another form of rows
    with the same names. ``group``: where it is no column of the row."""

    text: str
    answer: str
    verifier: str = "math"
    options: Mapping[str, str] = field(default_factory=dict)
    shown: bool = True
    images: tuple[Any, ...] = ()
    videos: tuple[Any, ...] = ()
    fps: float = 2.0
    kind: str = ""
    group: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prompt(self) -> str:
        """Text, options and instruction."""
        lines = [self.text.strip()]
        if self.shown and self.options:
            lines += ["Options:", *(f"{letter}. {text}" for letter, text in self.options.items())]
        return "\n".join([*lines, LETTER if self.verifier == "multiple_choice" else FREE_FORM])


class Media:
    """Media files that a row names: beside the data file ``file`` or one folder above, in one of ``folders`` or not."""

    def __init__(self, file: Path, folders: Sequence[str] = ()) -> None:
        self.file = file
        self._places = [base / folder for base in (file.parent, file.parent.parent) for folder in ("", *folders)]

    def find(self, *names: str) -> Path:
        """The first of ``names`` that exists in one of the places, else the first name beside the data file."""
        found = (place / name for name in names for place in self._places if (place / name).exists())
        return next(found, self.file.parent / names[0])

    def image(self, value: Any) -> Path | bytes:
        """A path, bytes, or ``{bytes, path}`` as Hugging Face writes images into Parquet."""
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes) and value:
            return value
        if not isinstance(value, str) or not value:
            raise UserError(f"an image must be a path or bytes, it is {type(value).__name__}")
        return self.find(value)


# Options


def options_of(value: Any) -> dict[str, str]:
    """Letter to text of a mapping, a list, a list written as Python text, or "A. x; B. y"; {} where there is none.

    UserError for more than ten options.
    """
    if isinstance(value, str):
        value = _from_text(value)
    if isinstance(value, Mapping):
        return {str(letter).strip(): str(text).strip() for letter, text in value.items() if _filled(text)}
    items = [str(item).strip() for item in value or ()]
    if len(items) > len(LETTERS):
        raise UserError(f"{len(items)} options: at most {len(LETTERS)} have letters")
    labels = [_LABEL.match(item) for item in items]
    if items and all(label and label[1] == letter for label, letter in zip(labels, LETTERS, strict=False)):
        items = [_LABEL.sub("", item, count=1).strip() for item in items]
    return dict(zip(LETTERS, items, strict=False))


def _filled(text: Any) -> bool:
    return text is not None and str(text).strip() != ""


def _from_text(text: str) -> Any:
    if text.lstrip().startswith(("[", "{")):
        try:
            return ast.literal_eval(text.strip())
        except (ValueError, SyntaxError):
            raise UserError(f"options = {text[:80]!r}: must be a Python list") from None
    return labelled(text)[1]


def labelled(text: str) -> tuple[str, dict[str, str]]:
    """What stands before the options of ``text``, and the options: labels A, B, C ... in order, at least two."""
    labels = list(_LABEL.finditer(text))
    if len(labels) < 2 or "".join(label[1] for label in labels) != LETTERS[: len(labels)]:
        return text, {}
    ends = [*(label.start() for label in labels[1:]), len(text)]
    options = {label[1]: text[label.end() : end].strip() for label, end in zip(labels, ends, strict=True)}
    return text[: labels[0].start()].strip(), options


def choice(question: Question, gold: Any, text_first: bool = False) -> Question:
    """``question`` as multiple choice. ``gold``: a letter, or (looked for first if ``text_first``) an option's text.

    UserError for a gold that is neither.
    """
    gold = str(gold).strip()
    by_text = [letter for letter, text in question.options.items() if text == gold]
    letter = gold.strip("().") if gold.strip("().") in question.options else None
    candidates = [*by_text[:1], letter] if text_first else [letter, *by_text[:1]]
    answer = next((candidate for candidate in candidates if candidate), None)
    if answer is None:
        raise UserError(f"answer = {gold[:80]!r}: is none of the options {', '.join(question.options) or '(none)'}")
    # Options that are pictures may have no text; then letters alone are compared.
    named = bool(question.options) and all(question.options.values())
    metadata = {**question.metadata, **({"choices": dict(question.options)} if named else {})}
    return replace(question, answer=answer, verifier="multiple_choice", metadata=metadata)


def free_gold(question: Question, gold: Any, abs_tol: float = 0.0) -> Question:
    """``question`` with a free gold: one number within ``abs_tol``, mathematics, or else text compared without case
    and punctuation; so are numbers that a dash or slash joins, but for a fraction."""
    text = str(gold).strip()
    found = numbers(text)
    bare = text.strip("$%° ").replace(",", "")
    if len(found) == 1 and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?|[-+]?\d+/\d+", bare, re.IGNORECASE):
        return replace(question, answer=text, verifier="numeric", metadata={**question.metadata, "abs_tol": abs_tol})
    formula = _FORMULA.fullmatch(text) and not _JOINED_NUMBERS.fullmatch(text)
    is_math = _MATHEMATICS.search(text) or formula
    matched = text.count("{") == text.count("}")
    return replace(question, answer=text, verifier="math" if is_math and matched else "normalized")


def with_images(question: Question, images: Mapping[int, Any], media: Media) -> Question:
    """``<image 2>`` of text and options as our markers with ``images[2]``, each image once, where it is named first; a
    number without an image of its own stays as the words "image 2". Images that are not named stand in front."""
    order: list[int] = []

    def marker(match: re.Match[str]) -> str:
        number = int(match[1])
        if number in images and number not in order:
            order.append(number)
            return IMAGE
        return f"image {number}"

    text = _NUMBERED_IMAGE.sub(marker, question.text)
    options = {letter: _NUMBERED_IMAGE.sub(marker, option) for letter, option in question.options.items()}
    front = [number for number in images if number not in order]
    if order:
        text = IMAGE * len(front) + text
    numbered = (*front, *order)
    return replace(
        question, text=text, options=options, images=tuple(media.image(images[number]) for number in numbered)
    )
