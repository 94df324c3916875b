"""Draws: the random numbers, and what they make of a distribution."""

from __future__ import annotations

import pytest
import torch

from copd_engine.rollout.draws import draw, uniforms

NOTHING = torch.empty(0, dtype=torch.int64)


def splitmix64(seed: int, count: int) -> list[int]:
    """The generator as published, in Python's own integers."""
    numbers = []
    state = seed
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        numbers.append(z ^ z >> 31)
    return numbers


@pytest.mark.parametrize("seed", [0, 1, 1234567, 2**62 + 3, 2**63 - 1])
def test_numbers_are_those_of_splitmix64(seed: int) -> None:
    # Published first outputs of seed 1234567, which check the generator above.
    assert splitmix64(1234567, 2) == [6457827717110365317, 3203168211198807973]
    start = splitmix64(seed, 1)[0]  # a stream starts at a mix of its seed
    expected = [number / 2**64 for number in splitmix64(start, 5)]
    found = uniforms(torch.full((5,), seed), torch.arange(5))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=2**-52, rtol=0)


def test_numbers_are_uniform_and_streams_of_neighbouring_seeds_unrelated() -> None:
    numbers_SN = uniforms(torch.arange(200)[:, None], torch.arange(1000)[None, :])
    assert 0 <= float(numbers_SN.min()) < 1e-4
    assert 1 - 1e-4 < float(numbers_SN.max()) < 1
    counts = torch.histc(numbers_SN.float(), 100, 0, 1)
    assert float(((counts - 2000) ** 2 / 2000).sum()) < 150  # chi-squared, 99 degrees of freedom: 1 in 1000
    assert len(numbers_SN.flatten().unique()) == numbers_SN.numel()
    correlation_SS = torch.corrcoef(numbers_SN)
    assert float((correlation_SS - torch.eye(200)).abs().max()) < 0.2


def test_frequencies_are_the_probabilities_without_the_suppressed_ids() -> None:
    logp_V = torch.log_softmax(torch.tensor([0.0, 1.0, 2.0, 3.0, -50.0]), 0)
    count = 100_000
    uniform_B = uniforms(torch.zeros(count, dtype=torch.int64), torch.arange(count))
    greedy_B = torch.zeros(count, dtype=torch.bool)
    tokens = draw(logp_V.expand(count, -1), uniform_B, greedy_B, torch.tensor([2]))
    shares = torch.bincount(tokens, minlength=5) / count
    expected = logp_V.exp()
    expected[2] = 0
    torch.testing.assert_close(shares, expected / expected.sum(), atol=0.005, rtol=0)
    assert int((tokens == 2).sum()) == 0


def test_the_ends_of_the_interval_draw_tokens_that_are_allowed() -> None:
    logp_BV = torch.log_softmax(torch.tensor([[5.0, 1.0, 1.0, 5.0]] * 2), -1)
    uniform_B = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    both = torch.zeros(2, dtype=torch.bool)
    assert draw(logp_BV, uniform_B, both, torch.tensor([0, 3])).tolist() == [1, 2]
    assert draw(logp_BV, uniform_B, both, NOTHING).tolist() == [0, 3]


def test_greedy_rows_take_the_most_likely_allowed_token() -> None:
    logp_BV = torch.log_softmax(torch.tensor([[1.0, 9.0, 2.0], [1.0, 9.0, 2.0]]), -1)
    uniform_B = torch.tensor([0.01, 0.01], dtype=torch.float64)
    tokens = draw(logp_BV, uniform_B, torch.tensor([True, False]), torch.tensor([1]))
    assert tokens.tolist() == [2, 0]
