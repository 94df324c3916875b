"""Named verifiers: how right a response is, from 0 to 1.

A verifier is a plain function of the response's text (special tokens already removed) and the example. It never raises
on what a policy wrote: a response that cannot be read is wrong. It raises :class:`UserError` where the example itself
cannot be scored, and ``data.py`` checks for that at load.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from copd_engine.types import Example, UserError, suggest

Verifier = Callable[[str, Example], float]

#: Some reasoning-gym tasks pay .01 to .5 for junk or for the wrong format; only the full score is a right answer.
FULL_SCORE = 0.99
#: These tasks run Python's ``eval`` on the response, for a partial score that stays below FULL_SCORE anyway.
_EVAL_TASKS = frozenset({"string_insertion", "spiral_matrix", "binary_matrix", "n_queens"})
#: These hand the response to sympy's ``parse_expr``, which is ``eval`` with Python's builtins within reach.
_SYMPY_TASKS = frozenset(
    {"simple_integration", "intermediate_integration", "polynomial_multiplication", "puzzle24", "countdown"}
)
_SYMPY_CHARACTERS = re.compile(r"[A-Za-z0-9+\-*/^()., \n]*")
_SYMPY_NAMES = frozenset(
    {"sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan", "exp", "log", "ln", "sqrt", "pi"}
)


def answer_after_hash(response: str, example: Example) -> float:
    """1 when the text after the last ``#``, stripped, is the answer; 0 without ``#``."""
    _, hash_mark, answer = response.rpartition("#")
    return float(bool(hash_mark) and answer.strip() == example.answer)


def exact(response: str, example: Example) -> float:
    """1 when the whole response, stripped, is the answer."""
    return float(response.strip() == example.answer)


def reasoning_gym(response: str, example: Example) -> float:
    """1 when the task's own scorer gives the extracted answer the full score.

    The answer is the last ``<answer>...</answer>``, else the whole response, stripped.
    ``example.metadata["reasoning_gym"]`` holds ``task``, ``task_config`` and ``entry`` (UserError without them).

    Code in a response is never run: for the tasks whose scorers would run it, the answer must equal a right one, or be
    a formula of numbers, one-letter variables and elementary functions. Limit: a formula that sympy needs minutes for
    (a tower of powers) blocks the caller.
    """
    row = example.metadata.get("reasoning_gym")
    if not isinstance(row, dict) or not {"task", "entry"} <= row.keys():
        raise UserError(
            f"example {example.uid}: verifier 'reasoning_gym' needs metadata.reasoning_gym with 'task' and 'entry'"
        )
    task, entry, answer = row["task"], row["entry"], extract_answer(response)
    if task in _EVAL_TASKS:
        valid = entry["metadata"]["valid_answers"] if task == "n_queens" else [entry["answer"]]
        return float(answer in {text.strip() for text in valid})
    if task in _SYMPY_TASKS and not _is_plain_formula(answer):
        return 0.0
    score_answer = _reasoning_gym_scorer(task, json.dumps(row.get("task_config", {}), sort_keys=True))
    try:
        return float(score_answer(answer, entry) >= FULL_SCORE)
    except Exception:  # scorers parse free text with int(), split() and indexing: what they choke on is a wrong answer
        return 0.0


def reasoning_gym_number(response: str, example: Example) -> float:
    """As ``reasoning_gym``, for tasks whose answer is a number: the response's last number is scored, 0 without one.

    For models too small to keep an answer format; repeating the problem earns nothing.
    """
    numbers = _NUMBER.findall(response)
    return reasoning_gym(f"<answer>{numbers[-1]}</answer>", example) if numbers else 0.0


def math(response: str, example: Example) -> float:
    """1 when math-verify finds the response's final expression equal to the answer (``\\boxed{}``, LaTeX, last number).

    Limit: its timeouts use signals, which raise outside the main thread, so they are off here. An expression that sympy
    cannot settle (a tower of powers) blocks the caller: nothing kills the comparison yet. That takes a worker process
    that can be killed.
    """
    if response.strip() == example.answer:
        return 1.0
    from math_verify import parse, verify

    # It warns that its timeouts are off, once per process: that is the choice stated above.
    logging.getLogger("math_verify.parser").setLevel(logging.ERROR)
    logging.getLogger("math_verify.grader").setLevel(logging.ERROR)
    try:
        gold = parse(example.answer, parsing_timeout=None) or parse(f"${example.answer}$", parsing_timeout=None)
        target = parse(response, parsing_timeout=None)
        return float(verify(gold, target, timeout_seconds=None))
    except Exception:  # sympy and the LaTeX grammar raise of all kinds on free text: an unreadable answer is wrong
        return 0.0


VERIFIERS: Mapping[str, Verifier] = MappingProxyType(
    {
        "answer_after_hash": answer_after_hash,
        "exact": exact,
        "reasoning_gym": reasoning_gym,
        "reasoning_gym_number": reasoning_gym_number,
        "math": math,
    }
)
#: Module that a verifier needs, and its name on the package index.
_REASONING_GYM = ("reasoning_gym", "reasoning-gym")
_NEEDS = MappingProxyType(
    {"reasoning_gym": _REASONING_GYM, "reasoning_gym_number": _REASONING_GYM, "math": ("math_verify", "math-verify")}
)
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def get_verifier(name: str) -> Verifier:
    """The verifier of that name; ``module:function`` imports the user's own (its results are checked to be in [0, 1]).

    Raises :class:`UserError` for an unknown name (with the nearest known one), a function that cannot be imported, or a
    missing optional package.
    """
    if ":" in name:
        return _imported(name)
    if name not in VERIFIERS:
        raise UserError(f"unknown verifier {name!r}{suggest(name, VERIFIERS)}; module:function names your own")
    if name in _NEEDS:
        module, package = _NEEDS[name]
        if importlib.util.find_spec(module) is None:
            raise UserError(f"verifier {name!r} needs the package {package}: install the extra 'llm'")
    return VERIFIERS[name]


def extract_answer(response: str) -> str:
    """Text of the last ``<answer>...</answer>``, else of the whole response; stripped."""
    before, tag, _ = response.rpartition("</answer>")
    if tag and "<answer>" in before:
        return before.rpartition("<answer>")[2].strip()
    return response.strip()


def _is_plain_formula(answer: str) -> bool:
    """Numbers, operators, one-letter variables and elementary functions: nothing that Python could call."""
    if not _SYMPY_CHARACTERS.fullmatch(answer) or re.search(r"\.\s*[A-Za-z]", answer):
        return False
    return all(len(name) == 1 or name in _SYMPY_NAMES for name in re.findall(r"[A-Za-z]+", answer))


@lru_cache(maxsize=64)
def _reasoning_gym_scorer(task: str, task_config: str) -> Callable[[str, dict[str, Any]], float]:
    """The task's scorer. A data set of size 1: scorers look at the entry and the config, never at other entries."""
    from reasoning_gym import create_dataset

    scorer: Callable[[str, dict[str, Any]], float] = create_dataset(
        task, size=1, seed=0, **json.loads(task_config)
    ).score_answer
    return scorer


def _imported(name: str) -> Verifier:
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's module may raise anything while it is imported
        raise UserError(f"verifier {name!r}: cannot import {module_name!r}: {type(error).__name__}: {error}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"verifier {name!r}: {module_name!r} has no function {function_name!r}")

    def verifier(response: str, example: Example) -> float:
        score = function(response, example)
        try:
            value = float(score)
        except (TypeError, ValueError):
            value = float("nan")
        if not 0.0 <= value <= 1.0:
            raise UserError(f"verifier {name!r} returned {score!r} for example {example.uid}: must be from 0 to 1")
        return value

    return verifier
