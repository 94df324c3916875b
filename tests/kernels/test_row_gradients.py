"""The second pass and the gradients of the C++ row operations, every instruction set, against fp64 autograd."""

from __future__ import annotations

import math

import pytest
import torch

from tests.kernels.row_checks import (
    COEFS,
    INF,
    close_heads,
    dual_stats,
    every_isa,  # noqa: F401 (a fixture)
    needs_native,
    ops,
    single_stats,
    tiles,
)

pytestmark = needs_native


@pytest.mark.parametrize("beta", [0.5, 0.1, 0.9])
@pytest.mark.parametrize("gap", [3.0, 0.3, 0.01, 1e-3])
def test_second_pass(gap: float, beta: float) -> None:
    s, t = close_heads(3, 5003, gap)
    s[0, 10:20] = -INF
    t[1, 10:20] = -INF
    s[2, 10:20] = t[2, 10:20] = -INF
    stats, second = dual_stats(s, t, torch.full((3,), -1)), torch.zeros(3, 3)
    for begin, end in tiles(5003, (1000, 1001)):
        ops.second_(s[:, begin:end], t[:, begin:end], stats, beta, second)
    logp, logq = s.double().log_softmax(-1), t.double().log_softmax(-1)
    p, q = logp.exp(), logq.exp()
    logm = torch.logaddexp(math.log(beta) + logq, math.log(1 - beta) + logp)
    of_p = torch.where(p == 0, 0, p * (logp - logm))
    of_q = torch.where(q == 0, 0, q * (logq - logm))
    jsd = (beta * of_q + (1 - beta) * of_p).sum(-1)
    torch.testing.assert_close(second[0].double(), torch.minimum(p, q).sum(-1), rtol=2e-6, atol=0)
    torch.testing.assert_close(second[1].double(), jsd, rtol=1e-5, atol=1e-13)
    error = (second[2].double() - of_p.sum(-1)).abs()
    # Of first order in the gap. The second row has an infinite KL, and its log-ratios are plain differences.
    assert (error <= 2e-6 * of_p.sum(-1).abs() + torch.tensor([1e-6 * min(gap, 1), 2e-7, 1e-6 * min(gap, 1)])).all()


def true_gradient(
    raw: torch.Tensor, t: torch.Tensor, target: torch.Tensor, coefs: torch.Tensor, beta: float, cap: float, temp: float
) -> torch.Tensor:
    """fp64 autograd through the loss whose gradient the coefficients describe; excluded columns are left out."""
    out = torch.zeros(raw.shape, dtype=torch.float64)
    for row, (a, e, o, r, f, j) in enumerate(coefs.double().T.tolist()):
        kept = (raw[row] != -INF).nonzero()[:, 0]
        x = raw[row, kept].double().requires_grad_()
        z = (cap * torch.tanh(x / cap) if cap else x) / temp
        logp, logq = z.log_softmax(-1), t[row, kept].double().log_softmax(-1)
        logm = torch.logaddexp(math.log(beta) + logq, math.log(1 - beta) + logp)
        entropy = -(logp.exp() * logp).sum()
        jsd = beta * (logq.exp() * (logq - logm)).sum() + (1 - beta) * (logp.exp() * (logp - logm)).sum()
        loss = a * z.logsumexp(-1) - e * entropy + r * (logp.exp() * (logp - logq)).sum()
        loss = loss + f * (logq.exp() * (logq - logp)).sum() + j / (1 - beta) * jsd
        if target[row] >= 0:
            loss = loss + o * z[(kept == target[row]).nonzero()[0, 0]]
        out[row, kept] = torch.autograd.grad(loss, x)[0]
    return out


@pytest.mark.parametrize("name", list(COEFS))
@pytest.mark.parametrize("gap", [2.0, 0.01])
@pytest.mark.parametrize(("cap", "temp"), [(0.0, 1.0), (30.0, 0.7)])
def test_dual_gradient(name: str, gap: float, cap: float, temp: float) -> None:
    raw, t = close_heads(3, 2501, gap)
    excluded = slice(30, 40)
    raw[1, excluded] = t[1, excluded] = -INF
    target, beta = torch.tensor([7, 2500, -1]), 0.3
    s = raw.clone()
    ops.prepare_(s, None, temp, cap)
    ops.prepare_(t, None, temp, cap)
    stats, second = dual_stats(s, t, target), torch.zeros(3, 3)
    ops.second_(s, t, stats, beta, second)
    coefs = torch.tensor(COEFS[name])[:, None].expand(6, 3).contiguous()
    whole, tiled = s.clone(), s.clone()
    ops.dual_grad_(whole, t, 0, target, stats, second, coefs, beta, temp, cap)
    for begin, end in tiles(2501, (7, 8, 1000)):
        ops.dual_grad_(tiled[:, begin:end], t[:, begin:end], begin, target, stats, second, coefs, beta, temp, cap)
    # The same logits as the kernel saw, so that only the gradient is judged.
    inverse = (cap * torch.atanh(s.double() * temp / cap) if cap else s.double() * temp).where(s != -INF, -INF)
    truth = true_gradient(inverse, t, target, coefs, beta, cap, temp)
    # Logits of size 10 are rounded to 1e-6, and so is a gap: relative to 0.01 that is what the teacher terms can hold.
    tolerance = 2e-6 + 1e-7 / gap
    for grad in (whole, tiled):
        error = (grad.double() - truth).norm() / truth.norm()
        assert error <= tolerance, error
        assert (grad[1, excluded] == 0).all()
    assert torch.equal(whole, tiled) or (whole - tiled).abs().max() <= 1e-7 * whole.abs().max()


@pytest.mark.parametrize(("cap", "temp"), [(0.0, 1.0), (30.0, 0.7)])
def test_single_gradient_also_of_confident_tokens(cap: float, temp: float) -> None:
    z, _ = close_heads(4, 301, 1.0)
    z[0, 11] = 20.0
    z[1, 30:300] = -INF
    target = torch.tensor([11, 2, 300, -1])
    stats = single_stats(z, target)
    coefs = torch.tensor([[0.9, 0.4, 1, 1], [0, 0.2, -0.1, 0.5], [-0.9, 0.3, 0, 0]])
    truth = torch.zeros(z.shape, dtype=torch.float64)
    for row in range(4):
        kept = (z[row] != -INF).nonzero()[:, 0]
        x = z[row, kept].double().requires_grad_()
        logp = x.log_softmax(-1)
        a, e, o = coefs[:, row].tolist()
        chosen = x[(kept == target[row]).nonzero()[0, 0]] if target[row] >= 0 else 0.0
        loss = a * x.logsumexp(-1) + e * (logp.exp() * logp).sum() + o * chosen
        truth[row, kept] = torch.autograd.grad(loss, x)[0] / temp
        if cap:
            truth[row, kept] *= 1 - (x.detach() * temp / cap).square()
    grad = z.clone()
    ops.single_grad_(grad, 0, target, stats, coefs, temp, cap)
    for row in range(4):
        # Row by row: the first one's gradient is about 1e-6 in size, 1 - p at the target.
        assert (grad[row].double() - truth[row]).norm() <= 2e-6 * truth[row].norm(), row


def test_forward_gradient_where_one_head_excludes_or_underflows() -> None:
    s, t = close_heads(2, 50, 0.5)
    s[0, 4] = -INF  # nothing to push, whatever the teacher says
    s[1, 4], t[1, 4] = -300.0, 3.0  # p underflows, q does not
    t[:, 9] = -INF
    target = torch.tensor([-1, -1])
    stats, second = dual_stats(s, t, target), torch.zeros(3, 2)
    ops.second_(s, t, stats, 0.5, second)
    assert second.isfinite().all()
    p, q = s.double().softmax(-1), t.double().softmax(-1)
    for name in ("forward", "jsd"):
        coefs = torch.tensor(COEFS[name])[:, None].expand(6, 2).contiguous()
        grad = s.clone()
        ops.dual_grad_(grad, t, 0, target, stats, second, coefs, 0.5, 1.0, 0.0)
        assert grad.isfinite().all()
        assert grad[0, 4] == 0
        if name == "forward":
            expected = 0.8 * (p - q)
            expected[0, 4] = 0
            torch.testing.assert_close(grad.double(), expected, rtol=2e-6, atol=1e-7)
    # Reverse KL to a teacher that excludes a token is infinite: no gradient that looks like one.
    grad = s.clone()
    coefs = torch.tensor(COEFS["reverse"])[:, None].expand(6, 2).contiguous()
    ops.dual_grad_(grad, t, 0, target, stats, second, coefs, 0.5, 1.0, 0.0)
    assert grad.isnan().all()
