"""Numbers in the forms that models write them, and the tolerance."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from copd_engine.types import Example, UserError
from copd_engine.verifiers import check_example, get_verifier
from copd_engine.verifiers.numeric import Number, numbers


def gold(answer: str, **metadata: Any) -> Example:
    return Example(uid="row-1", prompt="?", answer=answer, verifier="numeric", metadata=metadata)


def score(response: str, answer: str, **metadata: Any) -> float:
    return get_verifier("numeric")(response, gold(answer, **metadata))


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("42", "42"),
        ("42.0", "42"),
        ("-42", "-42"),
        ("\u221242", "-42"),
        ("+42", "42"),
        (".5", "0.5"),
        ("42.", "42"),
        ("1,234,567", "1234567"),
        ("1,234.50", "1234.5"),
        (r"\boxed{1{,}234}", "1234"),
        (r"\boxed{1\,234}", "1234"),
        ("1234567", r"1,\! 234,\! 567"),
        ("1\u202f234", "1234"),
        ("1e3", "1000"),
        ("3.2e-4", "0.00032"),
        ("3.2 \u00d7 10^5", "320000"),
        ("3.2 \u00d7 10\u2075", "320000"),
        (r"\boxed{3.2 \times 10^{5}}", "320000"),
        (r"\boxed{3.2 \cdot 10^{-2}}", "0.032"),
        ("3.2*10**5", "320000"),
        ("1/2", "0.5"),
        (r"\boxed{\frac{1}{2}}", "0.5"),
        (r"\boxed{\frac12}", "0.5"),
        ("1/3", "2/6"),
        ("1 1/2", "1.5"),
        ("1\u00bd", "1.5"),
        ("-1 1/2", "-1.5"),
        # units
        ("42 km", "42"),
        ("42km", "42"),
        ("$42", "42"),
        (r"\$42", "42"),
        ("\u20ac42", "42"),
        (r"\boxed{42 \text{ m}^2}", "42"),
        ("42 m\u00b2", "42"),
        (r"\boxed{42^\circ}", "42"),
        ("42 g of CO2", "42"),
        ("The answer is 42 m/s.", "42"),
        ("42", "42 km"),
        # percent
        ("45%", "45%"),
        ("45%", "45"),
        ("45%", "0.45"),
        ("45", "45%"),
        ("0.45", "45%"),
        (r"\boxed{45\%}", "45"),
        ("45 percent", "45"),
        # where it stands
        ("The answer is 42.", "42"),
        ("The final answer is $42$. I hope it is correct in 7 ways.", "42"),
        ("**Answer: 42**", "42"),
        ("#### 42", "42"),
        ("<answer>x = 42</answer>", "42"),
        ("<think>7</think>It is 42", "42"),
        ("40 + 2 = 42", "42"),
        ("first 7, then 42", "42"),
        (r"7 \boxed{42} 8", "42"),
        ("The answer is x \u2248 3.14", "3.14"),
    ],
)
def test_accepted(response: str, answer: str) -> None:
    assert score(response, answer) == 1.0


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("", "42"),
        ("forty-two", "42"),
        ("43", "42"),
        ("-42", "42"),
        ("4.2", "42"),
        ("4 2", "42"),
        ("42,5", "42"),
        ("x42", "42"),
        ("CO2", "2"),
        ("5 m^2", "2"),
        ("10^-42", "-42"),
        (r"\boxed{40 + 2}", "42"),
        (r"\boxed{42 \text{ or } 43}", "42"),
        ("<answer>42, 43</answer>", "43"),
        ("<answer>41-42</answer>", "42"),
        ("The answer is between 41 and 42.", "42"),
        ("The answer is 42 = 43", "42"),
        ("<answer>12/25/2020</answer>", "2020"),
        ("45", "0.45"),
        ("0.45", "45"),
        ("45%", "4500"),
        ("50%", "0.5%"),
        ("1/0", "0"),
        ("0/0", "0"),
        ("nan", "0"),
        ("inf", "0"),
        ("1e999999999999", "42"),
        ("12345678901234567890", "12345678901234567891"),
        ("0.1", "0.10000000000000000001"),
        ("<think>42</think>", "42"),
        ("<think>it is 42", "42"),
    ],
)
def test_rejected(response: str, answer: str) -> None:
    assert score(response, answer) == 0.0


@pytest.mark.parametrize(
    ("response", "tolerance", "expected"),
    [
        ("99.5", {"abs_tol": 0.5}, 1.0),
        ("100.5", {"abs_tol": 0.5}, 1.0),
        ("100.51", {"abs_tol": 0.5}, 0.0),
        ("101", {"rel_tol": 0.01}, 1.0),
        ("99", {"rel_tol": 0.01}, 1.0),
        ("101.001", {"rel_tol": 0.01}, 0.0),
        ("101", {"rel_tol": 0.001, "abs_tol": 1}, 1.0),
        ("101", {"rel_tol": 0.01, "abs_tol": 0.1}, 1.0),
        ("100", {"abs_tol": 0}, 1.0),
        ("100.0001", {}, 0.0),
        ("301/3", {"abs_tol": 0.34}, 1.0),
    ],
)
def test_tolerance(response: str, tolerance: dict[str, float], expected: float) -> None:
    assert score(response, "100", **tolerance) == expected


def test_numbers() -> None:
    assert numbers("From 1,200 to -3.5e2 and 7 % of x1") == [
        Number(Decimal(1200), False),
        Number(Decimal(-350), False),
        Number(Decimal(7), True),
    ]


@given(response=st.text() | st.text(alphabet="0123456789.,eE+-/*^%x\u00d7\\{}$ ", max_size=80))
def test_never_raises(response: str) -> None:
    assert score(response, "42", rel_tol=0.1) in (0.0, 1.0)


@given(
    value=st.decimals(-(10**12), 10**12, places=6) | st.integers(-(10**30), 10**30),
    form=st.sampled_from(["{}", r"\boxed{{{}}}", "The answer is {}.", "<answer>{} kg</answer>", "it is ${}$"]),
)
def test_the_gold_is_accepted_and_its_neighbour_is_not(value: Decimal | int, form: str) -> None:
    check_example(gold(str(value)))
    assert score(form.format(value), str(value)) == 1.0
    assert score(form.format(value + 1), str(value)) == 0.0
    assert score(form.format(value + 1), str(value), abs_tol=1.5) == 1.0


@given(value=st.integers(1000, 10**12), decimals=st.integers(0, 999))
def test_thousands_separators_change_nothing(value: int, decimals: int) -> None:
    assert score(f"{value:,}.{decimals:03d}", f"{value}.{decimals:03d}") == 1.0


@pytest.mark.parametrize(
    ("answer", "metadata", "message"),
    [
        ("many", {}, r"row-1.*verifier 'numeric': answer = 'many': must be one number"),
        ("1 or 2", {}, "must be one number"),
        ("1/0", {}, "must be one number"),
        ("42", {"abs_tol": "x"}, r"metadata\.abs_tol = 'x': must be a number that is at least 0"),
        ("42", {"rel_tol": -1}, r"metadata\.rel_tol = -1: must be a number that is at least 0"),
        ("42", {"abs_tol": float("nan")}, "at least 0"),
        ("42", {"abs_tol": True}, "at least 0"),
        ("42", {"abs_tol": None}, "at least 0"),
    ],
)
def test_bad_rows(answer: str, metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_example(gold(answer, **metadata))
