"""Mathematics: answers in the forms that models write them, and what must not count as one."""

from __future__ import annotations

import threading

import pytest
from hypothesis import Phase, given, settings
from hypothesis import example as hypothesis_example
from hypothesis import strategies as st

from copd_engine.types import Example, UserError
from copd_engine.verifiers import check_example, get_verifier, verify_all

pytest.importorskip("math_verify")


def gold(answer: str) -> Example:
    return Example(uid="row-1", prompt="?", answer=answer, verifier="math")


ACCEPTED = [
    # where the answer stands
    (r"The answer is $\boxed{16}$.", "16"),
    (r"\[ \boxed{16} \]", "16"),
    (r"first \boxed{3}, then \boxed{16}", "16"),
    (r"so $\fbox{16}$", "16"),
    (r"\boxed{16} and then \boxed{17", "16"),
    ("<think>maybe 3</think> <answer>16</answer>", "16"),
    (r"<answer>\boxed{16}</answer>", "16"),
    ("thinking it over: 3</think>16", "16"),
    ("The final answer is $16$. I hope it is correct.", "16"),
    ("**Answer:** 16", "16"),
    ("... = 16.\n#### 16", "16"),
    ("so x = 16", "16"),
    ("7 + 9 = 16", "16"),
    (r"\boxed{7+9=16}", "16"),
    (r"\boxed{x = 16}", "16"),
    (r"first $2$, then $3$", "3"),
    # numbers
    (r"\boxed{-5}", "-5"),
    (r"\boxed{16.0}", "16"),
    (r"\boxed{(16)}", "16"),
    (r"\boxed{\left(16\right)}", "16"),
    (r"\boxed{\mathbf{16}}", "16"),
    (r"\boxed{\text{16}}", "16"),
    (r"\boxed{1,234,567}", "1234567"),
    (r"\boxed{1{,}234}", "1234"),
    (r"\boxed{11111111100}", r"11,\! 111,\! 111,\! 100"),
    (r"\boxed{11,\! 111}", "11111"),
    (r"\boxed{0.333333}", r"\frac{1}{3}"),
    (r"\boxed{6.72 \times 10^{-5}}", ".0000672"),
    (r"\boxed{3.89 \times 10^{-10}}", "3.89e-10"),
    (r"\boxed{1/7000}", "0.000142857"),
    (r"\boxed{\frac12}", "0.5"),
    (r"\boxed{\dfrac{2}{4}}", r"\frac{1}{2}"),
    (r"\boxed{1/2}", r"\frac{1}{2}"),
    (r"\boxed{\frac{4}{2}\,}", r"\frac{4}{2}"),
    (r"\boxed{2}", r"\frac{4}{2}"),
    (r"\boxed{1\frac{1}{2}}", "1.5"),
    (r"\boxed{1 1/2}", "3/2"),
    (r"\boxed{0.333333333}", r"\frac{1}{3}"),
    (r"\boxed{3 \times 10^5}", "300000"),
    (r"\boxed{5 \cdot 10^{-3}}", "0.005"),
    (r"\boxed{5e3}", "5000"),
    (r"\boxed{45\%}", "45"),
    (r"\boxed{45\%}", "0.45"),
    ("The answer is 45%.", "45\\%"),
    # units
    (r"\boxed{16\text{ cm}}", "16"),
    (r"\boxed{16\ \mathrm{cm}^2}", "16"),
    (r"\boxed{16 \text{ apples}}", "16"),
    (r"\boxed{\$16}", "16"),
    ("The answer is $16.", "16"),
    (r"\boxed{16^\circ}", "16"),
    ("The answer is 16 apples.", "16"),
    (r"\boxed{16}", "16 apples"),
    # expressions
    (r"\boxed{x^2+1}", "1+x^2"),
    ("x^2+1", "1+x^2"),
    ("<answer>x^2+1</answer>", "1+x^2"),
    ("The answer is (x+1)^2.", "x^2+2x+1"),
    (r"\boxed{\sqrt{12}}", r"2\sqrt{3}"),
    (r"\boxed{\frac{\pi}{4}}", r"\pi/4"),
    (r"\boxed{y = 2x + 1}", "y=2x+1"),
    (r"\boxed{x^{\prime}+\frac{r}{V} x = r c}", r"x^{\prime}+\frac{r}{V} x-r c=0"),
    (r"\boxed{2x + y = 4}", "2x + y - 4 = 0"),
    (r"\boxed{y = 4 - 2x}", "2x + y = 4"),
    (r"\boxed{gm}", "m g"),
    # intervals, sets, tuples, matrices, relations
    (r"\boxed{[0,5)}", "[0,5)"),
    (r"\boxed{(-\infty, 2) \cup (3, \infty)}", r"(-\infty,2)\cup(3,\infty)"),
    (r"\boxed{\{2, 1\}}", r"\{1,2\}"),
    (r"\boxed{1, 2}", r"\{1,2\}"),
    (r"\boxed{1 \text{ or } 2}", "1,2"),
    (r"\boxed{\pm 3}", r"\{-3,3\}"),
    (r"\boxed{\left(1,2\right)}", "(1,2)"),
    (r"\boxed{\begin{pmatrix}1&2\\3&4\end{pmatrix}}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
    (r"\boxed{x > 3}", "3 < x"),
    # words
    (r"\boxed{\text{Monday}}", "Monday"),
    ("The answer is no solution.", "No solution"),
    ("teal", "teal"),
]

REJECTED = [
    ("", "16"),
    ("I do not know", "16"),
    (r"\boxed{17}", "16"),
    (r"\boxed{16} no, \boxed{17}", "16"),
    (r"<think>\boxed{16}</think> \boxed{17}", "16"),
    (r"<think>it must be \boxed{16}", "16"),
    (r"<answer>17</answer> or rather \boxed{16}", "16"),
    ("first $16$, then $2$", "16"),
    (r"\boxed{\frac{1}{", "3"),
    # nothing is worked out
    ("7 + 9", "16"),
    ("The answer is 7 + 9.", "16"),
    ("<answer>7 + 9</answer>", "16"),
    (r"\boxed{7+9}", "16"),
    (r"$\boxed{7 + 9}$", "16"),
    (r"\boxed{16 = 7 + 9}", "16"),
    (r"\boxed{20-4}", "16"),
    (r"\boxed{(20)-(4)}", "16"),
    (r"\boxed{-(-16)}", "16"),
    (r"\boxed{16 = 17}", "16"),
    (r"\boxed{\mathbf{7+9}}", "16"),
    (r"\boxed{4 \times 4}", "16"),
    (r"\boxed{2^4}", "16"),
    (r"\boxed{\sqrt{256}}", "16"),
    (r"\boxed{\frac{32}{2}}", "16"),
    (r"\boxed{32/2}", "16"),
    (r"\boxed{4!-8}", "16"),
    (r"\boxed{|-16|}", "16"),
    (r"\boxed{\frac{1}{4}+\frac{1}{4}}", r"\frac{1}{2}"),
    (r"\boxed{\{1, 1+1\}}", r"\{1,2\}"),
    (r"\boxed{[0, 2+3)}", "[0,5)"),
    (r"\boxed{\int_0^x t\,dt}", r"\frac{x^2}{2}"),
    (r"\boxed{\sum_{k=1}^{n} k}", r"\frac{n(n+1)}{2}"),
    # not the same
    (r"\boxed{1 1/2}", "1"),
    (r"\boxed{2(8)}", "10"),
    (r"\boxed{-16}", "16"),
    (r"\boxed{1.6}", "16"),
    (r"\boxed{16\%}", "1600"),
    (r"\boxed{0.000067}", ".0000672"),
    (r"\boxed{0.0000000009}", "3.89e-10"),
    (r"\boxed{x = 0.0000000009}", "x = 3.89e-10"),
    (r"\boxed{0.0000001}", "0"),
    (r"\boxed{m h}", "m g"),
    (r"\boxed{x^{\prime}+\frac{r}{V} x = 2 r c}", r"x^{\prime}+\frac{r}{V} x-r c=0"),
    (r"\boxed{0}", "2x + y - 4 = 0"),
    (r"\boxed{7 + 9}", "x = 16"),
    (r"\boxed{7 + 9}", r"\text{area} = 16"),
    (r"\boxed{x^2-1}", "x^2+1"),
    (r"\boxed{x=3}", "x=4"),
    (r"\boxed{[0,5]}", "[0,5)"),
    (r"\boxed{(-\infty, 2]}", r"(-\infty,2)"),
    (r"\boxed{\{1,2,3\}}", r"\{1,2\}"),
    (r"\boxed{16, 17}", "16"),
    (r"\boxed{16 \text{ or } 17}", "16"),
    ("The answer is 17 apples or 16 apples.", "16"),
    (r"\boxed{(2,1)}", "(1,2)"),
    (r"\boxed{\begin{pmatrix}1&2\\3&5\end{pmatrix}}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
    (r"\boxed{x < 3}", "3 < x"),
    (r"\boxed{\text{dayMon}}", "Monday"),
    (r"\boxed{\text{one solution}}", "no solution"),
]


@pytest.mark.parametrize(("response", "answer"), ACCEPTED)
def test_accepted(response: str, answer: str) -> None:
    assert get_verifier("math")(response, gold(answer)) == 1.0


@pytest.mark.parametrize(("response", "answer"), REJECTED)
def test_rejected(response: str, answer: str) -> None:
    assert get_verifier("math")(response, gold(answer)) == 0.0


def test_no_row_stands_twice() -> None:
    assert len(set(ACCEPTED)) == len(ACCEPTED) >= 40
    assert len(set(REJECTED)) == len(REJECTED) >= 40


def test_off_the_main_thread() -> None:
    scores: list[float] = []
    thread = threading.Thread(target=lambda: scores.append(get_verifier("math")(r"\boxed{\frac{8}{2}+x}", gold("4+x"))))
    thread.start()
    thread.join()
    assert scores == [1.0]


# A text that the grammar cannot settle costs 2 s of CPU time: few of them, and no shrinking, which tries hundreds.
@settings(max_examples=3, phases=(Phase.explicit, Phase.generate))
@given(st.lists(st.text() | st.text(alphabet="0123456789+-*/^(){}[]\\,.=$%x! ", max_size=60), min_size=8, max_size=8))
@hypothesis_example(
    ["\\boxed{" * 3000, "\\boxed{}", "$$", "\x00", "{", "\\frac" * 500, "(" * 5000, "9" * 5000, "\ud800"]
)
def test_never_raises(texts: list[str]) -> None:
    for answer in ("16", r"\{x^2,2\}"):
        scores = verify_all([(text, gold(answer)) for text in texts])
        assert len(scores) == len(texts)
        assert set(scores) <= {0.0, 1.0}


NUMBERS = st.integers(-(10**9), 10**9)
GOLDS = st.one_of(
    NUMBERS.map(str),
    st.decimals(-1000, 1000, places=3).map(str),
    st.tuples(NUMBERS, st.integers(2, 999)).map(lambda nd: rf"\frac{{{nd[0]}}}{{{nd[1]}}}"),
    st.tuples(NUMBERS, NUMBERS).filter(lambda ab: ab[0] < ab[1]).map(lambda ab: f"[{ab[0]}, {ab[1]})"),
    st.sets(st.integers(-99, 99), min_size=2, max_size=4).map(lambda s: r"\{" + ", ".join(map(str, s)) + r"\}"),
    st.tuples(st.integers(1, 99), st.integers(1, 99)).map(lambda ab: f"{ab[0]}x^2 + {ab[1]}y"),
    st.tuples(st.integers(2, 99), st.integers(2, 99)).map(lambda ab: rf"{ab[0]}\sqrt{{{ab[1]}}}"),
    st.integers(1, 99).map(lambda n: rf"{n}\%"),
)


@settings(max_examples=15)
@given(st.lists(GOLDS, min_size=10, max_size=20))
def test_the_gold_is_accepted_however_it_is_marked(golds: list[str]) -> None:
    forms = (
        "{}",
        r"so \boxed{{{}}}",
        r"\boxed{{ {}\, }}",
        "The answer is ${}$.",
        "<think>no: 1</think>\n**Answer:** ${}$",
    )
    pairs = [(form.format(answer), gold(answer)) for answer in golds for form in forms]
    for answer in golds:
        check_example(gold(answer))
    assert dict.fromkeys((pair[0] for pair in pairs), 1.0) == dict(
        zip((pair[0] for pair in pairs), verify_all(pairs), strict=True)
    )


@settings(max_examples=15)
@given(st.lists(st.tuples(st.integers(1, 999), st.integers(1, 999)), min_size=10, max_size=20))
def test_a_sum_is_no_answer_and_another_number_neither(terms: list[tuple[int, int]]) -> None:
    restated = [(rf"\boxed{{{a} + {b}}}", gold(str(a + b))) for a, b in terms]
    off_by_one = [(rf"\boxed{{{a + b + 1}}}", gold(str(a + b))) for a, b in terms]
    assert not any(verify_all(restated + off_by_one))


def test_a_gold_whose_braces_do_not_match() -> None:
    for answer in (r"\frac{1}{2", "}", r"\{1"):
        if answer == r"\{1":
            check_example(gold(answer))  # an escaped brace needs no partner
        else:
            with pytest.raises(UserError, match=r"row-1.*verifier 'math': answer = .*braces match"):
                check_example(gold(answer))
