"""From rewarded rollouts to the samples of a loss: GRPO on a branch's own prompts, distillation on a teacher's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from copd_engine.algorithms import Assignment
from copd_engine.branch import Branch
from copd_engine.config import RunConfig
from copd_engine.length_limit import LimitedRollouts, limit_length
from copd_engine.objectives import TrainSample, groups_with_variance, grpo_advantages, token_weight
from copd_engine.types import Rollout


@dataclass(frozen=True)
class Pool:
    """What a loss term of one student is normalised over: its weight, its responses that count, and their tokens."""

    weight: float
    num_responses: int
    num_tokens: int

    def __add__(self, other: Pool) -> Pool:
        return Pool(
            self.weight + other.weight,
            self.num_responses + other.num_responses,
            self.num_tokens + other.num_tokens,
        )


class SampleBuilder:
    """Makes the samples of each assignment, and what there is to say about its rollouts."""

    def __init__(self, config: RunConfig, branches: Mapping[str, Branch]) -> None:
        self.config = config
        self.branches = branches

    def pools(self, drawn: Mapping[Assignment, Sequence[Rollout]]) -> dict[str, Pool]:
        """By loss term, of all that one student has ``drawn`` in the step: mixed RLVR's one term has an assignment for
        each source of prompts.

        All that counts stands in the denominators, also what is not trained on; of what was cut, the tokens that are
        left.
        """
        pools: dict[str, Pool] = {}
        for assignment, rollouts in drawn.items():
            left = {id(rollout.request): rollout.num_tokens for rollout in self._limited(rollouts).rollouts}
            counted = self._counted(assignment, rollouts)
            num_tokens = sum(left.get(id(rollout.request), rollout.num_tokens) for rollout in counted)
            pool = Pool(assignment.weight, len(counted), num_tokens)
            pools[assignment.term] = pools[assignment.term] + pool if assignment.term in pools else pool
        return pools

    def samples(
        self, assignment: Assignment, rollouts: Sequence[Rollout], pool: Pool
    ) -> tuple[list[TrainSample], dict[str, Any]]:
        """What the student is trained on, and the numbers of ``branches.<name>.rollout.<source>`` in the metrics.
        ``pool``: that of the assignment's term."""
        if assignment.teacher is None:
            return self._native_samples(assignment, rollouts, pool)
        return self._cross_samples(assignment, rollouts, pool)

    def _native_samples(
        self, assignment: Assignment, rollouts: Sequence[Rollout], pool: Pool
    ) -> tuple[list[TrainSample], dict[str, Any]]:
        """GRPO samples. Responses without advantage add nothing to the gradient unless a KL to the reference does; they
        count but are not forwarded.

        The advantages are those of the whole group; what is too long is cut or left out after.
        """
        objective = self.config.objective
        if not rollouts:
            return [], self._stats(assignment, rollouts, LimitedRollouts([])) | {
                "zero_variance_groups": 0,
                "num_groups": 0,
            }
        advantages, flat_groups, num_groups = grpo_advantages(rollouts, objective.std_mode, objective.std_epsilon)
        advantage_of = {id(rollout.request): advantage for rollout, advantage in zip(rollouts, advantages, strict=True)}
        limited = self._limited(rollouts)
        forwarded = {
            id(rollout.request)
            for rollout in self._counted(assignment, rollouts)
            if advantage_of[id(rollout.request)] != 0.0 or objective.kl.weight > 0
        }
        samples = [
            TrainSample(
                rollout=rollout,
                term=assignment.term,
                token_weight=self._token_weight(pool, rollout),
                advantage=advantage_of[id(rollout.request)],
            )
            for rollout in limited.rollouts
            if id(rollout.request) in forwarded
        ]
        stats = self._stats(assignment, rollouts, limited)
        return samples, stats | {"zero_variance_groups": flat_groups, "num_groups": num_groups}

    def _cross_samples(
        self, assignment: Assignment, rollouts: Sequence[Rollout], pool: Pool
    ) -> tuple[list[TrainSample], dict[str, Any]]:
        """Distillation samples: the student's own responses, scored by the teacher as it stands now."""
        assert assignment.teacher is not None
        teacher = self.branches[assignment.teacher]
        beta = self.branches[assignment.student].beta * assignment.beta_scale
        limited = self._limited(rollouts)
        samples = [TrainSample(r, assignment.term, self._token_weight(pool, r), beta=beta) for r in limited.rollouts]
        if self.config.distillation.signal == "sampled":
            scores = teacher.score(limited.rollouts)
            samples = [replace(s, teacher_logp_N=logp_N) for s, logp_N in zip(samples, scores, strict=True)]
        else:
            states = teacher.teacher_states(limited.rollouts)
            samples = [replace(s, teacher=of_sample) for s, of_sample in zip(samples, states, strict=True)]
        return samples, self._stats(assignment, rollouts, limited) | {"beta": beta}

    def _counted(self, assignment: Assignment, rollouts: Sequence[Rollout]) -> Sequence[Rollout]:
        """Those that stand in the denominators."""
        if assignment.teacher is not None or self.config.objective.zero_variance == "keep":
            return rollouts
        kept = groups_with_variance(rollouts)
        return [rollout for rollout in rollouts if rollout.request.group in kept]

    def _token_weight(self, pool: Pool, rollout: Rollout) -> float:
        """Loss weight of each of a rollout's tokens by ``objective.loss_aggregation``."""
        return token_weight(
            pool.weight,
            pool.num_responses,
            rollout.num_tokens,
            self.config.objective.loss_aggregation,
            pool.num_tokens,
            self.config.rollout.max_new_tokens,
        )

    def _limited(self, rollouts: Sequence[Rollout]) -> LimitedRollouts:
        """What is trained on: within ``optim.max_length``, and under ``mask_truncated`` only what ended by itself."""
        if self.config.objective.mask_truncated:
            rollouts = [rollout for rollout in rollouts if rollout.finish_reason != "length"]
        return limit_length(rollouts, self.config.optim.max_length, self.config.optim.too_long)

    def _stats(self, assignment: Assignment, rollouts: Sequence[Rollout], limited: LimitedRollouts) -> dict[str, float]:
        count = len(rollouts)
        return {
            "reward_mean": mean_of([r.reward for r in rollouts]),
            "response_tokens_mean": mean_of([r.num_tokens for r in rollouts]),
            "truncated_fraction": mean_of([r.finish_reason == "length" for r in rollouts]),
            "num_rollouts": count,
            "requests_lost": assignment.num_prompts * self.config.rollout.group_size - count,
            "too_long_truncated": limited.num_truncated,
            "too_long_dropped": limited.num_dropped,
        }


def mean_of(values: Sequence[float]) -> float:
    """NaN where an engine lost all."""
    return sum(values) / len(values) if values else float("nan")
