"""Pages of keys and values, and attention to them, against a plain softmax over each sequence's own tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from copd_engine.models import cache as cache_module
from copd_engine.models.attention import flash_attention, sdpa_paged, varlen_paged
from copd_engine.models.cache import CachedSequence, DecodeCache, PagePool, PrefillCache, pages_of
from copd_engine.models.decode_layout import PADDING_BYTES, PADDING_SHARE, PAGE, DecodeLayout, plan_calls
from copd_engine.models.flash import resolve_attention
from tests.test_attention import naive_varlen

HEADS, KV_HEADS, DIM = 6, 2, 8
CPU = torch.device("cpu")


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in all memory that is new and in every page that is given back."""
    give_back, grown = PagePool.give_back, cache_module._grown

    def poison(pool: PagePool, pages: list[int]) -> None:
        give_back(pool, pages)
        with torch.inference_mode():
            for layer in pool.layers:
                layer[[page for page in pages if page < len(layer)]] = float("nan")

    def poison_new(pages: torch.Tensor, size: int) -> torch.Tensor:
        larger = grown(pages, size)
        larger[len(pages) :] = float("nan")
        return larger

    monkeypatch.setattr(PagePool, "give_back", poison)
    monkeypatch.setattr(cache_module, "_grown", poison_new)


class Reference:
    """Every sequence's keys and values as they come, ``[kv_heads, tokens, head_dim]`` per layer."""

    def __init__(self, num_layers: int, dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> None:
        self.num_layers, self.dtype, self.device = num_layers, dtype, device
        self.generator = torch.Generator().manual_seed(0)
        self.history: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def draw(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

    def prefill(self, pool: PagePool, lengths: list[int], gap: int = 3) -> list[list[int]]:
        """Prompts behind one another, with rows between that are not kept; their pages."""
        starts = [sum(lengths[:i]) + gap * i for i in range(len(lengths))]
        pages = [pool.take(pages_of(length)) for length in lengths]
        segments = [(start, start + n, p) for start, n, p in zip(starts, lengths, pages, strict=True)]
        prefill = PrefillCache(pool, segments, self.device)
        self.prompts: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in lengths]
        for layer in range(self.num_layers):
            # As transformers hands them on: a transposed view.
            key, value = (self.draw(1, starts[-1] + lengths[-1] + gap, KV_HEADS, DIM).transpose(1, 2) for _ in range(2))
            prefill.update(key, value, layer)
            for prompt, (start, stop, _) in zip(self.prompts, segments, strict=True):
                prompt.append((key[0, :, start:stop], value[0, :, start:stop]))
        return pages

    def add(self, row: CachedSequence, prompt: int) -> None:
        self.history[id(row)] = list(self.prompts[prompt])

    def step(self, cache: DecodeCache, attention: Any = sdpa_paged) -> float:
        """One token of every row through all layers; the largest error of the attention's output."""
        cache.advance()
        layout = cache.layout
        assert layout is not None
        errors = []
        for layer in range(self.num_layers):
            query, key, value = (self.draw(len(cache.rows), n, 1, DIM) for n in (HEADS, KV_HEADS, KV_HEADS))
            pages, same = cache.update(key, value, layer)
            assert pages is same
            out = attention(query, pages, layout)
            assert out.shape == (len(cache.rows), 1, HEADS, DIM)
            for number, row in enumerate(cache.rows):
                layers = self.history[id(row)]
                layers[layer] = tuple(
                    torch.cat([x, new[number]], 1) for x, new in zip(layers[layer], (key, value), strict=True)
                )
                k, v = (x.double().repeat_interleave(HEADS // KV_HEADS, 0) for x in layers[layer])
                scores = query[number].double() @ k.transpose(1, 2) * DIM**-0.5
                expected = (scores.softmax(-1) @ v).transpose(0, 1)
                errors.append((out[number] - expected).abs().max())
        return float(torch.stack(errors).max())  # a NaN stays one


def naive_paged(query: torch.Tensor, pages: torch.Tensor, layout: DecodeLayout) -> torch.Tensor:
    return varlen_paged(naive_varlen, query, pages, layout)


@pytest.mark.parametrize("attention", [sdpa_paged, naive_paged], ids=["sdpa", "varlen"])
@pytest.mark.parametrize("padding_bytes", [0, PADDING_BYTES], ids=["a call per length", "one call"])
def test_sequences_that_come_and_go_over_poisoned_memory(monkeypatch, poisoned, attention, padding_bytes):
    """Prompts of a token to several pages, shared and not; rows leave, others enter on their pages."""
    monkeypatch.setattr("copd_engine.models.decode_layout.PADDING_BYTES", padding_bytes)
    pool = PagePool(100 * PAGE)
    reference = Reference(num_layers=2)
    lengths = [1, PAGE, PAGE + 1, 50]
    pages = reference.prefill(pool, lengths)
    rows: list[CachedSequence] = []
    cache = DecodeCache(pool)
    calls = set()

    def enter(prompt: int) -> None:
        row = CachedSequence(pages[prompt], lengths[prompt], pool.take(1))
        reference.add(row, prompt)
        rows.append(row)

    def steps(count: int) -> None:
        cache.arrange(rows)
        for _ in range(count):
            for row in rows:
                if tokens(row) == len(row.pages) * PAGE:
                    row.pages += pool.take(1)
            assert reference.step(cache, attention) < 1e-5
            assert cache.layout is not None
            calls.add(len(cache.layout.calls))

    def tokens(row: CachedSequence) -> int:
        return reference.history[id(row)][0][0].shape[1] - row.prompt_tokens

    for prompt in (0, 1, 2, 3, 3):
        enter(prompt)
    steps(PAGE + 2)
    for row in (rows.pop(1), rows.pop(2)):  # one in the middle, and one of the two that share a prompt
        pool.give_back(row.pages)
    enter(2)
    steps(1)
    enter(0)
    steps(3 * PAGE)
    assert {len(row.pages) for row in rows} == {3, 4, 5}
    assert (max(calls) > 1) == (padding_bytes == 0)
    assert bool(torch.isnan(pool.layers[0]).any())  # there was poison to find


def test_zeros_keep_the_poison_out(monkeypatch, poisoned):
    """The test above would see it: without zeros in new pages NaN gets through the mask."""
    pool = PagePool(20 * PAGE)
    reference = Reference(num_layers=1)
    (pages,) = reference.prefill(pool, [3])
    pool.give_back(pool.take(2))
    monkeypatch.setattr(PagePool, "prepare", lambda pool: None)
    row = CachedSequence(pages, 3, pool.take(1))
    reference.add(row, 0)
    cache = DecodeCache(pool)
    pool.layers = [torch.nn.functional.pad(pool.layers[0], (0, 0, 0, 0, 0, 0, 0, 2), value=float("nan"))]
    cache.arrange([row])
    worst = reference.step(cache)
    assert worst != worst


def test_rows_stand_in_the_order_of_their_pages_and_keep_their_tokens():
    pool = PagePool(100 * PAGE)
    reference = Reference(num_layers=1)
    pages = reference.prefill(pool, [5, 40, 20])
    rows = [CachedSequence(p, n, pool.take(1)) for p, n in zip(pages, (5, 40, 20), strict=True)]
    for prompt, row in enumerate(rows):
        reference.add(row, prompt)
    cache = DecodeCache(pool)
    cache.arrange(rows)
    assert [row.prompt_tokens for row in cache.rows] == [40, 20, 5]
    reference.step(cache)
    cache.arrange(rows[::2])
    assert [row.prompt_tokens for row in cache.rows] == [20, 5]
    assert reference.step(cache) < 1e-5


def test_memory_is_taken_as_pages_are_and_never_beyond_the_bound():
    pool = PagePool(10 * PAGE + 7)
    assert (pool.num_pages, pool.num_free, pool.bytes) == (10, 10, 0)
    page_bytes = 2 * KV_HEADS * PAGE * DIM * 4
    Reference(num_layers=3).prefill(pool, [20])
    assert (pool.num_used, pool.bytes, pool.page_bytes) == (2, 2 * 3 * page_bytes, page_bytes)
    pool.take(1)
    pool.prepare()
    assert pool.bytes == 4 * 3 * page_bytes  # twice what there was
    taken = pool.take(7)
    pool.prepare()
    assert (pool.num_free, pool.bytes) == (0, 10 * 3 * page_bytes)
    with pytest.raises(AssertionError):
        pool.take(1)
    pool.give_back([*taken[:3], 0])
    assert pool.take(2) == [0, min(taken)]  # low numbers first
    with pytest.raises(AssertionError):
        pool.release()
    pool.give_back(range(10))
    pool = PagePool(10 * PAGE)
    Reference(num_layers=1).prefill(pool, [20])
    pool.give_back([0, 1])
    pool.release()
    assert (pool.bytes, pool.num_free) == (0, 10)


def test_a_model_of_another_kind_gets_pages_of_its_own():
    pool = PagePool(10 * PAGE)
    Reference(num_layers=2).prefill(pool, [20])
    pool.give_back([0, 1])
    Reference(num_layers=1, dtype=torch.bfloat16).prefill(pool, [PAGE])
    assert [pages.dtype for pages in pool.layers] == [torch.bfloat16, torch.float32]


@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=60),
    st.integers(1, 1 << 18),
    st.integers(1, 1 << 22),
    st.booleans(),
)
def test_calls_cover_all_rows_and_pad_within_bounds(num_pages, page_bytes, call_bytes, in_order):
    if in_order:
        num_pages = sorted(num_pages, reverse=True)
    calls = plan_calls(num_pages, page_bytes, call_bytes)
    assert [row for start, stop, _ in calls for row in range(start, stop)] == list(range(len(num_pages)))
    for start, stop, width in calls:
        assert width == max(num_pages[start:stop])
        pages = (stop - start) * width
        padding = pages - sum(num_pages[start:stop])
        assert stop - start == 1 or pages * page_bytes <= call_bytes
        assert padding * page_bytes <= PADDING_BYTES or padding <= PADDING_SHARE * pages


def test_calls_by_hand():
    assert plan_calls([3, 3, 2], 1, 100) == ((0, 3, 3),)
    assert plan_calls([3, 3, 2], 1, 6) == ((0, 2, 3), (2, 3, 2))
    assert plan_calls([40, 3, 3], PADDING_BYTES // 37, 1 << 30) == ((0, 2, 40), (2, 3, 3))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["sdpa", "flash"])
def test_decode_steps_on_the_gpu(kind):
    device = torch.device("cuda")
    if kind == "flash" and resolve_attention("auto", device) != "flash":
        pytest.skip("flash-attn is not installed")

    def flash(query: torch.Tensor, pages: torch.Tensor, layout: DecodeLayout) -> torch.Tensor:
        return flash_attention(torch.nn.Module(), query, pages, pages, None, layout=layout)[0]

    dtype = torch.bfloat16 if kind == "flash" else torch.float32
    pool = PagePool(100 * PAGE)
    reference = Reference(2, dtype, device)
    lengths = [1, 50, 200]
    pages = reference.prefill(pool, lengths)
    rows = [CachedSequence(pages[p], lengths[p], pool.take(2)) for p in (0, 1, 1, 2)]
    for row, prompt in zip(rows, (0, 1, 1, 2), strict=True):
        reference.add(row, prompt)
    cache = DecodeCache(pool)
    cache.arrange(rows)
    for _ in range(2 * PAGE):
        assert reference.step(cache, flash if kind == "flash" else sdpa_paged) < (0.03 if kind == "flash" else 1e-4)
