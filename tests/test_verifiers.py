"""Verifiers: tables of accepted and rejected responses, and names that cannot be resolved."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from copd_engine.types import Example, UserError
from copd_engine.verifiers import VERIFIERS, check_example, extract_answer, get_verifier, verify_all


def example(answer: str, **metadata: object) -> Example:
    return Example(uid="row-1", prompt="?", answer=answer, verifier="exact", metadata=dict(metadata))


@pytest.mark.parametrize(
    ("response", "answer", "score"),
    [
        ("8451#8", "8", 1.0),
        ("8451# 8 \n", "8", 1.0),
        ("1#2#8", "8", 1.0),
        ("8#2", "8", 0.0),
        ("8", "8", 0.0),
        ("#88", "8", 0.0),
        ("#08", "8", 0.0),
        ("#8 because", "8", 0.0),
        ("8#", "8", 0.0),
        ("", "8", 0.0),
    ],
)
def test_answer_after_hash(response: str, answer: str, score: float) -> None:
    assert get_verifier("answer_after_hash")(response, example(answer)) == score


@pytest.mark.parametrize(
    ("response", "score"), [("Paris", 1.0), (" Paris\n", 1.0), ("paris", 0.0), ("Paris.", 0.0), ("", 0.0)]
)
def test_exact(response: str, score: float) -> None:
    assert get_verifier("exact")(response, example("Paris")) == score


@pytest.mark.parametrize(
    ("response", "answer", "score"),
    [
        ("The answer is $\\boxed{1/2}$", "0.5", 1.0),
        ("so it is \\boxed{\\frac{1}{2}}", "\\frac{1}{2}", 1.0),
        ("so x = 3", "3", 1.0),
        ("first $2$, then $3$", "3", 1.0),
        ("$1+x^2$", "x^2+1", 1.0),
        ("$\\sqrt{2}$", "\\sqrt{2}", 1.0),
        ("teal", "teal", 1.0),
        ("first $3$, then $2$", "3", 0.0),
        ("\\boxed{12}", "13", 0.0),
        ("$x^2+y$", "x^2", 0.0),
        ("I do not know", "3", 0.0),
        ("\\boxed{\\frac{1}{", "3", 0.0),
        ("", "3", 0.0),
    ],
)
def test_math(response: str, answer: str, score: float) -> None:
    pytest.importorskip("math_verify")
    assert get_verifier("math")(response, example(answer)) == score


def test_math_works_off_the_main_thread() -> None:
    pytest.importorskip("math_verify")
    scores: list[float] = []
    worker = threading.Thread(target=lambda: scores.append(get_verifier("math")("it is $\\boxed{4}$", example("4"))))
    worker.start()
    worker.join()
    assert scores == [1.0]


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("7", "7"),
        (" 7\n", "7"),
        ("so <answer> 7 </answer> done", "7"),
        ("<answer>6</answer> no, <answer>7</answer>", "7"),
        ("<answer>7", "<answer>7"),
        ("7</answer>", "7</answer>"),
        ("<answer>7</answer><answer>", "7"),
        ("", ""),
    ],
)
def test_extract_answer(response: str, answer: str) -> None:
    assert extract_answer(response) == answer


def gym_example(task: str, index: int = 0, **task_config: object) -> Example:
    reasoning_gym = pytest.importorskip("reasoning_gym")
    entry = reasoning_gym.create_dataset(task, size=index + 1, seed=3, **task_config)[index]
    row = {"task": task, "task_config": task_config, "entry": entry}
    return example(str(entry["answer"]), reasoning_gym=row)


@pytest.mark.parametrize("task", ["chain_sum", "letter_counting", "number_sorting", "spell_backward", "n_queens"])
def test_reasoning_gym_accepts_its_own_answer_and_rejects_junk(task: str) -> None:
    row = gym_example(task)
    verify = get_verifier("reasoning_gym")
    assert verify(row.answer, row) == 1.0
    assert verify(f"thinking <answer>{row.answer}</answer>", row) == 1.0
    for junk in ("", "junk", "0x", "[", "<answer></answer>", "None", "\x00", "9" * 5000):
        assert verify(junk, row) == 0.0


def test_reasoning_gym_partial_credit_counts_as_wrong() -> None:
    row = gym_example("chain_sum", min_terms=2, max_terms=2)
    assert get_verifier("reasoning_gym")(f"it is {row.answer}", row) == 0.0
    puzzle = gym_example("puzzle24")
    assert get_verifier("reasoning_gym")("junk", puzzle) == 0.0  # the task pays .01


def test_reasoning_gym_takes_any_correct_answer_of_a_task() -> None:
    row = gym_example("n_queens", n=6, max_remove=6)
    for solution in row.metadata["reasoning_gym"]["entry"]["metadata"]["valid_answers"]:
        assert get_verifier("reasoning_gym")(solution, row) == 1.0


def test_reasoning_gym_takes_an_equal_formula() -> None:
    row = gym_example("simple_integration", min_terms=1, max_terms=1)
    verify = get_verifier("reasoning_gym")
    formula = row.answer.removesuffix("+ C").strip()
    assert verify(f"7 + {formula} + C", row) == 1.0
    assert verify(f"2*({formula}) + C", row) == 0.0


@pytest.mark.parametrize(
    "task",
    ["string_insertion", "spiral_matrix", "binary_matrix", "n_queens", "simple_integration", "puzzle24", "countdown"],
)
@pytest.mark.parametrize(
    "code",
    [
        "[open({path!r}, 'w').close()]",
        "__import__('pathlib').Path({path!r}).touch()",
        "exec(bytes([{codes}]))",
        "(exec(bytes(({codes},))), 1)",
        "exec(chr(97)+chr(98))",
    ],
)
def test_code_in_a_response_is_never_run(task: str, code: str, tmp_path: Path) -> None:
    path = tmp_path / "ran"
    codes = ",".join(str(byte) for byte in f"open({str(path)!r}, 'w')".encode())
    row = gym_example(task)
    assert get_verifier("reasoning_gym")(code.format(path=str(path), codes=codes), row) == 0.0
    assert not path.exists()


def test_reasoning_gym_without_its_entry() -> None:
    with pytest.raises(UserError, match=r"row-1': verifier 'reasoning_gym' needs metadata\.reasoning_gym"):
        get_verifier("reasoning_gym")("7", example("7"))


@given(response=st.text(), answer=st.text(min_size=1).filter(str.strip))
def test_string_verifiers_never_raise_and_stay_in_range(response: str, answer: str) -> None:
    for name in ("answer_after_hash", "exact"):
        assert get_verifier(name)(response, example(answer)) in (0.0, 1.0)


@given(
    answer=st.text(alphabet=st.characters(exclude_characters="#"), min_size=1).filter(lambda s: s == s.strip() != "")
)
def test_the_right_answer_is_accepted(answer: str) -> None:
    assert get_verifier("exact")(f"  {answer}\n", example(answer)) == 1.0
    assert get_verifier("answer_after_hash")(f"1#2 # {answer} ", example(answer)) == 1.0


def test_the_registry_is_constant() -> None:
    with pytest.raises(TypeError):
        VERIFIERS["mine"] = VERIFIERS["exact"]  # type: ignore[index]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("exakt", r"unknown verifier 'exakt' \(did you mean 'exact'\?\)"),
        ("answer_afterhash", r"did you mean 'answer_after_hash'\?"),
        (
            "zzz",
            r"unknown verifier 'zzz' \(known: answer_after_hash, exact, iou_box, .*, reasoning_gym_number\)",
        ),
        ("no_such_module_here:score", r"cannot import 'no_such_module_here': ModuleNotFoundError"),
        (":score", r"cannot import ''"),
        ("json:no_such", r"'json' has no function 'no_such'"),
        ("string:digits", r"'string' has no function 'digits'"),
    ],
)
def test_unknown_verifier(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        get_verifier(name)


@pytest.mark.parametrize(("name", "package"), [("math", "math-verify"), ("reasoning_gym", "reasoning-gym")])
def test_missing_package_names_the_extra(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    with pytest.raises(UserError, match=rf"needs the package {package}: install the extra 'llm'"):
        get_verifier(name)


def test_own_verifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_scores.py").write_text(
        "def half(response, example):\n    return 0.5\n"
        "def percent(response, example):\n    return 50\n"
        "def nothing(response, example):\n    return None\n"
        "def broken(response, example):\n    return response[99]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert get_verifier("my_scores:half")("x", example("y")) == 0.5
    with pytest.raises(UserError, match=r"'my_scores:percent' returned 50 for prompt 'row-1': must be from 0 to 1"):
        get_verifier("my_scores:percent")("x", example("y"))
    with pytest.raises(UserError, match=r"returned None"):
        get_verifier("my_scores:nothing")("x", example("y"))
    message = r"'my_scores:broken' failed for prompt 'row-1': IndexError: .* \(.*my_scores\.py:8\)"
    with pytest.raises(UserError, match=message):
        get_verifier("my_scores:broken")("x", example("y"))
    check_example(example("y"), "my_scores:half")
    assert verify_all([("y", example("y")), ("x", example("y"))]) == [1.0, 0.0]
    assert verify_all([("y", example("y")), ("x", example("y"))], "my_scores:half") == [0.5, 0.5]
