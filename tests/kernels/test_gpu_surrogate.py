"""gpu.surrogate in Triton's interpreter against fp64 formulas and autograd."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from copd_kernels import _surrogate

pytest.importorskip("triton", reason="Triton is not installed (extra gpu)")
gpu = pytest.importorskip("copd_kernels.gpu.surrogate")

CLIP = {"clip_low": 0.2, "clip_high": 0.28}
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels were loaded for the GPU")


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Every ``torch.empty`` holds NaN, so that what the kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def truth(logp_T, advantage_T, old_logp_T, weight_T, reference_logp_T, kl_weight_T, kind):
    """Loss, ratio, clip flag, kl and d loss / d logp in fp64."""
    logp_T = logp_T.double().requires_grad_()
    loss_T, kl_T, ratio_T = 0 * logp_T, torch.zeros_like(logp_T), torch.ones_like(logp_T)
    is_clipped_T = torch.zeros_like(logp_T, dtype=torch.bool)
    if advantage_T is not None:
        ratio_T = (logp_T - old_logp_T.double()).exp()
        product_T = ratio_T * advantage_T
        clipped_T = ratio_T.clamp(1 - CLIP["clip_low"], 1 + CLIP["clip_high"]) * advantage_T
        loss_T, is_clipped_T = -weight_T * torch.minimum(product_T, clipped_T), clipped_T < product_T
    if reference_logp_T is not None:
        gap_T = reference_logp_T.double() - logp_T
        kl_T = {"k1": -gap_T, "k2": gap_T**2 / 2, "k3": gap_T.expm1() - gap_T}[kind]
        loss_T = loss_T + kl_weight_T * kl_T
    (slope_T,) = torch.autograd.grad(loss_T.sum(), logp_T)
    return loss_T.detach(), ratio_T.detach(), is_clipped_T, kl_T.detach(), slope_T


def check(*inputs: torch.Tensor | None, kind: str = "k3") -> None:
    """Against fp64, and against the CPU's form of the same in fp32."""
    inputs = (*inputs, *(None,) * (6 - len(inputs)))
    found = gpu.surrogate(*inputs, **CLIP, kl_estimator=kind)
    loss_T, ratio_T, clipped_T, kl_T, slope_T = truth(*inputs, kind=kind)
    for name, actual, expected in (
        ("loss", found.loss_T, loss_T),
        ("ratio", found.ratio_T, ratio_T),
        ("kl", found.kl_T, kl_T),
        ("grad_logp", found.grad_logp_T, slope_T),
    ):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.double(), expected, rtol=2e-6, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert torch.equal(found.clipped_T, clipped_T)
    plain = _surrogate.surrogate(*inputs, **CLIP, kl_estimator=kind)
    for name, actual, expected in zip(plain._fields, found, plain, strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-6, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


def policy_term(randn, num_tokens: int) -> tuple[torch.Tensor, ...]:
    """Log-prob, advantage, old log-prob, weight."""
    logp_T = -randn(num_tokens, dtype=torch.float32).abs()
    old_logp_T = logp_T + randn(num_tokens, dtype=torch.float32, scale=0.3)
    advantage_T, weight_T = randn(num_tokens, dtype=torch.float32), randn(num_tokens, dtype=torch.float32).abs()
    return logp_T, advantage_T, old_logp_T, weight_T


@pytest.mark.parametrize("num_tokens", [1, 511, 1027])
def test_policy_term(randn, num_tokens) -> None:
    check(*policy_term(randn, num_tokens))


@pytest.mark.parametrize("kind", _surrogate.KL_ESTIMATORS)
@pytest.mark.parametrize("with_policy", [True, False])
def test_penalty_to_a_reference(randn, kind, with_policy) -> None:
    logp_T, *others = policy_term(randn, 600)
    gap_T, kl_weight_T = randn(600, dtype=torch.float32), randn(600, dtype=torch.float32).abs()
    check(logp_T, *(others if with_policy else [None] * 3), logp_T + gap_T, kl_weight_T, kind=kind)


def test_no_term_at_all() -> None:
    """A loss of distillation alone."""
    found = gpu.surrogate(-torch.ones(3), *[None] * 5, **CLIP, kl_estimator="k3")
    assert found.ratio_T.tolist() == [1.0] * 3
    assert not found.clipped_T.any()
    assert torch.stack([found.loss_T, found.kl_T, found.grad_logp_T]).eq(0).all()


def test_each_way_to_clip() -> None:
    # ratio, advantage -> clipped?
    cases = [(1.5, 1.0, True), (1.5, -1.0, False), (0.5, -1.0, True), (0.5, 1.0, False), (1.1, 1.0, False)]
    cases.append((1.5, 0.0, False))
    ratio_T, advantage_T, expected = (torch.tensor(column) for column in zip(*cases, strict=True))
    inputs = (ratio_T.log(), advantage_T, torch.zeros(6), torch.full((6,), 2.0), None, None)
    found = gpu.surrogate(*inputs, **CLIP, kl_estimator="k3")
    assert torch.equal(found.clipped_T, expected)
    torch.testing.assert_close(found.loss_T, -2 * torch.tensor([1.28, -1.5, -0.8, 0.5, 1.1, 0.0]))
    torch.testing.assert_close(found.grad_logp_T, -2 * torch.tensor([0.0, -1.5, 0.0, 0.5, 1.1, 0.0]))


def test_small_gaps_do_not_cancel() -> None:
    gap_T = torch.tensor([1e-7, -1e-5, 1e-3, 0.049, -0.051, 0.49, -0.51, 0.0])
    found = gpu.surrogate(torch.zeros(8), None, None, None, gap_T, torch.ones(8), **CLIP, kl_estimator="k3")
    kl_T = gap_T.double().expm1() - gap_T.double()
    # fp64 itself cancels at 1e-7: half the square there.
    kl_T[0] = gap_T[0].double() ** 2 / 2
    torch.testing.assert_close(found.kl_T.double(), kl_T, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.grad_logp_T.double(), -gap_T.double().expm1(), rtol=1e-6, atol=0)


def test_nan_stays_nan() -> None:
    ones_T, broken_T = torch.ones(3), torch.tensor([1.0, torch.nan, 1.0])
    for inputs in ((broken_T, ones_T), (ones_T, broken_T)):
        found = gpu.surrogate(*inputs, ones_T, ones_T, None, None, **CLIP, kl_estimator="k3")
        assert found.loss_T.isnan().tolist() == [False, True, False]
        assert found.grad_logp_T.isnan().tolist() == [False, True, False]


def test_16_bit_inputs_and_no_tokens() -> None:
    found = gpu.surrogate(*(torch.ones(3).bfloat16() for _ in range(4)), None, None, **CLIP, kl_estimator="k3")
    assert found.loss_T.tolist() == [-1.0] * 3
    none = gpu.surrogate(*(torch.ones(0) for _ in range(4)), None, None, **CLIP, kl_estimator="k3")
    assert none.loss_T.shape == (0,)
