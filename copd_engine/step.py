"""One optimizer step of every branch: rollouts, rewards, teacher scores, updates, sync.

All rollouts and teacher scores of a step are taken before any branch is updated: teachers stand as they are at the
start of the step, so the result does not depend on the order of branches.
"""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from typing import Any

from copd_engine.algorithms import Assignment, StepPlan
from copd_engine.branch import Branch
from copd_engine.config import RunConfig
from copd_engine.objectives import TrainSample
from copd_engine.prompts import PromptSource
from copd_engine.rewards import Reward, RewardScore
from copd_engine.rollout.base import RolloutEngine, Sampling
from copd_engine.samples import SampleBuilder, mean_of
from copd_engine.types import Rollout, RolloutRequest


class Timer:
    """Seconds by part of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - begin


class StepRunner:
    """Executes plans. ``streams`` holds the prompts of each (student, source); ``rollouts_drawn`` counts by student."""

    def __init__(
        self,
        config: RunConfig,
        branches: Mapping[str, Branch],
        engine: RolloutEngine,
        streams: Mapping[tuple[str, str], PromptSource],
    ) -> None:
        self.config = config
        self.branches = branches
        self.engine = engine
        self.streams = streams
        self._samples = SampleBuilder(config, branches)
        self.sampling = Sampling(config.rollout.temperature, config.rollout.max_new_tokens)
        self.rewards = {
            branch.name: Reward(branch.reward, config.rollout.max_new_tokens, f"branches.{number}.reward")
            for number, branch in enumerate(config.branches)
        }
        self.rollouts_drawn: dict[str, int] = defaultdict(int)

    def run(self, plan: StepPlan, timer: Timer) -> dict[str, dict[str, Any]]:
        """Execute ``plan``; returns the metrics of each branch."""
        drawn = self.roll_out(plan, timer)
        per_branch: dict[str, dict[str, Any]] = {}
        samples: dict[str, list[TrainSample]] = {}
        for student in self.branches:
            per_branch[student] = {"rollout": {}}
            samples[student] = []
            for assignment in plan.of(student):
                rollouts, scores = drawn[assignment]
                with timer("teacher") if assignment.teacher else nullcontext():
                    kept, stats = self._samples.samples(assignment, rollouts)
                stats["prompts_skipped"] = self.streams[student, assignment.source].num_skipped
                stats["reward_terms"] = _term_means(scores)
                per_branch[student]["rollout"][assignment.source] = stats
                samples[student] += kept
        for student, branch in self.branches.items():
            with timer("update"):
                per_branch[student] |= branch.update(samples[student])
        with timer("sync"):
            self.sync()
        return per_branch

    def sync(self) -> None:
        """Give the engine every branch's weights and version."""
        for name, branch in self.branches.items():
            self.engine.sync(name, branch.parameters, branch.version)

    def roll_out(self, plan: StepPlan, timer: Timer) -> dict[Assignment, tuple[list[Rollout], list[RewardScore]]]:
        """The rewarded rollouts of each assignment, in the order of their requests; after it the engine sleeps.

        All students are sampled in one call, so each is swapped in once, or all share a batch. Groups are verified as
        they finish, by the terms of the branch whose prompts they are, whoever answered.
        """
        begun: dict[tuple[str, int], tuple[list[Rollout], Callable[[], list[RewardScore]]]] = {}
        with timer("rollout"):
            requests, assignment_of = self._requests(plan)
            with closing(self.engine.generate_mixed(requests, self.sampling)) as groups:
                for student, rollouts in groups:
                    self._check_versions(student, rollouts)
                    self.rollouts_drawn[student] += len(rollouts)
                    key = student, rollouts[0].request.group
                    begun[key] = rollouts, self.rewards[assignment_of[key].source].begin(rollouts)
            self.engine.sleep()
        drawn: dict[Assignment, tuple[list[Rollout], list[RewardScore]]] = {a: ([], []) for a in plan.assignments}
        with timer("verify"):
            for key, assignment in assignment_of.items():
                if key not in begun:  # the engine has lost it
                    continue
                rollouts, scores_of = begun[key]
                scores = scores_of()
                pairs = zip(rollouts, scores, strict=True)
                drawn[assignment][0].extend(rollout.with_reward(score.total) for rollout, score in pairs)
                drawn[assignment][1].extend(scores)
        return drawn

    def _requests(self, plan: StepPlan) -> tuple[dict[str, list[RolloutRequest]], dict[tuple[str, int], Assignment]]:
        """What each student is asked, and the assignment of each of its groups; groups count from 0 per student."""
        requests: dict[str, list[RolloutRequest]] = {}
        assignment_of: dict[tuple[str, int], Assignment] = {}
        for student in self.branches:
            requests[student] = []
            group = 0
            for assignment in plan.of(student):
                prompts = self.streams[student, assignment.source].take(assignment.num_prompts)
                for number, prompt in enumerate(prompts):
                    for member in range(self.config.rollout.group_size):
                        # Not the running group: the order of branches in the config must not change what is drawn.
                        seed = derive_seed(
                            self.config.seed, "rollout", plan.step, student, assignment.source, number, member
                        )
                        requests[student].append(RolloutRequest(prompt, seed, group))
                    assignment_of[student, group] = assignment
                    group += 1
        return requests, assignment_of

    def _check_versions(self, student: str, rollouts: Sequence[Rollout]) -> None:
        for rollout in rollouts:
            if rollout.weight_version != self.branches[student].version:
                raise RuntimeError(
                    f"the engine sampled with version {rollout.weight_version} of {student!r}, "
                    f"the trainer is at {self.branches[student].version}"
                )


def _term_means(scores: Sequence[RewardScore]) -> dict[str, float]:
    return {name: mean_of([score.terms[name] for score in scores]) for name in (scores[0].terms if scores else ())}


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from what it is for; independent of order and process."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1
