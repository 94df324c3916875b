"""One optimizer step of every branch: rollouts, rewards, teacher scores, updates, sync.

All rollouts and teacher scores of a step are taken before any branch is updated: teachers stand as they are at the
start of the step, so the result does not depend on the order of branches.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict
from typing import Any

from copd_engine.algorithms import Assignment, StepPlan
from copd_engine.branch import Branch, split_groups
from copd_engine.config import RunConfig
from copd_engine.dynamic_sampling import RewardedRollouts, chosen, joined, num_missing
from copd_engine.flops import Work, WorkMeter
from copd_engine.objectives import TrainSample
from copd_engine.prompts import PromptSource
from copd_engine.rewards import Reward, RewardScore
from copd_engine.rollout.base import RolloutEngine, Sampling
from copd_engine.rollout_stats import group_stats
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
    """Executes plans. ``streams`` holds the prompts of each (student, source)."""

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
        sizes = next(iter(branches.values())).policy.sizes
        self._meter = WorkMeter(sizes, _vocab_size(branches), config.model.freeze_vision)
        # Of the last step: groups drawn beyond the plan's, by dynamic sampling.
        self.num_resampled: dict[Assignment, int] = {}
        # By student, over the whole run.
        self.rollouts_drawn: dict[str, int] = defaultdict(int)
        self.steps_taken: dict[str, int] = defaultdict(int)
        self.work: dict[str, Work] = defaultdict(Work)

    def run(self, plan: StepPlan, timer: Timer) -> dict[str, dict[str, Any]]:
        """Execute ``plan``; returns the metrics of each branch that it trains."""
        for student, start in plan.copies:
            self.branches[student].start_from(self.branches[start].parameters)
            self.engine.sync(student, self.branches[student].parameters, self.branches[student].version)
        for name in plan.finished:
            self.branches[name].finish()
        before = dict(self.work)
        drawn = self.roll_out(plan, timer)
        per_branch: dict[str, dict[str, Any]] = {}
        samples: dict[str, list[TrainSample]] = {}
        for student in plan.students:
            per_branch[student] = {"rollout": {}}
            samples[student] = []
            pools = self._samples.pools({assignment: drawn[assignment][0] for assignment in plan.of(student)})
            for assignment in plan.of(student):
                rollouts, scores = drawn[assignment]
                with timer("teacher") if assignment.teacher else nullcontext():
                    kept, stats = self._samples.samples(assignment, rollouts, pools[assignment.term])
                stats["prompts_skipped"] = self.streams[student, assignment.source].num_skipped
                stats["reward_terms"] = _term_means(scores)
                if assignment.teacher is None:
                    stats["num_resampled_groups"] = self.num_resampled[assignment]
                stats |= group_stats(rollouts, scores)
                if assignment.teacher:
                    self.work[student] += self._meter.scored([sample.rollout for sample in kept])
                per_branch[student]["rollout"][assignment.source] = stats
                samples[student] += kept
            self.work[student] += self._update_work(samples[student])
            per_branch[student]["work"] = asdict(self.work[student] - before.get(student, Work()))
            self.steps_taken[student] += 1
        for student in plan.students:
            with timer("update"):
                per_branch[student] |= self.branches[student].update(samples[student])
        with timer("sync"):
            self.sync()
        return per_branch

    def _update_work(self, samples: Sequence[TrainSample]) -> Work:
        """Forward and backward, and the forwards of old log-probs and of the reference."""
        objective = self.config.objective
        later = [s.rollout for part in split_groups(samples, objective.updates_per_step)[1:] for s in part]
        referred = [s.rollout for s in samples if objective.kl.weight and s.term == "grpo"]
        trained = self._meter.trained([sample.rollout for sample in samples])
        return trained + self._meter.scored(later) + self._meter.scored(referred)

    def sync(self) -> None:
        """Give the engine every branch's weights and version."""
        for name, branch in self.branches.items():
            self.engine.sync(name, branch.parameters, branch.version)

    def roll_out(self, plan: StepPlan, timer: Timer) -> dict[Assignment, RewardedRollouts]:
        """The rewarded rollouts of each assignment, in the order of their requests; after it the engine sleeps.

        All students are sampled in one call, so each is swapped in once, or all share a batch. Groups are verified as
        they finish, by the terms of the branch whose prompts they are, whoever answered. Under dynamic sampling GRPO's
        groups without variance are replaced by those of further prompts, in one more call a round.
        """
        assignment_of: dict[tuple[str, int], Assignment] = {}
        groups: dict[tuple[str, int], RewardedRollouts] = {}
        wanted = {assignment: assignment.num_prompts for assignment in plan.assignments}
        for rounds_left in range(self.config.objective.dynamic_sampling.max_rounds, -1, -1):
            with timer("rollout"):
                begun = self._generate(self._requests(plan, wanted, assignment_of), assignment_of)
                if not rounds_left:
                    self.engine.sleep()
            with timer("verify"):
                for key, (rollouts, scores_of) in begun.items():
                    scores = scores_of()
                    pairs = zip(rollouts, scores, strict=True)
                    groups[key] = [rollout.with_reward(score.total) for rollout, score in pairs], scores
            drawn = _by_assignment(plan, assignment_of, groups)
            wanted = {a: num_missing(a.num_prompts, drawn[a]) for a in plan.assignments if a.teacher is None}
            if rounds_left and not any(wanted.values()):
                with timer("rollout"):
                    self.engine.sleep()
                break
        asked = Counter(assignment_of.values())
        self.num_resampled = {a: asked[a] - a.num_prompts for a in plan.assignments}
        return {
            a: joined(chosen(found, a.num_prompts) if a.teacher is None and self.num_resampled[a] else found)
            for a, found in drawn.items()
        }

    def _requests(
        self, plan: StepPlan, wanted: Mapping[Assignment, int], assignment_of: dict[tuple[str, int], Assignment]
    ) -> dict[str, list[RolloutRequest]]:
        """What each student is asked for so many further prompts of each assignment. Groups count from 0 per student;
        the new ones are entered in ``assignment_of``."""
        requests: dict[str, list[RolloutRequest]] = {}
        for student in plan.students:
            requests[student] = []
            group = sum(of_student == student for of_student, _ in assignment_of)
            for assignment in plan.of(student):
                first = list(assignment_of.values()).count(assignment)
                prompts = self.streams[student, assignment.source].take(wanted.get(assignment, 0))
                for number, prompt in enumerate(prompts, start=first):
                    for member in range(self.config.rollout.group_size):
                        # Not the running group: the order of branches in the config must not change what is drawn.
                        seed = derive_seed(
                            self.config.seed, "rollout", plan.step, student, assignment.source, number, member
                        )
                        requests[student].append(RolloutRequest(prompt, seed, group))
                    assignment_of[student, group] = assignment
                    group += 1
        return {student: asked for student, asked in requests.items() if asked}

    def _generate(
        self, requests: Mapping[str, list[RolloutRequest]], assignment_of: Mapping[tuple[str, int], Assignment]
    ) -> dict[tuple[str, int], tuple[list[Rollout], Callable[[], list[RewardScore]]]]:
        """Rollouts of each group that the engine has not lost, and what waits for their scores."""
        begun: dict[tuple[str, int], tuple[list[Rollout], Callable[[], list[RewardScore]]]] = {}
        with closing(self.engine.generate_mixed(requests, self.sampling)) as groups:
            for student, rollouts in groups:
                self._check_versions(student, rollouts)
                self.rollouts_drawn[student] += len(rollouts)
                key = student, rollouts[0].request.group
                begun[key] = rollouts, self.rewards[assignment_of[key].source].begin(rollouts)
        for student in requests:
            sampled = [rollout for (name, _), (group, _) in begun.items() if name == student for rollout in group]
            self.work[student] += self._meter.sampled(sampled)
        return begun

    def _check_versions(self, student: str, rollouts: Sequence[Rollout]) -> None:
        current, allowed = self.branches[student].version, self.config.rollout.max_staleness
        for rollout in rollouts:
            if not current - allowed <= rollout.weight_version <= current:
                raise RuntimeError(
                    f"the engine sampled with version {rollout.weight_version} of {student!r}, "
                    f"the trainer is at {current} (rollout.max_staleness = {allowed})"
                )


def _vocab_size(branches: Mapping[str, Branch]) -> int:
    return len(next(iter(branches.values())).policy.lm_head_weight)


def _by_assignment(
    plan: StepPlan,
    assignment_of: Mapping[tuple[str, int], Assignment],
    groups: Mapping[tuple[str, int], RewardedRollouts],
) -> dict[Assignment, list[RewardedRollouts]]:
    """The groups of each assignment in the order in which they were asked for."""
    found: dict[Assignment, list[RewardedRollouts]] = {assignment: [] for assignment in plan.assignments}
    for key, assignment in assignment_of.items():
        if key in groups:  # or the engine has lost it
            found[assignment].append(groups[key])
    return found


def _term_means(scores: Sequence[RewardScore]) -> dict[str, float]:
    return {name: mean_of([score.terms[name] for score in scores]) for name in (scores[0].terms if scores else ())}


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from what it is for; independent of order and process."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1
