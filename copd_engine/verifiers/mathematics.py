r"""Mathematical answers, compared by math-verify; what it takes too easily is refused first.

It finds 7 + 9 equal to 16, so a policy could restate the problem. Therefore an answer must be in final form: where the
gold is a number, so must be the answer (:func:`is_plain_number`), each member of a set or interval too; where the gold
has no integral, sum, product, limit or derivative, the answer may have none.
"""

from __future__ import annotations

import logging
import re
from decimal import Decimal
from functools import lru_cache
from typing import Any

from copd_engine.types import Example, UserError
from copd_engine.verifiers.extract import Answer, ascii_signs, find_answer, first_sentence
from copd_engine.verifiers.numeric import is_close, numbers
from copd_engine.verifiers.pool import Job
from copd_engine.verifiers.text import normalize

#: No final answer is longer; parsing takes time that grows faster than the text.
MAX_ANSWER_CHARACTERS = 1_000
#: Of a response that marks no answer, so much of its end is read.
_MAX_WHOLE_CHARACTERS = 2_000

_FUNCTIONS = r"(?:a|arc)?(?:sin|cos|tan|sec|csc|cot)h?|log|exp|sqrt|max|min|gcd|lcm|mod|inf|det|deg"
_WORD = re.compile(rf"(?<![\\A-Za-z])(?!(?:{_FUNCTIONS})(?![A-Za-z]))[A-Za-z]{{3,}}")
_COMMAND = re.compile(r"\\(?:text|textbf|mathrm|mathbf|textit|operatorname)\s*(?=\{)|\\[A-Za-z]+")
_PROSE_ONLY = re.compile(r"(?:[^\W\d_]|[\s'.,()-])+")
_MIXED = re.compile(r"(?<![\d.])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d.])")
_EXPONENT = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?|\.\d+)[eE]([-+]?\d+)(?!\w)")
_UNMARKED_UNIT = re.compile(r"\\(?:text|mathrm)\s*\{([^{}]*)\}")

#: A number in a typeface of its own, and one in brackets.
_TYPEFACE = re.compile(r"\\(?:text|textbf|mathrm|mathbf|boldsymbol|bm)\s*\{\s*([-+\d.,/\s]*\d[-+\d.,/\s]*)\}")
_BRACKETED = re.compile(r"^\(([^(),]*)\)$")
#: A negative space draws together what stands around a blank: ``11,\! 111`` is one number.
_THIN_SPACING = re.compile(r"(?<!\\)\\!\s*|(?<!\\)\\[,;:]")
_SPACING = re.compile(r"(?<!\\)\\(?: |quad\b|qquad\b)|~")
_DECIMAL = r"(?:\d{1,3}(?:(?:,|\{,\})\d{3})+(?:\.\d+)?|\d+(?:\.\d*)?|\.\d+)"
_QUOTIENT = r"(?:\\[dt]?frac\s*\{\s*-?\d+\s*\}\s*\{\s*-?\d+\s*\}|\d+\s*/\s*\d+)"
_PLAIN_NUMBER = re.compile(
    rf"[-+]?\s*(?:\d*\s*{_QUOTIENT}|{_DECIMAL}(?:\s*(?:\\times|\\cdot|\*)\s*10\s*(?:\^|\*\*)\s*\{{?\s*[-+]?\d+\s*\}}?)?)"
    r"\s*(?:\\?%|\^\s*\{?\s*\\circ\s*\}?|°)?\s*\.?"
)
#: Numbers that take ages to work out: a power of a power of numbers, long exponents, large factorials.
_HUGE = re.compile(r"(?:\^|\*\*)[\s{(]*-?\d[\d.]*[\s})]*(?:\^|\*\*)|(?:\^|\*\*)[\s{(]*-?\d{6}|\d{5}[\s})]*!|![\s})]*!")
_QUOTIENT_ANYWHERE = re.compile(r"\\[dt]?frac|/")
_EQUALS = re.compile(r"(?<![<>!\\])=|\\approx(?![a-z])|≈")
#: A left side that only names what is on the right: ``x``, ``y_1``, ``f(x)``, ``m\angle A``, ``\text{area}``.
_NAME = re.compile(
    r"\s*(?:m?\s*\\angle\s*)?(?:\\(?:text|mathrm|operatorname)\s*\{[^{}]*\}|\\?[A-Za-z]+)"
    r"(?:_(?:\w|\{[^{}]*\}))?'*\s*(?:\([^()]*\))?\s*"
)
#: math-verify takes these letters at the end, after a blank, for units.
_LAST_FACTOR = re.compile(r"(?<=[A-Za-z])\s+([cdghlmost])\s*$")
#: math-verify rounds to six decimals, so that 0.333333 is 1/3; of a small number that leaves few digits or none.
_MAX_RELATIVE_ERROR = Decimal("5e-6")


def math_job(response: str, example: Example) -> Job | float:
    """1 when the response's final expression is in final form and equals the gold by math-verify.

    Numbers in any notation (fraction, decimal, percentage, 3 x 10^5, with a unit), symbolic expressions, intervals,
    sets, tuples, matrices, equations. A percentage equals its number and its hundredth. A gold of words ("no solution")
    is compared as :func:`normalized` text. What needs algebra is a job for a worker: some texts take for ever.
    """
    gold, answer = example.answer.strip(), find_answer(response)
    if gold in (response.strip(), answer.text):
        return 1.0
    if _is_prose(gold):
        last_line = answer.text.rpartition("\n")[2]
        return float(normalize(gold) in {normalize(text) for text in (answer.text, first_sentence(last_line))})
    text = answer.text[-_MAX_WHOLE_CHARACTERS:] if answer.source == "whole" else answer.text
    if not text or (answer.source != "whole" and len(text) > MAX_ANSWER_CHARACTERS):
        return 0.0
    if _HUGE.search(text) and not _HUGE.search(gold):
        return 0.0
    return Job(compare, (answer._replace(text=text), gold), _prepare)


def compare(answer: Answer, gold: str) -> float:
    """1 when math-verify finds ``answer``, in final form, equal to ``gold``."""
    try:
        return float(_matches(answer, gold))
    except MemoryError:
        raise
    except Exception:  # sympy and the LaTeX grammar raise of all kinds on free text: an unreadable answer is wrong
        return 0.0


def check_math(example: Example) -> None:
    """Raises UserError for a gold with braces that do not match, which no LaTeX parser can read."""
    depth = 0
    for brace in re.findall(r"\\.|[{}]", example.answer):
        depth += {"{": 1, "}": -1}.get(brace, 0)
        if depth < 0:
            break
    if depth or not example.answer.strip():
        raise UserError(
            f"{example.name}: verifier 'math': answer = {example.answer[:80]!r}: must be LaTeX whose braces match"
        )


def _prepare(answer: Answer, gold: str) -> None:
    """Import math-verify and build its grammar."""
    # It warns that its timeouts are off: they use signals, which only the main thread may; the pool has a limit.
    logging.getLogger("math_verify.parser").setLevel(logging.ERROR)
    logging.getLogger("math_verify.grader").setLevel(logging.ERROR)
    _warm_up()


@lru_cache(maxsize=1)
def _warm_up() -> None:
    """The first comparison of a process costs much more than the others: grammars, tables of sympy."""
    for answer, gold in (("2x + 1", "1+2x"), (r"(-\infty, 2]", r"(-\infty, 3]"), (r"\sqrt{8}", r"2\sqrt{2}")):
        compare(Answer(answer, "boxed"), gold)


def is_plain_number(text: str) -> bool:
    """Integer, decimal, fraction of integers, mixed number, percentage, angle or ``a x 10^n``: nothing to work out."""
    return _PLAIN_NUMBER.fullmatch(_BRACKETED.sub(r"\1", text.strip())) is not None


def _matches(answer: Answer, gold_text: str) -> bool:
    from math_verify import verify

    gold = _parsed_first(_readings(Answer(gold_text, "boxed")))
    for reading in _readings(answer):
        target = _parsed(reading)
        if not gold or not target or not _in_final_form(gold, target):
            continue
        if verify(gold, target, timeout_seconds=None) and _is_close(gold[-1], target[-1]):
            return True
    return False


def _readings(answer: Answer) -> list[str]:
    """Texts to parse, most literal first: as LaTeX, or where there are words around it ("16 apples") as prose."""
    if answer.source == "whole":
        text = answer.text
    else:
        text = answer.text if answer.source == "boxed" else first_sentence(answer.text)
    text = _SPACING.sub(" ", _THIN_SPACING.sub("", ascii_signs(text))).replace("\\$", "")
    if text.count("$") == 1:  # a currency, no delimiter
        text = text.replace("$", "")
    text = _EXPONENT.sub(r"\1 \\times 10^{\2}", _MIXED.sub(r"\1\\frac{\2}{\3}", text))
    text = _TYPEFACE.sub(r"\1", text)
    delimited = any(mark in text for mark in ("$", "\\(", "\\[", "\\boxed"))
    words = _WORD.search(_COMMAND.sub(" ", text)) is not None
    if not words and (_is_equation(text) or re.search(r"\d", text) is None):
        text = _LAST_FACTOR.sub(r" {\1}", text)
    if answer.source == "whole":
        return [text] if words or delimited else [f"\\boxed{{{text}}}"]
    readings = [text] if delimited else [f"\\boxed{{{text}}}"]
    if words and not delimited and len(re.findall(r"\d+(?:[.,/]\d+)*", text)) == 1:
        # The number alone; of several it would be anybody's guess which one is meant.
        readings = [_UNMARKED_UNIT.sub(r" \1 ", text)]
    return readings


def _parsed_first(readings: list[str]) -> list[Any]:
    return next((parsed for reading in readings if (parsed := _parsed(reading))), [])


@lru_cache(maxsize=256)
def _parsed(text: str) -> list[Any]:
    """What math-verify makes of it: [expression, its text], the text alone, or nothing."""
    from math_verify import parse

    parsed: list[Any] = parse(text, parsing_timeout=None)
    return parsed


def _in_final_form(gold: list[Any], target: list[Any]) -> bool:
    gold_expression, target_expression = gold[0], target[0]
    gold_text, text = _last_side(gold[-1]), _last_side(target[-1])
    equation = _is_equation(gold[-1])
    if is_plain_number(gold_text) and not equation:
        if not is_plain_number(text):
            return False
        # An integer is not finished as 32/2, unless the gold is no better.
        whole = getattr(gold_expression, "is_Integer", False) and not _QUOTIENT_ANYWHERE.search(gold_text)
        return not whole or not _QUOTIENT_ANYWHERE.search(text)
    if isinstance(gold_expression, str) or isinstance(target_expression, str):
        return True
    from sympy import Derivative, Integral, Limit, Product, Sum

    operators = (Integral, Sum, Product, Limit, Derivative)
    if target_expression.has(*operators) and not gold_expression.has(*operators):
        return False
    return equation or not _has_only_numbers(gold_expression) or _has_only_numbers(target_expression)


def _last_side(text: str) -> str:
    """After the last equals sign: "7 + 9 = 16" states 16."""
    return _EQUALS.split(text)[-1]


def _is_equation(text: str) -> bool:
    """``x^2 + y = 0``, whose right side is not the answer; not ``x = 3`` and not ``7 + 9 = 16``."""
    left, *others = _EQUALS.split(text)
    return bool(others) and re.search("[A-Za-z]", _COMMAND.sub(" ", left)) is not None and not _NAME.fullmatch(left)


def _is_close(gold: str, text: str) -> bool:
    """False for two numbers that differ by more than :data:`_MAX_RELATIVE_ERROR` of the gold."""
    sides = [_last_side(gold), _last_side(text)]
    found = [numbers(side) for side in sides]
    if _is_equation(gold) or not all(map(is_plain_number, sides)) or any(len(side) != 1 for side in found):
        return True
    return is_close(found[1][0], found[0][0], Decimal(0), _MAX_RELATIVE_ERROR)


def _has_only_numbers(expression: Any) -> bool:
    """A number, or a set, tuple, interval or matrix of numbers, all worked out."""
    from sympy import And, Eq, MatrixBase, Mul, Number, Pow, Set, Tuple, UnevaluatedExpr
    from sympy.logic.boolalg import BooleanAtom

    if isinstance(expression, MatrixBase):
        return all(_has_only_numbers(entry) for entry in expression.flat())
    if isinstance(expression, Eq):
        return _has_only_numbers(expression.rhs)
    if isinstance(expression, Set | Tuple | And):
        return all(_has_only_numbers(part) for part in expression.args if not isinstance(part, BooleanAtom))
    if isinstance(expression, Mul) and len(expression.args) == 2:
        number, factor = expression.args
        power_of_ten = isinstance(factor, Pow) and factor.base == 10 and bool(factor.exp.is_Integer)
        return isinstance(number, Number) and (isinstance(factor, UnevaluatedExpr) or power_of_ten)
    return isinstance(expression, Number)


def _is_prose(gold: str) -> bool:
    """Words without digits or operators, in ``\\text{}`` or not."""
    bare = ascii_signs(_UNMARKED_UNIT.sub(r"\1", gold))
    return _PROSE_ONLY.fullmatch(bare) is not None and _WORD.search(bare) is not None
