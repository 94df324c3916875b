"""Where the answer stands; exact and normalized text; JSON fields."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from copd_engine.types import Example, UserError
from copd_engine.verifiers import check_example, find_answer, get_verifier
from copd_engine.verifiers.extract import last_boxed, without_thinking
from copd_engine.verifiers.text import normalize


def score(verifier: str, response: str, answer: str) -> float:
    return get_verifier(verifier)(response, Example("row-1", "?", answer, verifier))


@pytest.mark.parametrize(
    ("response", "text", "source"),
    [
        ("7", "7", "whole"),
        ("<answer> 7 </answer>", "7", "tag"),
        ("<answer>6</answer> no, <answer>7</answer>", "7", "tag"),
        (r"<answer>so \boxed{7}</answer>", "7", "tag"),
        (r"\boxed{6} <answer>7</answer>", "7", "tag"),
        (r"\boxed{6} \boxed{7}", "7", "boxed"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", "boxed"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}", "boxed"),
        (r"\boxed {7}", "7", "boxed"),
        (r"\boxed{\boxed{7}}", "7", "boxed"),
        (r"\boxed{7} and \boxed{8", "7", "boxed"),
        (r"the answer is 6, \boxed{7}", "7", "boxed"),
        ("The answer is 7", "7", "statement"),
        ("The final answer is: 7", "7", "statement"),
        ("**Final Answer:** 7\nBye", "7", "statement"),
        ("Answer:\n\n7", "7", "statement"),
        ("Answer: 6\nAnswer: 7", "7", "statement"),
        ("The answer to the question is 7", "7", "statement"),
        ("The answer should be 7", "7", "statement"),
        ("#### 7", "7", "statement"),
        ("The answer", "The answer", "whole"),
        ("unanswered: 7", "unanswered: 7", "whole"),
        (r"\boxed{7", r"\boxed{7", "whole"),
        ("<think>\\boxed{6}</think>7", "7", "whole"),
        ("\\boxed{6}</think>7", "7", "whole"),
        ("<think>\\boxed{6}", "", "whole"),
        ("7 <think>6</think>", "7", "whole"),
        ("<think>5</think>7<think>6</think>", "7", "whole"),
    ],
)
def test_where_the_answer_stands(response: str, text: str, source: str) -> None:
    assert find_answer(response) == (text, source)


@pytest.mark.parametrize(
    "text",
    [
        *("\\boxed{" * 50_000, "{" * 300_000, "answer " * 50_000, "<answer>" * 40_000, "<think>" * 40_000),
        *("\\" * 300_000, "answer" + " " * 300_000, "}" * 300_000, "</think>" * 40_000, '{"a":' * 60_000),
        *("[" * 300_000, "1" * 300_000, "1," * 150_000, "1 " * 150_000, "(A) or " * 40_000, "- " * 150_000),
        *("**A" * 100_000, "1:" * 150_000, "a an the " * 30_000, "A, " * 100_000, "(" * 300_000),
    ],
    ids=lambda text: text[:8].strip(),
)
def test_long_texts_take_no_time(text: str) -> None:
    begin = time.monotonic()
    for verifier, answer in (
        ("exact", "7"),
        ("normalized", "seven"),
        ("numeric", "7"),
        ("multiple_choice", "B"),
        ("iou_box", "[0, 0, 1, 1]"),
        ("iou_span", "[0, 1]"),
        ("json_fields", '{"a": 7}'),
    ):
        assert score(verifier, text, answer) == 0.0
    assert time.monotonic() - begin < 5.0


@given(text=st.text(alphabet="ab{}\\", max_size=40))
def test_boxed_content_is_balanced(text: str) -> None:
    assert last_boxed(f"{text} \\boxed{{7}}") == "7"
    found = last_boxed(f"\\boxed{{{text}}}")
    balanced = 0
    for token in (found or "").replace("\\\\", "").replace("\\{", "").replace("\\}", ""):
        balanced += {"{": 1, "}": -1}.get(token, 0)
    assert balanced == 0


@given(text=st.text())
def test_a_response_without_thinking_is_untouched(text: str) -> None:
    if "think>" not in text:
        assert without_thinking(text) == without_thinking(f"<think>so</think>{text}") == text


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        ("Paris", "Paris", 1.0),
        ("<answer>Paris</answer>", "Paris", 1.0),
        (r"\boxed{Paris}", "Paris", 1.0),
        ("The answer is Paris", "Paris", 1.0),
        ("The answer is Paris.", "Paris", 1.0),
        ("The answer is U.S.", "U.S.", 1.0),
        ("Answer: answer: 7", "Answer: answer: 7", 1.0),
        ("<answer>paris</answer>", "Paris", 0.0),
        ("I think of Paris", "Paris", 0.0),
    ],
)
def test_exact(response: str, answer: str, expected: float) -> None:
    assert score("exact", response, answer) == expected


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("paris", "Paris"),
        ("PARIS!", "Paris"),
        ("  the   Eiffel Tower. ", "Eiffel tower"),
        ("An apple", "apple"),
        ("well-known", "well known"),
        ("\u201cParis\u201d", "Paris"),
        ("**Paris**", "Paris"),
        ("Don\u2019t", "don't"),
        ("\uff30\uff41\uff52\uff49\uff53", "Paris"),
        ("caf\u00e9", "cafe\u0301"),
        ("STRASSE", "stra\u00dfe"),
        (r"\boxed{\text{Paris}}", "Paris"),
        ("The answer is Paris.", "paris"),
        ("<answer>(Paris)</answer>", "Paris"),
        ("red, green and blue", "red green and blue"),
        ("\u22125", "-5"),
        ("3.5.", "3.5"),
        ("1,000", "1,000"),
        ("C++", "c++"),
        ("A", "a"),
        ("...", "..."),
        ("Paris (France)", "paris france"),
        ("the A-team", "a team"),
        ("- Paris", "Paris"),
        ("yes \u2014 no", "yes no"),
        ("km/h", "km h"),
        ("(0,1]", "( 0, 1 ]"),
        (r"\left(0, 1\right]", "(0, 1]"),
        (r"$-\sqrt{3}$", r"-\sqrt{3}"),
        ("\u2010x", "-x"),
        (r"5\%", "5%"),
    ],
)
def test_normalized_accepts(response: str, answer: str) -> None:
    assert score("normalized", response, answer) == 1.0


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("", "Paris"),
        ("Rome", "Paris"),
        ("not Paris", "Paris"),
        ("35", "3.5"),
        ("5", "-5"),
        ("5", "5%"),
        ("C", "C++"),
        ("1.000", "1,000"),
        ("", "the"),
        ("", "..."),
        ("The answer is Rome.", "Paris"),
        (r"\boxed{\sqrt{3}}", r"-\sqrt{3}"),
        ("x", "-x"),
        ("x 1", "x-1"),
        ("3 2", "3-2"),
        ("32", "3*2"),
        ("12", "1:2"),
        ("1 2", "1/2"),
        ("[0, 1]", "(0, 1)"),
        ("[0, 1)", "(0, 1]"),
        ("(0 \\infty)", "[0 \\infty)"),
        ("x+1x-1", "(x+1)(x-1)"),
        ("5", "a 5"),
    ],
)
def test_normalized_rejects(response: str, answer: str) -> None:
    assert score("normalized", response, answer) == 0.0


@given(response=st.text(), answer=st.text(min_size=1).filter(str.strip))
def test_text_verifiers_never_raise_and_accept_the_gold(response: str, answer: str) -> None:
    for verifier in ("exact", "normalized"):
        assert score(verifier, response, answer) in (0.0, 1.0)
        assert score(verifier, answer, answer) == 1.0
        assert score(verifier, f"\n {answer} ", answer) == 1.0


@example(text="C.\u0327")  # without the point the two compose
@given(text=st.text() | st.text(alphabet="abcthen 12.,-/*:_()[]{}\\\\'%$", max_size=30))
def test_normalizing_twice_changes_nothing(text: str) -> None:
    assert normalize(normalize(text)) == normalize(text)


GOLD = '{"name": "cat", "count": 2, "size": {"w": 1.5, "h": [1, 2]}, "alive": true}'


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (GOLD, 1.0),
        (f"```json\n{GOLD}\n```", 1.0),
        (f"Here it is:\n```\n{GOLD}\n```\nDone.", 1.0),
        (f"<think>{{}}</think><answer>{GOLD}</answer>", 1.0),
        (f"It is {GOLD}, I think.", 1.0),
        (f'{{"name": "dog"}} no, {GOLD}', 1.0),
        ('{"alive": true, "size": {"h": [1, 2.0], "w": 1.5}, "count": 2, "name": "cat", "more": null}', 1.0),
        (GOLD.replace("2,", "2.0,"), 1.0),
        (f'{GOLD} no, {{"name": "dog"}}', 0.0),
        (GOLD.replace("2,", '"2",'), 0.0),
        (GOLD.replace("true", "1"), 0.0),
        (GOLD.replace("2,", "true,"), 0.0),
        (GOLD.replace("cat", "Cat"), 0.0),
        (GOLD.replace("[1, 2]", "[2, 1]"), 0.0),
        (GOLD.replace("[1, 2]", "[1]"), 0.0),
        (GOLD.replace('"w": 1.5', '"w": 1.5, "d": 1'), 0.0),
        (GOLD.replace("true", "True"), 0.0),
        (GOLD.replace("2,", "NaN,"), 0.0),
        (f"[{GOLD}", 1.0),
        (GOLD[:-1], 0.0),
        ("__import__('os').system('true')", 0.0),
        ("{" * 5000, 0.0),
        ('{"a":' * 5000, 0.0),
        ('{"count": ' + "9" * 5000 + "}", 0.0),
        ("", 0.0),
    ],
)
def test_json_fields(response: str, expected: float) -> None:
    assert score("json_fields", response, GOLD) == expected


def test_a_field_called_answer_is_no_statement() -> None:
    assert score("json_fields", '{"answer": "the answer is: 7"}', '{"answer": "the answer is: 7"}') == 1.0


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(fields=st.dictionaries(st.text(), JSON_VALUES, min_size=1, max_size=4), response=st.text())
def test_json_gold_is_accepted_and_text_never_raises(fields: dict[str, Any], response: str) -> None:
    gold = json.dumps(fields)
    check_example(Example("row-1", "?", gold, "json_fields"))
    assert score("json_fields", response, gold) in (0.0, 1.0)
    assert score("json_fields", gold, gold) == 1.0
    first = next(iter(fields))
    assert score("json_fields", json.dumps({**fields, first: ["other", fields[first]]}), gold) == 0.0


@pytest.mark.parametrize("answer", ["[1, 2]", "{}", "{'a': 1}", "7", '{"a": NaN}', '{"a": 1', "none"])
def test_a_json_gold_that_is_no_object(answer: str) -> None:
    with pytest.raises(UserError, match=r"row-1.*'json_fields': answer = .*: must be a JSON object"):
        check_example(Example("row-1", "?", answer, "json_fields"))


@pytest.mark.parametrize("verifier", ["exact", "normalized", "answer_after_hash"])
def test_a_blank_gold(verifier: str) -> None:
    with pytest.raises(UserError, match=r"row-1.*must not be blank"):
        check_example(Example("row-1", "?", "  ", verifier))


def test_check_example_knows_the_verifier() -> None:
    with pytest.raises(UserError, match=r"unknown verifier 'exakt' \(did you mean 'exact'\?\)"):
        check_example(Example("row-1", "?", "7", "exakt"))
    check_example(Example("row-1", "?", "seven", "exact"))
    with pytest.raises(UserError, match="must be one number"):
        check_example(Example("row-1", "?", "seven", "exact"), "numeric")
