"""Multiple choice: answers in the forms that models write them, and what settles on nothing."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from copd_engine.types import Example, UserError
from copd_engine.verifiers import check_example, get_verifier
from copd_engine.verifiers.choice import chosen_letters

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


ROOTS = ["$\\sqrt{3}$", "$-\\sqrt{3}$", "$1$", "$-1$"]
INTERVALS = ["(0, 1]", "[0, 1)", "(0, 1)", "[0, 1]"]
FORMS = [r"\boxed{{{letter}}}", r"\boxed{{{letter}. {text}}}", "The answer is ({letter}) {text}", r"\boxed{{{text}}}"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [ROOTS, INTERVALS, ["3", "4", "5", "6"], ["2-1", "2+1", "2*1", "21"]])
def test_signs_and_brackets_tell_options_apart(options: list[str], form: str) -> None:
    for letter, text in zip("ABCD", options, strict=True):
        response = form.format(letter=letter, text=text)
        assert [score(response, other, options) for other in "ABCD"] == [float(other == letter) for other in "ABCD"]


@pytest.mark.parametrize(
    ("options", "text", "letter"),
    [(["3", "4", "5", "6"], "5", "C"), (["dog", "bird", "cat", "cow"], "cat", "C"), (INTERVALS, "(0, 1]", "A")],
)
def test_a_label_beside_another_option_s_text_is_no_answer(options: list[str], text: str, letter: str) -> None:
    """Not for A either, which looks like an article."""
    for label in "ABCD":
        for form in (r"\boxed{{{}. {}}}", "The answer is {}) {}", "({}) {}"):
            found = chosen_letters(form.format(label, text), gold("A", options))
            assert found == (label if label == letter else None)


def test_texts_that_two_options_share() -> None:
    """They differ in what is not compared; the label decides."""
    options = ["Cat", "cat.", "CAT!", "dog"]
    assert chosen_letters("a cat", gold("A", options)) is None
    assert chosen_letters("dog", gold("A", options)) == "D"
    for letter, text in zip("ABCD", options, strict=True):
        assert chosen_letters(rf"\boxed{{{letter}. {text}}}", gold("A", options)) == letter
    assert chosen_letters("Cat", gold("A", options)) == "A"  # letter by letter it is but one
    assert chosen_letters("C. elegans", gold("A", ["C. elegans", "E. coli"])) == "A"
    with pytest.raises(UserError, match=r"answer = 'a cat': must be letters"):
        check_example(gold("a cat", options))


SIGNED = st.builds("{}{}".format, st.sampled_from(["", "-", "+"]), st.sampled_from(["1", "12", "x", "2.5", "1/2"]))
TERM = SIGNED | st.builds("{}\\sqrt{{{}}}".format, st.sampled_from(["", "-", "2"]), st.sampled_from("235"))
SUM = st.builds("{} {} {}".format, TERM, st.sampled_from("-+"), TERM)
INTERVAL = st.builds("{}{}, {}{}".format, st.sampled_from("(["), TERM, TERM, st.sampled_from(")]"))
NAMES = st.sampled_from(["red", "a dog", "The Hague", "well-known", "New York (city)", "5 km/h", "50 %"])
TEXT = (TERM | SUM | INTERVAL | NAMES) | TERM.map("${}$".format)


def without_dollars(text: str) -> str:
    return text.replace("$", "")


@given(options=st.lists(TEXT, min_size=2, max_size=6, unique_by=without_dollars))
def test_every_option_is_read_as_itself(options: list[str]) -> None:
    for letter, text in zip("ABCDEF", options, strict=False):
        forms = (
            rf"\boxed{{{letter}}}",
            rf"\boxed{{{letter}. {text}}}",
            f"({letter}) {text}",
            text,
            rf"\boxed{{{text}}}",
        )
        for response in forms:
            assert chosen_letters(response, gold("A", options)) == letter, response


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
