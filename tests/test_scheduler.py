"""Which requests run, without a model: places and pages are never given out twice, and everyone finishes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from copd_engine.models.cache import PagePool, pages_of
from copd_engine.models.decode_layout import PAGE
from copd_engine.rollout import scheduler as scheduler_module
from copd_engine.rollout.scheduler import ActiveRequest, Scheduler
from copd_engine.rollout.uniform_stream import CHUNK, uniform_stream
from copd_engine.types import EncodedPrompt, Example, RolloutRequest


def prompt(num_tokens: int, uid: str = "p") -> EncodedPrompt:
    ids = torch.zeros(num_tokens, dtype=torch.int64)
    return EncodedPrompt(Example(uid, "", "", "exact"), ids, ids.expand(3, -1), num_tokens)


def requests(lengths: list[int], members: int) -> list[RolloutRequest]:
    prompts = [prompt(length, str(number)) for number, length in enumerate(lengths)]
    return [RolloutRequest(p, seed=0, group=g) for g, p in enumerate(prompts) for _ in range(members)]


@dataclass
class Driver:
    """Does what the batch does, with tokens that mean nothing; request i ends after ``lengths[i]``."""

    scheduler: Scheduler
    pool: PagePool
    lengths: list[int]
    finished: list[int] = field(default_factory=list)
    prefills: list[list[ActiveRequest]] = field(default_factory=list)
    most_running: int = 0

    def draw(self, drawing: list[ActiveRequest]) -> None:
        for request in drawing:
            request.token_ids.append(7)
        done = [request for request in drawing if len(request.token_ids) == self.lengths[request.index]]
        self.finished += [request.index for request in done]
        self.scheduler.finish(done)

    def step(self) -> None:
        while admitted := self.scheduler.admit():
            computed = [request for request in admitted if request.needs_prefill]
            if computed:
                self.prefills.append(computed)
            for request in admitted:
                request.entered[0].hidden_D = torch.empty(0)
            self.check()
            self.draw([request for request in admitted if not request.token_ids])
        if self.scheduler.running:
            self.scheduler.extend()
            for request in self.scheduler.running:
                assert request.room > 0
            self.check()
            self.draw(list(self.scheduler.running))

    def check(self) -> None:
        running = self.scheduler.running
        self.most_running = max(self.most_running, len(running))
        prompts = {id(request.entered[0]): request.entered[0] for request in running}
        for cached in prompts.values():
            assert len(cached.pages) == pages_of(cached.prompt.num_tokens)
            assert cached.num_users == sum(request.cached_prompt is cached for request in running)
        in_use = [page for cached in prompts.values() for page in cached.pages]
        in_use += [page for request in running for page in request.entered[1].pages]
        assert len(in_use) == len(set(in_use)) <= self.pool.num_used <= self.pool.num_pages
        assert not set(in_use) & set(self.pool._free)
        assert all(request.cached_prompt is request.place is None for request in self.scheduler.waiting)

    def run(self) -> None:
        for _ in range(100_000):
            if not self.scheduler.waiting and not self.scheduler.running:
                break
            self.step()
        assert self.pool.num_used == 0


@given(
    st.lists(st.integers(1, 70), min_size=1, max_size=6),
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(1, 80),
    st.integers(0, 12),
    st.randoms(use_true_random=False),
)
def test_everyone_finishes_within_places_and_pages(prompt_lengths, members, max_running, limit, spare, random):
    asked = requests(prompt_lengths, members)
    random.shuffle(asked)
    lengths = [random.randint(1, limit) for _ in asked]
    pool = PagePool(PAGE * (pages_of(max(prompt_lengths)) + pages_of(limit - 1) + spare))
    driver = Driver(Scheduler(asked, pool, max_running, limit), pool, lengths)
    driver.run()
    assert sorted(driver.finished) == list(range(len(asked)))
    assert driver.most_running <= max_running


def drive(asked, max_running=8, pages=1000, limit=100, lengths=None) -> Driver:
    pool = PagePool(pages * PAGE)
    return Driver(Scheduler(asked, pool, max_running, limit), pool, lengths or [limit] * len(asked))


def test_a_prompt_is_prefilled_once_for_its_group_even_where_it_enters_in_parts():
    driver = drive(requests([20, 30], members=6), lengths=[3] * 12)
    driver.run()
    assert driver.most_running == 8
    assert [len({id(r.request.prompt) for r in computed}) for computed in driver.prefills] == [2]


def test_a_prefill_waits_for_an_eighth_of_the_places():
    """Sixteen prompts of one member each, which end one after the other."""
    driver = drive(requests([5] * 32, 1), max_running=16, limit=100, lengths=[3 + i for i in range(32)])
    for _ in range(100):
        driver.step()
    assert [len(computed) for computed in driver.prefills] == [16, *[2] * 8]


def test_a_prefill_is_bounded_and_a_longer_prompt_goes_alone(monkeypatch):
    monkeypatch.setattr(scheduler_module, "PREFILL_TOKENS", 50)
    driver = drive(requests([20, 20, 20, 70, 10], members=2), max_running=100)
    driver.step()
    sizes = [
        [n.num_tokens for n in {id(r.request.prompt): r.request.prompt for r in computed}.values()]
        for computed in driver.prefills
    ]
    assert sizes == [[20, 20], [20], [70], [10]]


def test_the_youngest_gives_way_and_enters_first_again():
    """Nine pages: two for the prompts; then each of four sequences wants up to four."""
    driver = drive(requests([PAGE, PAGE], members=2), pages=9, limit=4 * PAGE + 1)

    def run_until(num_preempted: int) -> None:
        while driver.scheduler.num_preempted < num_preempted:
            driver.step()

    driver.step()
    assert [request.index for request in driver.scheduler.running] == [0, 1, 2, 3]
    run_until(1)
    assert [request.index for request in driver.scheduler.running] == [0, 1, 2]
    first = driver.scheduler.waiting[0]
    assert (first.index, len(first.token_ids)) == (3, PAGE + 1)
    run_until(2)
    assert [request.index for request in driver.scheduler.running] == [0, 1]
    assert [request.index for request in driver.scheduler.waiting] == [2, 3]
    # Their prompt stays as long as nobody needs its page.
    assert len(driver.scheduler._prompts) == 2
    while pages_of(driver.scheduler.running[1].num_cached_tokens) < 4:
        driver.step()
    assert len(driver.scheduler._prompts) == 1
    driver.run()
    assert driver.finished == [0, 1, 2, 3]
    assert driver.scheduler.num_preempted == 2
    assert [request.index for request in driver.prefills[1]] == [2, 3]


def test_closing_gives_everything_back():
    driver = drive(requests([20, 30, 40], members=4), max_running=5)
    driver.step()
    assert driver.pool.num_used > 0
    driver.scheduler.close()
    assert (driver.pool.num_used, driver.scheduler.running, len(driver.scheduler.waiting)) == (0, [], 0)


@pytest.mark.parametrize("seed", [0, 1, 2**62 + 5])
def test_a_stream_is_what_torch_would_draw_at_once(seed):
    for count in (1, CHUNK, 5 * CHUNK + 3):
        expected = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert list(itertools.islice(uniform_stream(seed), count)) == expected.tolist()
