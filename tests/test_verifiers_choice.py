"""Multiple choice: answers in the forms that models write them, and what settles on nothing."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from copd_engine.types import Example, UserError
from copd_engine.verifiers import check_example, get_verifier

CITIES = ["Paris", "Rome", "Berlin", "The Hague"]


def gold(answer: str, choices: Any = None) -> Example:
    metadata = {} if choices is None else {"choices": choices}
    return Example(uid="row-1", prompt="?", answer=answer, verifier="multiple_choice", metadata=metadata)


def score(response: str, answer: str, choices: Any = None) -> float:
    return get_verifier("multiple_choice")(response, gold(answer, choices))


ACCEPTED = [
    ("B", "B"),
    ("b", "B"),
    (" B\n", "B"),
    ("(B)", "B"),
    ("[B]", "B"),
    ("(b)", "B"),
    ("B.", "B"),
    ("B)", "B"),
    ("B:", "B"),
    ("**B**", "B"),
    ("**B.**", "B"),
    ("**(B)**", "B"),
    ("`B`", "B"),
    ("$B$", "B"),
    (r"\boxed{B}", "B"),
    (r"\boxed{\text{B}}", "B"),
    (r"\boxed{\textbf{(B)}}", "B"),
    (r"\boxed{(B)}", "B"),
    (r"\boxed{B.}", "B"),
    (r"$\boxed{\mathrm{B}}$", "B"),
    (r"\boxed{\text{(B) } 12}", "B"),
    (r"\boxed{B) 12}", "B"),
    ("<answer>B</answer>", "B"),
    ("<answer>(B)</answer>", "B"),
    ("<answer> B. 12 </answer>", "B"),
    ("<think>A or C?</think><answer>B</answer>", "B"),
    ("<think>A or C?</think>B", "B"),
    ("Answer: B", "B"),
    ("Answer: B) Rome", "B"),
    ("Answer: (B) Rome", "B"),
    ("**Answer:** B", "B"),
    ("**Answer: B**", "B"),
    ("ANSWER: B", "B"),
    ("Answer:\nB", "B"),
    ("The answer is B", "B"),
    ("The answer is B.", "B"),
    ("the answer is (B).", "B"),
    ("The answer is b", "B"),
    ("The correct answer is **B**.", "B"),
    ("The final answer is $\\boxed{B}$. I hope it is correct.", "B"),
    ("The answer is option B.", "B"),
    ("The answer is B because A is too small.", "B"),
    ("The answer is B, since it fits.", "B"),
    ("The answer is B. A would be too small.", "B"),
    ("The answer is A. Wait, the answer is B.", "B"),
    ("Answer: A\nNo, that is wrong.\nAnswer: B", "B"),
    ("A dog barks.\nSo the correct option is B.", "B"),
    ("It grows.\nI choose (B)", "B"),
    ("It grows, therefore B is correct.", "B"),
    ("Let us see.\nB) Rome", "B"),
    ("Let us see.\n\n**B**", "B"),
    ("B - Rome", "B"),
    ("J", "J"),
    # several
    ("AC", "AC"),
    ("A, C", "AC"),
    ("C and A", "AC"),
    ("(A) and (C)", "A, C"),
    (r"\boxed{A, C}", "AC"),
    ("The answer is A and C.", "AC"),
    ("A, B, and D", "ABD"),
    ("A & C", "(A), (C)"),
    ("<answer>A;C</answer>", "A,C"),
]

REJECTED = [
    ("", "B"),
    ("A", "B"),
    ("K", "B"),
    ("1", "B"),
    ("Banana", "B"),
    ("I do not know", "I"),
    ("A dog", "A"),
    ("The answer is a dog", "A"),
    ("The answer is A dog", "A"),
    ("The answer is not B", "B"),
    ("The answer is A", "B"),
    ("The answer is B. Wait, the answer is A.", "B"),
    ("<think>The answer is B</think>A", "B"),
    ("<think>B, the answer is B", "B"),
    ("<answer>A</answer> The answer is B", "B"),
    (r"\boxed{A} so the answer is B", "B"),
    ("A or B", "B"),
    ("A or B", "AB"),
    ("A, B", "B"),
    ("AB", "B"),
    ("A and B", "B"),
    ("(A) or (B)", "B"),
    ("A/B", "B"),
    ("ABCD", "B"),
    ("ABCDEFGHIJ", "B"),
    ("BB", "B"),
    ("B B", "B"),
    ("B, B", "B"),
    ("The answer is A or B.", "B"),
    ("The answer is either A or B.", "B"),
    ("Answer: B or C", "B"),
    ("Answer: B) Rome or C) Berlin", "B"),
    ("B) Rome, C) Berlin", "B"),
    (r"\boxed{A \text{ or } B}", "B"),
    (r"\boxed{}", "B"),
    (r"\boxed{BAD}", "B"),
    ("<answer></answer>", "B"),
    ("I choose (A) or (B)", "B"),
    ("It is A. It is B.\nWho knows", "B"),
    ("(A) red (B) blue (C) green", "B"),
    ("A", "AC"),
    ("A, B, C", "AC"),
    ("AC", "A"),
    ("A C B", "ABC"),
]


@pytest.mark.parametrize(("response", "answer"), ACCEPTED)
def test_accepted(response: str, answer: str) -> None:
    assert score(response, answer) == 1.0


@pytest.mark.parametrize(("response", "answer"), REJECTED)
def test_rejected(response: str, answer: str) -> None:
    assert score(response, answer) == 0.0


def test_no_row_stands_twice() -> None:
    assert len(set(ACCEPTED)) == len(ACCEPTED) >= 40
    assert len(set(REJECTED)) == len(REJECTED) >= 40


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        ("Rome", "B", 1.0),
        ("The answer is Rome.", "B", 1.0),
        (r"\boxed{\text{Rome}}", "B", 1.0),
        ("the hague", "D", 1.0),
        ("B", "Rome", 1.0),
        ("Rome", "Rome", 1.0),
        ("B) Rome", "B", 1.0),
        ("B) the capital of Italy", "B", 1.0),
        ("B) Berlin", "B", 0.0),
        ("C) Rome", "B", 0.0),
        ("Berlin", "B", 0.0),
        ("Rome or Berlin", "B", 0.0),
        ("Madrid", "B", 0.0),
        ("E", "B", 0.0),
    ],
)
def test_option_texts(response: str, answer: str, expected: float) -> None:
    assert score(response, answer, CITIES) == expected
    assert score(response, answer, dict(zip("ABCD", CITIES, strict=True))) == expected
    assert (
        score(response, answer, [f"{letter}. {city}" for letter, city in zip("ABCD", CITIES, strict=True)]) == expected
    )


def test_an_option_whose_text_is_a_letter() -> None:
    assert score("The answer is A", "A", ["B", "A"]) == 1.0
    assert score("The answer is B", "A", ["B", "A"]) == 0.0
    assert score("A and C", "D", ["1", "2", "3", "A and C"]) == 1.0


@given(response=st.text() | st.text(alphabet="ABCDJab()[].,:*$\\{}<>answer /\n", max_size=80))
def test_never_raises(response: str) -> None:
    for choices in (None, CITIES):
        assert score(response, "B", choices) in (0.0, 1.0)


@given(
    letters=st.sets(st.sampled_from("ABCDEFGHIJ"), min_size=1).map(lambda s: "".join(sorted(s))),
    form=st.sampled_from(["{}", "({})", "<answer>{}</answer>", r"\boxed{{{}}}", "The answer is {}.", "**{}**"]),
)
def test_the_gold_is_accepted(letters: str, form: str) -> None:
    check_example(gold(letters))
    assert score(form.format(letters), letters) == 1.0
    others = "".join(sorted(set("ABCDEFGHIJ") - set(letters))) or "A"
    assert score(form.format(others), letters) == 0.0


@pytest.mark.parametrize(
    ("answer", "choices", "message"),
    [
        ("Paris", None, r"row-1.*answer = 'Paris': must be letters from A to J"),
        ("K", None, "must be letters from A to J"),
        ("Madrid", CITIES, r"or the text of one of metadata\.choices"),
        ("E", CITIES, r"metadata\.choices has only A, B, C, D"),
        ("A", "Paris, Rome", r"metadata\.choices = 'Paris, Rome': must be a list of at most 10 texts"),
        ("A", [], "must be a list"),
        ("A", [1, 2], "must be a list"),
        ("A", ["x"] * 11, "must be a list of at most 10 texts"),
        ("A", {"first": "x"}, "map letters from A to J to texts"),
    ],
)
def test_bad_rows(answer: str, choices: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_example(gold(answer, choices))
