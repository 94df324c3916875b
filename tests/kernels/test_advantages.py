"""group_advantages: the C++ operation and the ATen body against a formula written out by hand."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from copd_kernels import group_advantages, native_available, reference
from hypothesis import given
from hypothesis import strategies as st

EPS = 1e-6


def by_hand(rewards: list[float], ids: list[int], mode: str) -> list[float]:
    """(GRPO-ADV) with the standard library, group by group."""
    out = []
    for reward, own in zip(rewards, ids, strict=True):
        group = [r for r, i in zip(rewards, ids, strict=True) if i == own]
        if min(group) == max(group):
            out.append(0.0)
            continue
        if mode == "rloo":
            out.append(reward - (math.fsum(group) - reward) / (len(group) - 1))
            continue
        deviation = reward - statistics.fmean(group)
        if mode == "none":
            out.append(deviation)
        else:
            std = statistics.pstdev(group) if mode == "population" else statistics.stdev(group)
            out.append(deviation / (std + EPS))
    return out


BODIES = {
    "operation": lambda rewards, ids, mode: tuple(group_advantages(rewards, ids, mode=mode, eps=EPS)),
    "aten": lambda rewards, ids, mode: reference.group_advantages(rewards, ids, mode, EPS),
}
every_body = pytest.mark.parametrize("body", list(BODIES.values()), ids=list(BODIES))
every_mode = pytest.mark.parametrize("mode", ["population", "sample", "none", "rloo"])


def test_compiled_library_is_loaded() -> None:
    # Without it the tests below would compare the ATen body with itself.
    assert native_available(), "the CPU kernels were not built: reinstall the package with a compiler present"


@every_body
def test_known_numbers(body) -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 2.0, 2.0, 5.0], dtype=torch.float64)
    ids = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    advantages, zero = body(rewards, ids, "population")
    std = math.sqrt(3) / 4
    expected = torch.tensor([0.75, -0.25, -0.25, -0.25], dtype=torch.float64) / (std + EPS)
    torch.testing.assert_close(advantages[:4], expected, rtol=1e-14, atol=0)
    assert advantages[4:].tolist() == [0.0, 0.0, 0.0]
    assert zero.tolist() == [False] * 4 + [True] * 3


ragged_groups = st.lists(
    st.lists(st.floats(-100, 100, width=32) | st.sampled_from([0.0, 1.0]), min_size=1, max_size=9),
    min_size=0,
    max_size=8,
)


@every_body
@every_mode
@given(groups=ragged_groups, gaps=st.lists(st.integers(1, 3), min_size=8, max_size=8))
def test_ragged_groups(body, mode: str, groups: list[list[float]], gaps: list[int]) -> None:
    rewards = [reward for group in groups for reward in group]
    # Ids may skip numbers: a filter that drops a group does not have to renumber the rest.
    ids = [sum(gaps[:i]) for i, group in enumerate(groups) for _ in group]
    advantages, zero = body(torch.tensor(rewards, dtype=torch.float64), torch.tensor(ids, dtype=torch.int64), mode)
    expected = torch.tensor(by_hand(rewards, ids, mode), dtype=torch.float64)
    torch.testing.assert_close(advantages, expected, rtol=1e-9, atol=1e-9)
    equal = [min(group) == max(group) for group in groups for _ in group]
    assert zero.tolist() == equal
    assert advantages[zero].eq(0).all()


@every_body
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e-30, 1e30])
def test_equal_rewards_give_exact_zero(body, value: float) -> None:
    # The mean of seven equal numbers is not always that number, so std alone would miss this.
    rewards = torch.full((7,), value)
    advantages, zero = body(rewards, torch.zeros(7, dtype=torch.int64), "population")
    assert advantages.tolist() == [0.0] * 7
    assert zero.all()


@every_body
def test_nearly_equal_large_rewards(body) -> None:
    rewards = torch.tensor([1e8, 1e8 + 1, 1e8 + 2], dtype=torch.float64)
    advantages, _ = body(rewards, torch.zeros(3, dtype=torch.int64), "population")
    expected = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64) / (math.sqrt(2 / 3) + EPS)
    torch.testing.assert_close(advantages, expected, rtol=1e-12, atol=1e-12)


@every_body
@every_mode
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_reward_spoils_its_group_only(body, mode: str, bad: float) -> None:
    rewards = torch.tensor([0.0, 1.0, bad, 1.0, bad, bad, 0.0, 1.0])
    ids = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    advantages, zero = body(rewards, ids, mode)
    assert not zero.any()
    assert advantages[[0, 1, 6, 7]].isfinite().all()
    assert advantages[[2, 4, 5]].isnan().all()


@every_body
@pytest.mark.parametrize(
    ("dtype", "out"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_dtypes(body, dtype: torch.dtype, out: torch.dtype) -> None:
    advantages, zero = body(torch.tensor([1.0, 0.0], dtype=dtype), torch.tensor([4, 4]), "none")
    assert (advantages.dtype, zero.dtype) == (out, torch.bool)
    assert advantages.tolist() == [0.5, -0.5]


@every_body
def test_non_contiguous_inputs(body) -> None:
    rewards = torch.tensor([1.0, 9.0, 0.0, 9.0])[::2]
    ids = torch.tensor([0, 7, 0, 7])[::2]
    assert body(rewards, ids, "none")[0].tolist() == [0.5, -0.5]
