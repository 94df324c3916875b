"""The embedded engine: samples with the trainer's own modules, so a weight sync moves nothing.

Requests are decoded in one batch that they enter and leave one by one, over a key/value cache of bounded size: which
ones, says ``scheduler.py``; what is computed, ``continuous_batch.py``; where keys and values are, ``models/cache.py``.
Each request draws from a random stream of its own (one uniform number per token, inverse of the cumulative
distribution), so its tokens do not depend on what else is in the batch, up to rounding of the logits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence

import torch

from copd_engine.models.base import Policy, PromptEncoder
from copd_engine.models.cache import PagePool, pages_of
from copd_engine.models.decode_layout import PAGE
from copd_engine.rollout.base import RolloutEngine, Sampling
from copd_engine.rollout.continuous_batch import ContinuousBatch, Counts
from copd_engine.rollout.scheduler import ActiveRequest, Scheduler
from copd_engine.types import Rollout, RolloutRequest, UserError


class EmbeddedEngine(RolloutEngine):
    """Implements :class:`copd_engine.rollout.base.RolloutEngine` over the trainer's policies.

    ``max_running``: how many sequences decode side by side. ``max_cached_tokens``: how many tokens' keys and values the
    cache holds, those of a prompt once for its group; memory is taken as it is needed, kept from call to call, and
    given back by :meth:`sleep`.
    """

    def __init__(
        self,
        policies: Mapping[str, Policy],
        encoder: PromptEncoder,
        max_running: int = 256,
        max_cached_tokens: int = 262_144,
    ) -> None:
        self._policies = dict(policies)
        self._encoder = encoder
        self._max_running = max_running
        self._max_cached_tokens = max_cached_tokens
        self._pool = PagePool(max_cached_tokens)
        self._versions = dict.fromkeys(policies, 0)
        self._counts = Counts()
        self._sampling_for: str | None = None

    def sync(self, expert: str, named_tensors: Mapping[str, torch.Tensor], version: int) -> None:
        """The tensors must be the policy's own storage; raises ValueError for copies, which would never be used."""
        self._check_idle("sync")
        own = self._policy(expert).named_parameters()
        for name, tensor in named_tensors.items():
            if name not in own or own[name].data_ptr() != tensor.data_ptr():
                raise ValueError(
                    f"embedded engine: {expert!r} samples with the trainer's modules; {name!r} is not theirs"
                )
        self._versions[expert] = version

    def generate(self, expert: str, requests: Sequence[RolloutRequest], sampling: Sampling) -> list[Rollout]:
        self._check(expert, requests, sampling)
        finished = dict(self._finished(expert, requests, sampling))
        return [finished[index] for index in range(len(requests))]

    def generate_groups(
        self, expert: str, requests: Sequence[RolloutRequest], sampling: Sampling
    ) -> Generator[list[Rollout], None, None]:
        """Whole groups as they finish. Until the last one the engine samples for nobody else: RuntimeError."""
        self._check(expert, requests, sampling)
        return self._groups(expert, requests, sampling)

    def generate_mixed(
        self, requests: Mapping[str, Sequence[RolloutRequest]], sampling: Sampling
    ) -> Generator[tuple[str, list[Rollout]], None, None]:
        """Groups as they finish, one expert after the other."""
        for expert, asked in requests.items():
            self._check(expert, asked, sampling)
        return (
            (expert, group) for expert, asked in requests.items() for group in self._groups(expert, asked, sampling)
        )

    def sleep(self) -> None:
        """Give back the cache's memory; the weights are the trainer's."""
        self._check_idle("sleep")
        self._pool.release()

    def stats(self) -> dict[str, float]:
        """The fields of :class:`copd_engine.rollout.continuous_batch.Counts`, and ``occupancy``: the share of
        ``max_running`` that was in use, mean over decode steps."""
        counts = self._counts.take()
        places = counts["num_decode_steps"] * self._max_running
        return counts | {"occupancy": counts["num_running"] / places if places else 0.0}

    def close(self) -> None:
        self.sleep()
        self._policies.clear()

    def _policy(self, expert: str) -> Policy:
        if expert not in self._policies:
            raise ValueError(f"no expert {expert!r} in this engine (known: {', '.join(sorted(self._policies))})")
        return self._policies[expert]

    def _check_idle(self, action: str) -> None:
        if self._sampling_for is not None:
            raise RuntimeError(f"embedded engine: {action} while it samples for {self._sampling_for!r}")

    def _check(self, expert: str, requests: Sequence[RolloutRequest], sampling: Sampling) -> None:
        """ValueError for an unknown expert, UserError for a request that would not fit alone."""
        self._policy(expert)
        if not requests:
            return
        prompt = max((request.prompt for request in requests), key=lambda prompt: prompt.num_tokens)
        # The last token is not fed back.
        needed = PAGE * (pages_of(prompt.num_tokens) + pages_of(sampling.max_new_tokens - 1))
        if needed > self._pool.num_pages * PAGE:
            raise UserError(
                f"rollout.max_cached_tokens = {self._max_cached_tokens}: {prompt.example.name} has {prompt.num_tokens} "
                f"tokens, and {sampling.max_new_tokens} may follow: that needs {needed}, in pages of {PAGE}. Set at "
                f"least that, or a smaller rollout.max_new_tokens"
            )

    def _groups(
        self, expert: str, requests: Sequence[RolloutRequest], sampling: Sampling
    ) -> Generator[list[Rollout], None, None]:
        missing = Counter(request.group for request in requests)
        found: dict[int, dict[int, Rollout]] = {group: {} for group in missing}
        for index, rollout in self._finished(expert, requests, sampling):
            group = rollout.request.group
            found[group][index] = rollout
            missing[group] -= 1
            if missing[group] == 0:
                members = found.pop(group)
                yield [members[i] for i in sorted(members)]

    def _finished(
        self, expert: str, requests: Sequence[RolloutRequest], sampling: Sampling
    ) -> Iterator[tuple[int, Rollout]]:
        """Rollouts as they finish, each with the index of its request."""
        self._check_idle(f"a call for {expert!r}")
        version = self._versions[expert]
        scheduler = Scheduler(requests, self._pool, self._max_running, sampling.max_new_tokens)
        batch = ContinuousBatch(self._policy(expert), self._encoder, self._pool, scheduler, sampling, self._counts)
        self._sampling_for = expert
        try:
            while scheduler.waiting or scheduler.running:
                for request in batch.step():
                    yield request.index, self._rollout(request, version)
        finally:  # the caller may stop before the end
            scheduler.close()
            self._sampling_for = None

    def _rollout(self, request: ActiveRequest, version: int) -> Rollout:
        token_ids = request.token_ids
        return Rollout(
            request=request.request,
            response_ids_N=torch.tensor(token_ids, dtype=torch.int64),
            sampler_logp_N=torch.tensor(request.logp),
            finish_reason="stop" if token_ids[-1] == self._encoder.end_token_id else "length",
            weight_version=version,
            text=self._encoder.decode(token_ids),
        )
