r"""Numbers in free text, and the verifier that compares one within a tolerance."""

from __future__ import annotations

import math
import re
import unicodedata
from decimal import Context, Decimal, DecimalException, DivisionByZero, InvalidOperation
from typing import NamedTuple

from copd_engine.types import Example, UserError
from copd_engine.verifiers.extract import ascii_signs, find_answer, first_sentence

_CONTEXT = Context(prec=50, traps=[InvalidOperation, DivisionByZero])
#: What would otherwise be more digits than a float's exponent can say.
_MAX_EXPONENT = 400
_MAX_CHARACTERS = 2_000

_SUPERSCRIPT = re.compile(r"[⁻⁺]?[⁰¹²³⁴-⁹]+")
_VULGAR_FRACTION = re.compile(r"(?<=\d)(?=[¼-¾⅐-⅞])")
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}|(\d)\s*(\d))")
_WRAPPED = re.compile(r"\\(?:text|textbf|mathrm|mathbf|textit|operatorname)\s*\{([^{}]*)\}")
#: It draws together what stands around a blank: ``11,\! 111`` is one number.
_NEGATIVE_SPACE = re.compile(r"\\!\s*")
_REPLACED = (
    *((blank, "") for blank in ("\\,", "{,}", "\\;", "\u202f", "\u2009")),
    ("\\%", "%"),
    ("\\times", "*"),
    ("\\cdot", "*"),
    ("\\$", "$"),
    ("^\\circ", "°"),
    ("^{\\circ}", "°"),
    ("\\(", " "),
    ("\\)", " "),
    ("\\ ", " "),
    ("~", " "),
)
_LAST_SIDE = re.compile(r"=|≈|\\approx(?![a-z])")
_NUMBER = re.compile(
    r"""
    (?:(?<![\w.)\]%^{])(?P<sign>[-+])\s*)?          # a sign, unless something stands before it that it joins
    (?<![\w.^])(?<!\^[-+{(])(?<!\^[{(][-+])         # no part of a name, a number or an exponent
    (?:
        (?P<mixed>\d{1,18})\s+(?P<above>\d{1,18})\s*/\s*(?P<below>\d{1,18})(?![\d.])
      | (?P<digits>\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)
        (?:[eE](?P<exponent>[-+]?\d+)(?!\w)|\s*[x*]\s*10\s*(?:\^|\*\*)\s*[{(]?(?P<power>[-+]?\d+)[})]?)?
        (?:\s*/\s*(?P<divisor>\d+(?:\.\d+)?)(?![\d.]))?
    )
    (?P<percent>\s*(?:%|per\s?cent\b))?
    """,
    re.VERBOSE,
)


class Number(NamedTuple):
    """``value`` as written, before a percent sign divides it by 100."""

    value: Decimal
    percent: bool


def numeric(response: str, example: Example) -> float:
    """1 when the answer's number is the gold within ``metadata.abs_tol`` or ``metadata.rel_tol``, whichever is wider.

    Without a tolerance the values must be equal; 1/3 and 2/6 are. A marked answer must hold exactly one number (after
    the last ``=``), with a unit or not; of an unmarked response the last number counts. Where only one of answer and
    gold is a percentage, both readings count: 45 % is 45, and 0.45.
    """
    gold, absolute, relative = _gold(example)
    stated = stated_number(response)
    return float(stated is not None and is_close(stated, gold, absolute, relative))


def stated_number(response: str) -> Number | None:
    """The one number of a marked answer (after the last ``=``), the last one of an unmarked response; None without."""
    answer = find_answer(response)
    text = answer.text[-_MAX_CHARACTERS:]
    if answer.source != "whole":
        text = _LAST_SIDE.split(first_sentence(text))[-1]
    found = numbers(text)
    if not found or (answer.source != "whole" and len(found) > 1):
        return None
    return found[-1]


def is_close(answer: Number, gold: Number, abs_tol: Decimal, rel_tol: Decimal) -> bool:
    """Within the wider tolerance, ``rel_tol`` of the gold's size, in one of the readings of a percentage."""
    return any(
        _distance(*pair) <= max(abs_tol, _CONTEXT.multiply(rel_tol, pair[1].copy_abs()))
        for pair in _readings(answer, gold)
    )


def check_numeric(example: Example) -> None:
    """Raises UserError for a gold that is not one number, or a tolerance that is none."""
    _gold(example)


def numbers(text: str) -> list[Number]:
    """All numbers of ``text`` in order: thousands separators, fractions, scientific notation, LaTeX, percentages.

    Digits that belong to a name, a unit or an exponent (x1, CO2, m^2) are no numbers.
    """
    found = []
    for match in _NUMBER.finditer(_plain(text)):
        try:
            value = _value(match)
        except DecimalException:
            continue
        found.append(Number(value.copy_negate() if match["sign"] == "-" else value, match["percent"] is not None))
    return found


def _value(match: re.Match[str]) -> Decimal:
    if match["mixed"] is not None:
        part = _CONTEXT.divide(Decimal(match["above"]), Decimal(match["below"]))
        return _CONTEXT.add(Decimal(match["mixed"]), part)
    value = Decimal(match["digits"].replace(",", ""))
    exponent = int((match["exponent"] or match["power"] or "0")[:8])
    if abs(exponent) + len(match["digits"]) > _MAX_EXPONENT:
        raise InvalidOperation
    value = value.scaleb(exponent, _CONTEXT)
    return _CONTEXT.divide(value, Decimal(match["divisor"])) if match["divisor"] is not None else value


def _plain(text: str) -> str:
    """LaTeX and Unicode forms of numbers as ASCII."""
    text = _SUPERSCRIPT.sub(lambda match: "^" + unicodedata.normalize("NFKC", match.group()), text)
    text = _LATEX_FRACTION.sub(lambda m: f" {m[1] or m[3]}/{m[2] or m[4]} ", _VULGAR_FRACTION.sub(" ", text))
    text = _NEGATIVE_SPACE.sub("", text)
    for old, new in _REPLACED:
        text = text.replace(old, new)
    return _WRAPPED.sub(r" \1 ", ascii_signs(unicodedata.normalize("NFKC", text)))


def _readings(answer: Number, gold: Number) -> list[tuple[Decimal, Decimal]]:
    """Pairs (answer, gold) of which one must agree."""
    if answer.percent == gold.percent:
        return [(answer.value, gold.value)]
    if answer.percent:
        return [(answer.value, gold.value), (answer.value.scaleb(-2, _CONTEXT), gold.value)]
    return [(answer.value, gold.value), (answer.value, gold.value.scaleb(-2, _CONTEXT))]


def _distance(answer: Decimal, gold: Decimal) -> Decimal:
    return _CONTEXT.abs(_CONTEXT.subtract(answer, gold))


def _gold(example: Example) -> tuple[Number, Decimal, Decimal]:
    """The number, its absolute and its relative tolerance."""
    found = numbers(_LAST_SIDE.split(example.answer)[-1])
    if len(found) != 1:
        raise UserError(f"{example.name}: verifier 'numeric': answer = {example.answer!r}: must be one number")
    return found[0], _tolerance(example, "abs_tol"), _tolerance(example, "rel_tol")


def _tolerance(example: Example, key: str) -> Decimal:
    value = example.metadata.get(key, 0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise UserError(
            f"{example.name}: verifier 'numeric': metadata.{key} = {value!r}: must be a number that is at least 0"
        )
    return Decimal(repr(value))
