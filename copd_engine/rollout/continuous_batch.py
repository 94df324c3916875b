"""The steps of a batch whose sequences enter and leave one by one: prefill, draw, decode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from copd_engine.models.base import Policy, PromptEncoder
from copd_engine.models.cache import DecodeCache, PagePool, PrefillCache
from copd_engine.models.decode_layout import PAGE
from copd_engine.packing import pack
from copd_engine.rollout.base import Sampling
from copd_engine.rollout.draws import draw
from copd_engine.rollout.scheduler import ActiveRequest, Scheduler


@dataclass
class Counts:
    """What :meth:`copd_engine.rollout.base.RolloutEngine.stats` reports.

    ``num_prefill_tokens``: tokens of prompts and, where a sequence was preempted, of its response;
    ``num_running``: sequences summed over decode steps; ``cached_tokens`` and ``cache_bytes``: the most at a time.
    """

    num_rollouts: int = 0
    num_tokens: int = 0
    num_prefills: int = 0
    num_prefill_tokens: int = 0
    num_decode_steps: int = 0
    num_running: int = 0
    num_preempted: int = 0
    cached_tokens: int = 0
    cache_bytes: int = 0

    def take(self) -> dict[str, float]:
        """All fields, which start anew at 0."""
        taken = asdict(self)
        for name in taken:
            setattr(self, name, 0)
        return taken


class ContinuousBatch:
    """Runs the requests of ``scheduler`` on ``policy``, whose weights must not change meanwhile."""

    def __init__(
        self,
        policy: Policy,
        encoder: PromptEncoder,
        pool: PagePool,
        scheduler: Scheduler,
        sampling: Sampling,
        counts: Counts,
    ) -> None:
        self._policy = policy
        self._encoder = encoder
        self._pool = pool
        self._scheduler = scheduler
        self._sampling = sampling
        self._counts = counts
        self._cache = DecodeCache(pool)
        self._rows: list[ActiveRequest] = []  # in the cache's order
        self._arranged = False
        self._token_B = self._position_B = torch.empty(0)
        self._suppressed = torch.tensor(encoder.suppressed_token_ids, dtype=torch.int64, device=policy.device)
        self._device = policy.device

    @torch.inference_mode()
    def step(self) -> list[ActiveRequest]:
        """One more token of every running sequence, after letting in who fits; returns those that are complete."""
        finished: list[ActiveRequest] = []
        preempted_before = self._scheduler.num_preempted
        while admitted := self._scheduler.admit():
            self._arranged = False
            finished += self._start(admitted)
        if self._scheduler.running:
            if self._scheduler.extend():
                self._arranged = False
            self._note_use()
            finished += self._decode()
        self._counts.num_preempted += self._scheduler.num_preempted - preempted_before
        return finished

    def _start(self, admitted: Sequence[ActiveRequest]) -> list[ActiveRequest]:
        """Prefill what is not in the cache and draw the first tokens of those that have none."""
        asked = [request for request in admitted if request.needs_prefill]
        if asked:
            self._prefill(asked)
        self._note_use()
        new = [request for request in admitted if not request.token_ids]
        hidden_D = [request.entered[0].hidden_D for request in new]
        return self._draw(new, torch.stack([x for x in hidden_D if x is not None]))[1] if new else []

    def _prefill(self, requests: Sequence[ActiveRequest]) -> None:
        """One packed forward; a prompt's keys and values are kept once, those of a response so far with its owner."""
        encoder, device = self._encoder, self._device
        # Who has tokens already stands for its prompt too; of new members of a group one is enough.
        asked: list[ActiveRequest] = []
        seen: set[int] = set()
        for request in sorted(requests, key=lambda request: not request.token_ids):
            if request.token_ids or id(request.request.prompt) not in seen:
                asked.append(request)
                seen.add(id(request.request.prompt))
        batch = pack(
            [request.request.prompt for request in asked],
            [torch.tensor(request.token_ids, dtype=torch.int64) for request in asked],
            encoder.visual_token_ids,
            encoder.spatial_merge_size,
        )
        bounds, prompt_of_B = batch.cu_seqlens.tolist(), batch.prompt_of_B.tolist()
        num_prompts = len(batch.prompt_lengths_P)
        kept: dict[int, Sequence[int]] = {}  # segment of the packed row -> its pages
        for b, request in enumerate(asked):
            cached, place = request.entered
            if cached.hidden_D is None:
                kept[prompt_of_B[b]] = cached.pages
            if place.num_tokens:
                kept[num_prompts + b] = place.pages
        cache = PrefillCache(self._pool, [(bounds[k], bounds[k + 1], pages) for k, pages in kept.items()], device)
        hidden_ND = self._policy.hidden_states(batch.to(device), cache)
        first_row_B = torch.searchsorted(batch.sequence_N, torch.arange(len(asked)))
        for request, hidden_D in zip(asked, hidden_ND.index_select(0, first_row_B.to(device)), strict=True):
            cached = request.entered[0]
            if cached.hidden_D is None:
                cached.hidden_D = hidden_D
        self._counts.num_prefills += 1
        self._counts.num_prefill_tokens += batch.num_tokens

    def _decode(self) -> list[ActiveRequest]:
        if self._arranged:
            self._position_B = self._position_B + 1
        else:
            self._arrange()
        self._cache.advance()
        hidden_BD = self._policy.decode_step(self._token_B, self._position_B, self._cache)
        self._counts.num_decode_steps += 1
        self._counts.num_running += len(self._rows)
        self._token_B, finished = self._draw(self._rows, hidden_BD)
        return finished

    def _arrange(self) -> None:
        """Bring those who run now, their last tokens and positions in the cache's order."""
        owners = {id(request.place): request for request in self._scheduler.running}
        self._cache.arrange([request.entered[1] for request in self._scheduler.running])
        self._rows = [owners[id(row)] for row in self._cache.rows]
        tokens = [request.token_ids[-1] for request in self._rows]
        positions = [request.request.prompt.next_position + request.num_cached_tokens for request in self._rows]
        self._token_B, self._position_B = torch.tensor([tokens, positions], device=self._device)
        self._arranged = True

    def _draw(
        self, requests: Sequence[ActiveRequest], hidden_BD: torch.Tensor
    ) -> tuple[torch.Tensor, list[ActiveRequest]]:
        """The next token of each and its log-prob under the policy at the sampling temperature; who is complete leaves.
        Returns the tokens, and who left.

        Suppressed ids are left out of the draw; the log-prob is the policy's own over the whole vocabulary, as the
        trainer computes it.
        """
        policy, temperature = self._policy, self._sampling.temperature
        logits_BV = torch.nn.functional.linear(hidden_BD, policy.lm_head_weight, policy.lm_head_bias).float()
        logp_BV = torch.log_softmax(logits_BV / (temperature or 1.0), dim=-1)
        uniform = [next(request.uniforms) for request in requests]
        uniform_B = torch.tensor(uniform, dtype=torch.float64, device=self._device)
        greedy_B = None if temperature else torch.ones_like(uniform_B, dtype=torch.bool)
        token_B = draw(logp_BV, uniform_B, greedy_B, self._suppressed)
        token_logp_B = logp_BV.gather(1, token_B[:, None]).squeeze(1)
        finished = []
        for request, token, logp in zip(requests, token_B.tolist(), token_logp_B.tolist(), strict=True):
            request.token_ids.append(token)
            request.logp.append(logp)
            if token == self._encoder.end_token_id or len(request.token_ids) == self._sampling.max_new_tokens:
                finished.append(request)
        if finished:
            self._scheduler.finish(finished)
            self._arranged = False
        self._counts.num_tokens += len(requests)
        self._counts.num_rollouts += len(finished)
        return token_B, finished

    def _note_use(self) -> None:
        self._counts.cached_tokens = max(self._counts.cached_tokens, self._pool.num_used * PAGE)
        self._counts.cache_bytes = max(self._counts.cache_bytes, self._pool.bytes)
