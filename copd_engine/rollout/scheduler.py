"""Which requests decode side by side: waiting ones enter as places and pages become free.

Requests enter in the order of their prompts, so that the members of a group share the prompt's pages. Sequences take a
page at a time as they grow. When none is free, prompts that nobody continues are dropped, then the youngest sequence is
preempted: it gives its pages back, waits in front, and is computed again later from the tokens that it has.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from copd_engine.models.cache import CachedSequence, PagePool, pages_of
from copd_engine.models.decode_layout import PAGE
from copd_engine.rollout.uniform_stream import uniform_stream
from copd_engine.types import EncodedPrompt, RolloutRequest

#: Tokens of a prefill. A longer prompt is prefilled alone.
PREFILL_TOKENS = 16_384
#: A prefill costs as much as a decode step, so it waits until this share of the places is free.
REFILL_SHARE = 1 / 8
#: Free pages per running sequence that who enters must leave, or it would soon be preempted. With 2 half as many
#: sequences were preempted as with 1, in the same time; with 4 places stood empty and a tenth was lost.
GROWTH_PAGES = 2


@dataclass(eq=False)
class CachedPrompt:
    """A prefilled prompt. ``hidden_D``: what its first response token is drawn from; ``num_users``: sequences that
    continue it now."""

    prompt: EncodedPrompt
    pages: list[int]
    hidden_D: torch.Tensor | None = None
    num_users: int = 0


@dataclass(eq=False)
class ActiveRequest:
    """A request and what it has drawn. ``place``: its keys and values, None while it waits."""

    index: int
    request: RolloutRequest
    uniforms: Iterator[float]
    token_ids: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    cached_prompt: CachedPrompt | None = None
    place: CachedSequence | None = None

    @property
    def num_cached_tokens(self) -> int:
        """Tokens of its own that the next step finds in the cache; the last one enters in that step."""
        return max(0, len(self.token_ids) - 1)

    @property
    def entered(self) -> tuple[CachedPrompt, CachedSequence]:
        """Where it is in the cache."""
        assert self.cached_prompt is not None
        assert self.place is not None
        return self.cached_prompt, self.place

    @property
    def room(self) -> int:
        """How many more tokens its pages hold."""
        return len(self.entered[1].pages) * PAGE - self.num_cached_tokens

    @property
    def needs_prefill(self) -> bool:
        return bool(self.token_ids) or self.entered[0].hidden_D is None


class Scheduler:
    """``max_running`` places and the pages of ``pool`` for ``requests``; ``running`` in the order of entry."""

    def __init__(
        self, requests: Sequence[RolloutRequest], pool: PagePool, max_running: int, max_new_tokens: int
    ) -> None:
        first: dict[int, int] = {}
        for index, request in enumerate(requests):
            first.setdefault(id(request.prompt), index)
        order = sorted(range(len(requests)), key=lambda index: first[id(requests[index].prompt)])
        self.waiting = deque(ActiveRequest(i, requests[i], uniform_stream(requests[i].seed)) for i in order)
        self.running: list[ActiveRequest] = []
        self.num_preempted = 0
        self._pool = pool
        self._max_running = max_running
        self._max_new_tokens = max_new_tokens
        self._prompts: dict[int, CachedPrompt] = {}
        self._steps_with_room = 0  # so many steps need no page
        self._num_waiting = Counter(id(request.prompt) for request in requests)

    def admit(self) -> list[ActiveRequest]:
        """Let waiting requests in, with pages for what is to be prefilled, which is one forward of bounded size."""
        admitted: list[ActiveRequest] = []
        computed: set[int] = set()
        num_tokens = 0
        refill = not self.running or self._max_running - len(self.running) >= self._max_running * REFILL_SHARE
        while self.waiting and len(self.running) < self._max_running:
            request = self.waiting[0]
            prompt = request.request.prompt
            cached = self._prompts.get(id(prompt))
            cost = request.num_cached_tokens
            if id(prompt) not in computed and (cached is None or request.token_ids):
                cost += prompt.num_tokens
            if cost and (not refill or (num_tokens and num_tokens + cost > PREFILL_TOKENS)):
                break
            own = pages_of(request.num_cached_tokens)
            needed = own + (pages_of(prompt.num_tokens) if cached is None else 0)
            growth = self._grows(request) + GROWTH_PAGES * len(self.running)
            if not self._make_room(needed + growth, keep=cached):
                break
            if cached is None:
                cached = CachedPrompt(prompt, self._pool.take(pages_of(prompt.num_tokens)))
                self._prompts[id(prompt)] = cached
            if cost:
                computed.add(id(prompt))
                num_tokens += cost
            self.waiting.popleft()
            self._num_waiting[id(prompt)] -= 1
            cached.num_users += 1
            request.cached_prompt = cached
            request.place = CachedSequence(
                cached.pages, prompt.num_tokens, self._pool.take(own), request.num_cached_tokens
            )
            self.running.append(request)
            self._steps_with_room = 0
            admitted.append(request)
        return admitted

    def extend(self) -> bool:
        """A page for everyone whose next token needs one; True when someone was preempted for it."""
        if self._steps_with_room > 0:
            self._steps_with_room -= 1
            return False
        before = self.num_preempted
        growing = [request for request in self.running if request.room == 0]
        if self._make_room(len(growing)):
            for request, page in zip(growing, self._pool.take(len(growing)), strict=True):
                request.entered[1].pages.append(page)
        else:
            number = 0
            while number < len(self.running):
                request = self.running[number]
                if request.room == 0 and self._free_one(number):
                    request.entered[1].pages += self._pool.take(1)
                number += 1
        self._steps_with_room = min((request.room for request in self.running), default=1) - 1
        return self.num_preempted > before

    def finish(self, requests: Sequence[ActiveRequest]) -> None:
        """Give back what these took."""
        for request in requests:
            self._leave(request)
        gone = {id(request) for request in requests}
        self.running = [request for request in self.running if id(request) not in gone]

    def close(self) -> None:
        """Give back everything."""
        self.finish(self.running)
        self.waiting.clear()
        self._num_waiting.clear()
        self._drop_unused()

    def _grows(self, request: ActiveRequest) -> int:
        """Pages that the next step of ``request`` takes."""
        if self._max_new_tokens == 1:
            return 0
        return pages_of(request.num_cached_tokens + 1) - pages_of(request.num_cached_tokens)

    def _make_room(self, num_pages: int, keep: CachedPrompt | None = None) -> bool:
        if self._pool.num_free < num_pages:
            self._drop_unused(keep)
        return self._pool.num_free >= num_pages

    def _drop_unused(self, keep: CachedPrompt | None = None) -> None:
        for key, cached in list(self._prompts.items()):
            if cached.num_users == 0 and cached is not keep:
                self._pool.give_back(cached.pages)
                del self._prompts[key]

    def _free_one(self, number: int) -> bool:
        """One free page for ``running[number]``, whoever is youngest gives way; False if that was itself."""
        while not self._make_room(1):
            youngest = self.running.pop()
            self._leave(youngest)
            self.waiting.appendleft(youngest)
            self._num_waiting[id(youngest.request.prompt)] += 1
            self.num_preempted += 1
            if len(self.running) == number:
                return False
        return True

    def _leave(self, request: ActiveRequest) -> None:
        cached, place = request.entered
        self._pool.give_back(place.pages)
        cached.num_users -= 1
        request.cached_prompt = request.place = None
        key = id(cached.prompt)
        if cached.num_users == 0 and self._num_waiting[key] == 0:
            self._pool.give_back(cached.pages)
            del self._prompts[key]
