"""The pool of large CPU buffers: what is given back is used again, within a bound, and never by two at once."""

from __future__ import annotations

import gc

import copd_kernels
import pytest
import torch
from copd_kernels import _products, native_available

if not native_available():
    pytest.skip("the CPU kernels were not built", allow_module_level=True)

MIB = 2**20
LIKE = torch.zeros(1)


@pytest.fixture(autouse=True)
def _clean() -> None:
    gc.collect()
    copd_kernels.empty_cache()


def large(num_mib: int, fill: float = 0.0) -> torch.Tensor:
    return _products.empty(LIKE, (num_mib, MIB // 4), torch.float32).fill_(fill)


def test_a_buffer_is_used_again_when_its_last_tensor_is_gone() -> None:
    first = large(8)
    view, address = first[3:], first.data_ptr()
    del first
    second = large(8, fill=2.0)
    assert second.data_ptr() != address  # the view is still there
    assert (view == 0).all()
    del view
    assert large(8).data_ptr() == address
    assert (second == 2).all()


def test_a_buffer_serves_smaller_wishes_but_not_much_smaller() -> None:
    buffer = large(20)
    address = buffer.data_ptr()
    del buffer
    assert large(8).data_ptr() != address
    assert large(18).data_ptr() == address


def test_what_is_kept_is_bounded_and_can_be_given_back() -> None:
    for num_mib in (100, 150, 200, 300):
        large(num_mib)
    kept = copd_kernels.empty_cache()
    # The last two together pass 384 MiB: the older one went.
    assert kept == 300 * MIB
    assert copd_kernels.empty_cache() == 0
    too_large = large(400)
    del too_large
    assert copd_kernels.empty_cache() == 0


def test_a_pooled_tensor_is_like_any_other() -> None:
    weight = large(4, fill=1.0).requires_grad_()
    weight.square().sum().backward()
    assert torch.equal(weight.grad, torch.full_like(weight, 2.0))
    assert weight.data_ptr() % 64 == 0
    resized = large(2, fill=3.0)
    resized.resize_(5, MIB // 4)
    assert (resized[:2] == 3).all()
    assert torch.equal(large(3, fill=5.0).clone(), torch.full((3, MIB // 4), 5.0))


def test_small_and_poisoned_buffers_are_torchs_own() -> None:
    _products.empty(LIKE, (100,), torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        assert _products.empty(LIKE, (2, MIB), torch.float32).isnan().all()
    finally:
        torch.use_deterministic_algorithms(False)
    gc.collect()
    assert copd_kernels.empty_cache() == 0


def test_gradients_of_two_calls_are_two() -> None:
    """The weight's gradient is of the pool, and a caller may keep it as long as he likes."""
    hidden, target = torch.randn(4, 64), torch.tensor([1, 2, 3, 4])
    gradients = []
    for scale in (1.0, 2.0, 1.0):
        weight = (torch.arange(8192 * 64.0).view(8192, 64) % 7 / 100).requires_grad_()
        out = copd_kernels.linear_policy_loss(
            hidden,
            weight,
            target,
            advantage_T=torch.ones(4),
            old_logp_T=torch.full((4,), -9.0),
            loss_weight_T=torch.full((4,), scale),
        )
        out.loss.backward()
        gradients.append(weight.grad)
    assert gradients[0].norm() > 0
    assert torch.equal(gradients[0], gradients[2])
    torch.testing.assert_close(gradients[1], 2 * gradients[0])
