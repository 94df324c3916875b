"""Verifiers by name: how right a response is, from 0 to 1.

A verifier looks at the response's text (special tokens already removed) and the example. It never raises on what a
policy wrote: a response that cannot be read is wrong. It raises :class:`UserError` where the example itself cannot be
scored; :func:`check_example` finds that when rows are loaded. Those that call sympy run in worker processes (``pool``).
"""

from __future__ import annotations

import importlib
import importlib.util
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from copd_engine.types import Example, UserError, suggest
from copd_engine.verifiers.choice import check_choice, multiple_choice
from copd_engine.verifiers.gym import check_reasoning_gym, gym_job, gym_number_job
from copd_engine.verifiers.iou import check_box, check_span, iou_box, iou_span
from copd_engine.verifiers.json_fields import check_json, json_fields
from copd_engine.verifiers.mathematics import check_math, math_job
from copd_engine.verifiers.numeric import check_numeric, numeric
from copd_engine.verifiers.pool import Job, shared_pool
from copd_engine.verifiers.text import answer_after_hash, exact, normalized

#: What :func:`get_verifier` returns.
Verifier = Callable[[str, Example], float]


def _check_answer(example: Example) -> None:
    """Raises UserError for a blank gold."""
    if not example.answer.strip():
        raise UserError(f"{example.name}: answer = {example.answer!r}: must not be blank")


@dataclass(frozen=True)
class BuiltIn:
    """A verifier of ours.

    ``score`` gives the score, or the job whose score it is: what may take for ever runs in a worker. ``check`` raises
    UserError for an example that cannot be scored. ``package``: the module that it needs, and its name on the package
    index.
    """

    score: Callable[[str, Example], Job | float]
    check: Callable[[Example], None] = _check_answer
    package: tuple[str, str] | None = None

    def __call__(self, response: str, example: Example) -> float:
        return _verify([(self, response, example)])[0]


_MATH = ("math_verify", "math-verify")
_GYM = ("reasoning_gym", "reasoning-gym")
VERIFIERS: Mapping[str, BuiltIn] = MappingProxyType(
    {
        "answer_after_hash": BuiltIn(answer_after_hash),
        "exact": BuiltIn(exact),
        "normalized": BuiltIn(normalized),
        "numeric": BuiltIn(numeric, check_numeric),
        "multiple_choice": BuiltIn(multiple_choice, check_choice),
        "math": BuiltIn(math_job, check_math, _MATH),
        "iou_box": BuiltIn(iou_box, check_box),
        "iou_span": BuiltIn(iou_span, check_span),
        "json_fields": BuiltIn(json_fields, check_json),
        "reasoning_gym": BuiltIn(gym_job, check_reasoning_gym, _GYM),
        "reasoning_gym_number": BuiltIn(gym_number_job, check_reasoning_gym, _GYM),
    }
)


def get_verifier(name: str) -> Verifier:
    """The verifier of that name; ``module:function`` imports the user's own, which runs in this process.

    Of the user's own the result is checked to be in [0, 1], and an exception becomes a UserError.
    Raises :class:`UserError` for an unknown name (with the nearest known one), a function that cannot be imported, or a
    missing optional package.
    """
    if ":" in name:
        return _imported(name)
    if name not in VERIFIERS:
        raise UserError(f"unknown verifier {name!r}{suggest(name, VERIFIERS)}; module:function names your own")
    verifier = VERIFIERS[name]
    if verifier.package is not None:
        module, package = verifier.package
        if importlib.util.find_spec(module) is None:
            raise UserError(f"verifier {name!r} needs the package {package}: install the extra 'llm'")
    return verifier


def check_example(example: Example, verifier: str | None = None) -> None:
    """Raises :class:`UserError` where ``verifier`` (default: the example's own) does not exist or cannot score it."""
    found = get_verifier(verifier or example.verifier)
    if isinstance(found, BuiltIn):
        found.check(example)


def verify_all(pairs: Iterable[tuple[str, Example]], verifier: str | None = None) -> list[float]:
    """Scores of (response, example) pairs in order, by ``verifier`` or by each example's own.

    Those that run in workers share them; one that hangs costs its own score (0), and nobody else's. How many did so,
    ``shared_pool().failures`` counts.
    """
    return _verify(_calls(pairs, verifier))


def begin_verify(pairs: Iterable[tuple[str, Example]], verifier: str | None = None) -> Callable[[], list[float]]:
    """:func:`verify_all` beside the caller: what runs in this process is done at once, what runs in workers goes on.

    The scores are those of the returned function, which waits for them.
    """
    scores, jobs = _begin(_calls(pairs, verifier))
    if not jobs:
        return lambda: scores
    future = shared_pool().submit(list(jobs.values()))
    return lambda: _filled(scores, jobs, future.result())


def _calls(pairs: Iterable[tuple[str, Example]], verifier: str | None) -> list[tuple[Verifier, str, Example]]:
    pairs = list(pairs)
    found = {name: get_verifier(name) for name in {verifier or example.verifier for _, example in pairs}}
    return [(found[verifier or example.verifier], response, example) for response, example in pairs]


def _verify(calls: list[tuple[Verifier, str, Example]]) -> list[float]:
    scores, jobs = _begin(calls)
    return _filled(scores, jobs, shared_pool().run(list(jobs.values()))) if jobs else scores


def _begin(calls: list[tuple[Verifier, str, Example]]) -> tuple[list[float], dict[int, Job]]:
    """Scores of what runs in this process, and the jobs whose scores are to be filled in, by index."""
    scores = [0.0] * len(calls)
    jobs: dict[int, Job] = {}
    for index, (verifier, response, example) in enumerate(calls):
        if not isinstance(verifier, BuiltIn):
            scores[index] = verifier(response, example)
            continue
        verifier.check(example)
        score = verifier.score(response, example)
        if isinstance(score, Job):
            jobs[index] = score
        else:
            scores[index] = score
    return scores, jobs


def _filled(scores: list[float], jobs: Mapping[int, Job], of_jobs: list[float]) -> list[float]:
    filled = dict(enumerate(scores)) | dict(zip(jobs, of_jobs, strict=True))
    return list(filled.values())


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
        try:
            score = function(response, example)
        except UserError:
            raise
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise UserError(
                f"verifier {name!r} failed for {example.name}: {type(error).__name__}: {error} "
                f"({place.filename}:{place.lineno}); it must return a number from 0 to 1"
            ) from error
        try:
            value = float(score)
        except (TypeError, ValueError):
            value = float("nan")
        if not 0.0 <= value <= 1.0:
            raise UserError(f"verifier {name!r} returned {score!r} for {example.name}: must be from 0 to 1")
        return value

    return verifier
