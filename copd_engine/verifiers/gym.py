"""reasoning-gym's tasks, scored by their own scorers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from copd_engine.types import Example, UserError
from copd_engine.verifiers.extract import TAIL_CHARACTERS, extract_answer, without_thinking
from copd_engine.verifiers.pool import Job

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
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def gym_job(response: str, example: Example) -> Job:
    """1 when the task's own scorer gives the extracted answer the full score.

    ``example.metadata["reasoning_gym"]`` holds ``task``, ``task_config`` and ``entry``.

    Code in a response is never run: for the tasks whose scorers would run it, the answer must equal a right one, or be
    a formula of numbers, one-letter variables and elementary functions.
    """
    return _job(extract_answer(response), example)


def gym_number_job(response: str, example: Example) -> Job | float:
    """As ``reasoning_gym``, for tasks whose answer is a number: the response's last number is scored, 0 without one.

    For models too small to keep an answer format; repeating the problem earns nothing.
    """
    number = last_number(response)
    return 0.0 if number is None else _job(number, example)


def last_number(response: str) -> str | None:
    """The last number of a response, as it is written; None without one."""
    numbers: list[str] = _NUMBER.findall(without_thinking(response)[-TAIL_CHARACTERS:])
    return numbers[-1] if numbers else None


def score(answer: str, task: str, task_config: str, entry: dict[str, Any]) -> float:
    """1 where the scorer of ``task``, configured by the JSON of ``task_config``, gives ``answer`` the full score."""
    if task in _EVAL_TASKS:
        valid = entry["metadata"]["valid_answers"] if task == "n_queens" else [entry["answer"]]
        return float(answer in {text.strip() for text in valid})
    if task in _SYMPY_TASKS and not _is_plain_formula(answer):
        # A gold may hold an integral that has no closed form.
        return float(answer == str(entry["answer"]).strip())
    score_answer = _scorer(task, task_config)
    try:
        return float(score_answer(answer, entry) >= FULL_SCORE)
    except MemoryError:
        raise
    except Exception:  # scorers parse free text with int(), split() and indexing: what they choke on is a wrong answer
        return 0.0


def check_reasoning_gym(example: Example) -> None:
    """Raises UserError without ``metadata.reasoning_gym`` and its ``task`` and ``entry``."""
    row = example.metadata.get("reasoning_gym")
    if not isinstance(row, dict) or not {"task", "entry"} <= row.keys():
        raise UserError(
            f"{example.name}: verifier 'reasoning_gym' needs metadata.reasoning_gym with 'task' and 'entry'"
        )


def _job(answer: str, example: Example) -> Job:
    row = example.metadata["reasoning_gym"]
    task_config = json.dumps(row.get("task_config", {}), sort_keys=True)
    return Job(score, (answer, row["task"], task_config, row["entry"]), _prepare)


def _prepare(answer: str, task: str, task_config: str, entry: dict[str, Any]) -> None:
    """Build the task's scorer: for some tasks that takes seconds."""
    _scorer(task, task_config)


def _is_plain_formula(answer: str) -> bool:
    """Numbers, operators, one-letter variables and elementary functions: nothing that Python could call."""
    if not _SYMPY_CHARACTERS.fullmatch(answer) or re.search(r"\.\s*[A-Za-z]", answer):
        return False
    return all(len(name) == 1 or name in _SYMPY_NAMES for name in re.findall(r"[A-Za-z]+", answer))


@lru_cache(maxsize=64)
def _scorer(task: str, task_config: str) -> Callable[[str, dict[str, Any]], float]:
    """The task's scorer. A data set of size 1: scorers look at the entry and the config, never at other entries."""
    from reasoning_gym import create_dataset

    scorer: Callable[[str, dict[str, Any]], float] = create_dataset(
        task, size=1, seed=0, **json.loads(task_config)
    ).score_answer
    return scorer
