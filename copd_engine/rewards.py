"""The reward of a rollout: a weighted sum of terms.

Terms shape training only. Held-out accuracy is the verifier alone: ``verifiers.verify_all``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from copd_engine.config import RewardTerm
from copd_engine.types import Rollout, UserError
from copd_engine.verifiers import begin_verify, get_verifier, shared_pool
from copd_engine.verifiers.pool import Job
from copd_engine.verifiers.text import matches_format


@dataclass(frozen=True)
class RewardScore:
    """``total``, and what each term gave before its weight, by the term's name."""

    total: float
    terms: Mapping[str, float] = field(default_factory=dict)


class Reward:
    """The sum of ``terms``, each ``weight`` times its value.

    ``verifier``: the row's verifier, or the one that the term names, 0 to 1. ``format``: 1 where the whole response
    matches the pattern. ``overlong``: :func:`overlong_penalty`, 0 to -1. Raises :class:`UserError` (it names ``where``,
    the section of the config) for an unknown verifier or a buffer above ``max_new_tokens``.
    """

    def __init__(self, terms: Sequence[RewardTerm], max_new_tokens: int, where: str = "reward") -> None:
        self.terms = tuple(terms)
        self.max_new_tokens = max_new_tokens
        self.names = _names(self.terms)
        for index, term in enumerate(self.terms):
            if term.name is not None:
                try:
                    get_verifier(term.name)
                except UserError as error:
                    raise UserError(f"{where}.{index}.name: {error}") from None
            if term.buffer_tokens is not None and term.buffer_tokens > max_new_tokens:
                raise UserError(
                    f"{where}.{index}.buffer_tokens = {term.buffer_tokens}: "
                    f"must be at most rollout.max_new_tokens = {max_new_tokens}"
                )

    def score(self, rollouts: Sequence[Rollout]) -> list[RewardScore]:
        """Total and terms of each rollout, in order. One batch through the workers per term."""
        return self.begin(rollouts)()

    def begin(self, rollouts: Sequence[Rollout]) -> Callable[[], list[RewardScore]]:
        """:meth:`score` beside the caller: what runs in this process is done at once, in the caller's thread, and what
        runs in workers goes on. The scores are those of the returned function, which waits for them."""
        columns = [self._begin(term, rollouts) for term in self.terms]
        return lambda: self._sums([column() for column in columns])

    def _sums(self, columns: Sequence[Sequence[float]]) -> list[RewardScore]:
        scores = []
        for values in zip(*columns, strict=True):
            total = sum(term.weight * value for term, value in zip(self.terms, values, strict=True))
            scores.append(RewardScore(total, dict(zip(self.names, values, strict=True))))
        return scores

    def _begin(self, term: RewardTerm, rollouts: Sequence[Rollout]) -> Callable[[], list[float]]:
        if term.kind == "verifier":
            return begin_verify([(r.text, r.request.prompt.example) for r in rollouts], term.name)
        if term.kind == "format":
            assert term.pattern is not None
            return shared_pool().submit([Job(matches_format, (r.text, term.pattern)) for r in rollouts]).result
        assert term.buffer_tokens is not None
        penalties = [overlong_penalty(r.num_tokens, self.max_new_tokens, term.buffer_tokens) for r in rollouts]
        return lambda: penalties


def overlong_penalty(num_tokens: int, max_tokens: int, buffer_tokens: int) -> float:
    """DAPO's soft punishment (arXiv 2503.14476, eq. 13) of a response of ``num_tokens``.

    0 up to ``max_tokens - buffer_tokens``, then in a line down to -1 at ``max_tokens``, and -1 above.
    """
    left = (max_tokens - buffer_tokens) - num_tokens
    return max(min(left, 0) / buffer_tokens, -1.0)


def _names(terms: Sequence[RewardTerm]) -> tuple[str, ...]:
    """The kind, with the verifier's name where the term gives one; repeated ones are numbered."""
    plain = [f"{term.kind}:{term.name}" if term.name else term.kind for term in terms]
    return tuple(
        f"{name}.{plain[:index].count(name) + 1}" if plain.count(name) > 1 else name for index, name in enumerate(plain)
    )
