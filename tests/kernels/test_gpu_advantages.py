"""gpu.advantages in Triton's interpreter against the reference in fp64."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest
import torch
from copd_kernels import reference

pytest.importorskip("triton", reason="Triton is not installed (extra gpu)")
advantages = pytest.importorskip("copd_kernels.gpu.advantages")

EPS = 1e-6
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels were loaded for the GPU")


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Every ``torch.empty`` holds NaN or the largest integer, so that what the kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def ids_of(*sizes: int) -> torch.Tensor:
    """Ids with gaps: 3, 6, 9, ..."""
    return torch.cat([torch.full((size,), 3 * (group + 1)) for group, size in enumerate(sizes)])


def check(rewards_B: torch.Tensor, group_ids_B: torch.Tensor, mode: str) -> torch.Tensor:
    """Against the reference in fp64 on the same rewards; both outputs."""
    found_B, zero_B = advantages.group_advantages(rewards_B, group_ids_B, mode, EPS)
    truth_B, zero_truth_B = reference.group_advantages(rewards_B.double(), group_ids_B, mode, EPS)
    assert found_B.dtype == torch.promote_types(rewards_B.dtype, torch.float32)
    assert zero_B.dtype == torch.bool
    # eps is rounded to fp32 on its way in, the result on its way out.
    torch.testing.assert_close(found_B.double(), truth_B, rtol=2e-7, atol=0, equal_nan=True)
    assert torch.equal(zero_B, zero_truth_B)
    return found_B


@pytest.mark.parametrize("mode", ["population", "sample", "none"])
@pytest.mark.parametrize("sizes", [(1,), (4,), (1, 5, 2, 8, 1), (257, 3, 600)], ids=str)
def test_ragged_groups(randn, mode, sizes) -> None:
    ids_B = ids_of(*sizes)
    check(randn(len(ids_B), dtype=torch.float32), ids_B, mode)


def test_leave_one_out() -> None:
    # By hand: 5 - mean(1, 3) = 3, 1 - 4 = -3, 3 - 3 = 0; the group of one; equal rewards.
    rewards_B = torch.tensor([5.0, 1.0, 3.0, 7.0, 2.0, 2.0])
    found_B, zero_B = advantages.group_advantages(rewards_B, ids_of(3, 1, 2), "rloo", EPS)
    assert found_B.tolist() == [3.0, -3.0, 0.0, 0.0, 0.0, 0.0]
    assert zero_B.tolist() == [False] * 3 + [True] * 3


@pytest.mark.parametrize("mode", advantages.MODES)
def test_groups_without_variance_are_exactly_zero(mode) -> None:
    # 0.1 three times: the mean of fp32 sums would be off by a rounding, and divided by eps.
    rewards_B = torch.tensor([0.1, 0.1, 0.1, 1e30, 1e30, 0.0])
    found_B, zero_B = advantages.group_advantages(rewards_B, ids_of(3, 2, 1), mode, EPS)
    assert found_B.tolist() == [0.0] * 6
    assert zero_B.all()


@pytest.mark.parametrize("mode", ["population", "sample", "none"])
@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_stay_in_their_group(mode, broken) -> None:
    rewards_B = torch.tensor([1.0, 2.0, 4.0, broken, 1.0, 1.0, broken, 3.0, 5.0])
    found_B = check(rewards_B, ids_of(2, 4, 1, 2), mode)
    assert found_B[[0, 1, 7, 8]].isfinite().all()
    assert found_B[[3, 6]].isnan().all()


def test_large_offset_does_not_cancel(randn) -> None:
    rewards_B = 1e4 + randn(64).round().float()
    check(rewards_B, ids_of(32, 32), "population")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(randn, dtype) -> None:
    check(randn(9, dtype=dtype), ids_of(4, 5), "population")


def test_rewards_of_a_strided_view(randn) -> None:
    check(randn(24, dtype=torch.float32)[::2], ids_of(4, 8), "sample")


def test_no_responses() -> None:
    found_B, zero_B = advantages.group_advantages(torch.empty(0), torch.empty(0, dtype=torch.int64), "none", EPS)
    assert found_B.shape == zero_B.shape == (0,)


REWARDS, IDS = torch.ones(3), torch.tensor([0, 0, 1])


@pytest.mark.parametrize(
    ("rewards_B", "group_ids_B", "mode", "eps"),
    [
        (torch.ones(3, 1), IDS, "none", EPS),
        (torch.ones(3, dtype=torch.int64), IDS, "none", EPS),
        (torch.ones(3, requires_grad=True), IDS, "none", EPS),
        (REWARDS, IDS.int(), "none", EPS),
        (REWARDS, IDS[:2], "none", EPS),
        (REWARDS, IDS, "grpo", EPS),
        (REWARDS, IDS, "none", -1.0),
        (REWARDS, IDS, "none", torch.nan),
        (REWARDS, torch.tensor([0, 1, 0]), "none", EPS),
        (REWARDS, torch.tensor([-1, 1, 2]), "none", EPS),
    ],
)
def test_errors_are_those_of_the_reference(rewards_B, group_ids_B, mode, eps) -> None:
    texts = []
    for function in (advantages.group_advantages, reference.group_advantages):
        with pytest.raises(ValueError) as error:
            function(rewards_B, group_ids_B, mode, eps)
        texts.append(str(error.value))
    assert texts[0] == texts[1]


def test_it_is_what_cuda_tensors_are_given(randn) -> None:
    """Registered with the dispatcher, and reached without Triton having been imported by the package."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key("copd_kernels::group_advantages", "CUDA")
    rewards_B, ids_B = randn(9, dtype=torch.float32), ids_of(4, 5)
    body = importlib.import_module("copd_kernels.advantages")._cuda
    for found, expected in zip(
        body(rewards_B, ids_B, "sample", EPS), advantages.group_advantages(rewards_B, ids_B, "sample", EPS), strict=True
    ):
        assert torch.equal(found, expected)
