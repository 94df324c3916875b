"""linear_logprob against the softmax written out in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from copd_kernels import _products, linear_logprob, reference

# Odd and prime sizes, one token, a vocabulary of one.
SHAPES = [(7, 5, 13), (1, 3, 257), (17, 8, 64), (5, 4, 1)]


def by_hand(hidden, weight, bias, target, temperature):
    """log p, entropy and lse of every row by their definitions: no logsumexp, no log_softmax."""
    out = []
    for t in range(hidden.shape[0]):
        logits = [
            (sum(h * w for h, w in zip(hidden[t].tolist(), row.tolist(), strict=True)) + b) / temperature
            for row, b in zip(weight, bias.tolist(), strict=True)
        ]
        top = max(logits)
        total = math.fsum(math.exp(z - top) for z in logits)
        lse = top + math.log(total)
        entropy = -math.fsum(math.exp(z - lse) * (z - lse) for z in logits)
        out.append((logits[int(target[t])] - lse, entropy, lse))
    return torch.tensor(out, dtype=torch.float64).T


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk_tokens", [1, 3, None])
def test_values(shape, temperature, chunk_tokens, randn, randint) -> None:
    num_tokens, hidden_size, vocab_size = shape
    hidden, weight, bias = randn(num_tokens, hidden_size), randn(vocab_size, hidden_size), randn(vocab_size)
    target = randint(vocab_size, num_tokens)
    out = linear_logprob(hidden, weight, target, bias_V=bias, temperature=temperature, chunk_tokens=chunk_tokens)
    expected = by_hand(hidden, weight, bias, target, temperature)
    torch.testing.assert_close(torch.stack(out), expected, rtol=1e-12, atol=1e-12)
    plain = reference.linear_logprob(hidden, weight, target, bias_V=bias, temperature=temperature)
    torch.testing.assert_close(torch.stack(plain), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk_tokens", [1, 2, 7, 100])
def test_gradcheck(chunk_tokens, randn, randint) -> None:
    hidden, weight, bias = (x.requires_grad_() for x in (randn(7, 5), randn(11, 5), randn(11)))
    target = randint(11, 7)

    def run(hidden, weight, bias):
        out = linear_logprob(hidden, weight, target, bias_V=bias, temperature=0.7, chunk_tokens=chunk_tokens)
        return tuple(out)

    assert torch.autograd.gradcheck(run, (hidden, weight, bias))


@pytest.mark.parametrize("name", ["logp_T", "entropy_T", "lse_T"])
def test_gradient_of_one_output(name, randn, randint) -> None:
    inputs = [x.requires_grad_() for x in (randn(9, 5), randn(13, 5))]
    target, upstream = randint(13, 9), randn(9)
    grads = [
        torch.autograd.grad((getattr(op(*inputs, target), name) * upstream).sum(), inputs)
        for op in (linear_logprob, reference.linear_logprob)
    ]
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_backward_twice_gives_the_same(randn, randint) -> None:
    hidden, weight = randn(9, 5).requires_grad_(), randn(13, 5).requires_grad_()
    loss = linear_logprob(hidden, weight, randint(13, 9)).logp_T.sum()
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    for got, expected in zip(torch.autograd.grad(loss, (hidden, weight)), first, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 5e-6), (torch.bfloat16, 1e-2)])
def test_low_precision(dtype, bound, randn, randint) -> None:
    """Errors against fp64 on the same rounded inputs: at most twice the plain formula's, plus a floor."""
    hidden, weight, target = randn(64, 32, dtype=dtype), randn(499, 32, dtype=dtype, scale=0.3), randint(499, 64)
    upstream = randn(3, 64)

    def gradients(op, inputs):
        inputs = [x.detach().requires_grad_() for x in inputs]
        out = op(*inputs, target)
        (torch.stack(out).double() * upstream).sum().backward()
        return torch.stack(out).detach(), [x.grad for x in inputs]

    out, grads = gradients(linear_logprob, (hidden, weight))
    plain, plain_grads = gradients(reference.linear_logprob, (hidden, weight))
    truth, true_grads = gradients(reference.linear_logprob, (hidden.double(), weight.double()))
    assert out.dtype == torch.float32
    for got, ref, true in zip([out, *grads], [plain, *plain_grads], [truth, *true_grads], strict=True):
        assert relative_error(got, true) <= min(bound, 2 * relative_error(ref, true) + 1e-6)
    if dtype == torch.float32:
        lse_error = (out[2] - truth[2]).abs() / truth[2].abs().clamp(min=1)
        assert lse_error.max() <= 5e-6


def test_weight_gradient_survives_many_chunks(randn, randint) -> None:
    """Thousands of bf16 chunks: a bf16 accumulator would stop growing."""
    hidden, weight = randn(4096, 4, dtype=torch.bfloat16).abs(), randn(3, 4, dtype=torch.bfloat16).requires_grad_()
    target = torch.zeros(4096, dtype=torch.int64)
    linear_logprob(hidden, weight, target, chunk_tokens=1).logp_T.sum().backward()
    exact = weight.detach().double().requires_grad_()
    reference.linear_logprob(hidden.double(), exact, target).logp_T.sum().backward()
    assert relative_error(weight.grad, exact.grad) < 1e-2


def test_frozen_inputs_get_no_gradient(randn, randint) -> None:
    hidden, weight = randn(3, 5).requires_grad_(), randn(7, 5)
    linear_logprob(hidden, weight, randint(7, 3)).logp_T.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_no_logits_beyond_a_chunk(watch, randn, randint) -> None:
    num_tokens, hidden_size, vocab_size, chunk = 512, 4, 1000, 8
    hidden, weight = randn(num_tokens, hidden_size).requires_grad_(), randn(vocab_size, hidden_size).requires_grad_()
    with watch:
        out = linear_logprob(hidden, weight, randint(vocab_size, num_tokens), chunk_tokens=chunk)
        (out.logp_T + out.entropy_T + out.lse_T).sum().backward()
    assert watch.num_elements == chunk * vocab_size


@pytest.mark.parametrize("shape", [(40, 2**20), (2**20, 40), (5000, 5000)])
def test_default_tile(shape, watch, randn, randint) -> None:
    """A tile of logits holds TILE_BYTES, whichever of T and V is the long one."""
    num_tokens, vocab_size = shape
    hidden, weight = randn(num_tokens, 1, dtype=torch.float32), randn(vocab_size, 1, dtype=torch.float32)
    with watch:
        linear_logprob(hidden, weight, randint(vocab_size, num_tokens))
    # The statistics of all tokens, [4, T], are no workspace: the outputs are made of them.
    assert watch.num_elements <= max(_products.TILE_BYTES // 4, 4 * num_tokens)


def test_no_tokens(randn) -> None:
    hidden, weight = randn(0, 5).requires_grad_(), randn(7, 5).requires_grad_()
    out = linear_logprob(hidden, weight, torch.zeros(0, dtype=torch.int64))
    assert [x.shape for x in out] == [(0,)] * 3
    out.logp_T.sum().backward()
    assert hidden.grad.shape == (0, 5)
    assert weight.grad.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_huge_and_excluded_logits(dtype) -> None:
    hidden = torch.eye(2, dtype=dtype).requires_grad_()
    weight = torch.tensor([[8e4, 0.0], [0.0, 0.0], [-8e4, 0.0], [0.0, 0.0]], dtype=dtype).requires_grad_()
    bias = torch.tensor([0.0, 0.0, 0.0, -math.inf], dtype=dtype)
    out = linear_logprob(hidden, weight, torch.tensor([0, 1]), bias_V=bias)
    torch.testing.assert_close(out.logp_T, torch.tensor([0.0, -math.log(3)], dtype=dtype))
    torch.testing.assert_close(out.entropy_T, torch.tensor([0.0, math.log(3)], dtype=dtype))
    grads = torch.autograd.grad((out.logp_T + out.entropy_T + out.lse_T).sum(), (hidden, weight))
    assert all(grad.isfinite().all() for grad in grads)
    assert grads[1][3].eq(0).all()


def test_log_prob_is_never_positive(randn, randint) -> None:
    out = linear_logprob(
        randn(200, 8, dtype=torch.float32, scale=5), randn(97, 8, dtype=torch.float32), randint(97, 200)
    )
    assert out.logp_T.max() <= 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_hidden_states_that_are_not_finite(bad, randn, randint) -> None:
    """An error where the token counts, nothing where it is masked; never a number made of it."""
    hidden, weight, target = randn(4, 5), randn(7, 5), randint(7, 4)
    hidden[2, 1] = bad
    with pytest.raises(ValueError, match=rf"hidden_TD must be finite, row 2 .* holds \[{bad}\]"):
        linear_logprob(hidden, weight, target)
    mask = torch.tensor([True, True, False, True])
    out = linear_logprob(hidden.requires_grad_(), weight.requires_grad_(), target, mask_T=mask)
    expected = linear_logprob(hidden.detach()[mask], weight.detach(), target[mask])
    for column, value in zip(out, expected, strict=True):
        assert column[2] == 0
        torch.testing.assert_close(column[mask], value, rtol=1e-13, atol=1e-14)
    sum(column.sum() for column in out).backward()
    assert hidden.grad[2].eq(0).all()
    assert hidden.grad.isfinite().all()
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("where", ["weight", "bias"])
def test_nan_in_nan_out(where, backend, randn, randint) -> None:
    inputs = {
        "hidden": randn(4, 5, dtype=backend.dtype),
        "weight": randn(7, 5, dtype=backend.dtype),
        "bias": randn(7, dtype=backend.dtype),
    }
    inputs[where][3] = math.nan
    for x in inputs.values():
        x.requires_grad_()
    out = linear_logprob(inputs["hidden"], inputs["weight"], randint(7, 4), bias_V=inputs["bias"])
    for column in out:
        assert column.isnan().all()
    sum(column.sum() for column in out).backward()
    assert inputs["hidden"].grad.isnan().all()


def test_autocast(randn, randint) -> None:
    hidden, weight, target = (
        randn(6, 5, dtype=torch.float32).requires_grad_(),
        randn(7, 5, dtype=torch.float32),
        randint(7, 6),
    )
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_logprob(hidden, weight, target)
        out.logp_T.sum().backward()
    rounded = linear_logprob(hidden.bfloat16(), weight.bfloat16(), target)
    assert torch.equal(out.logp_T, rounded.logp_T)
    assert hidden.grad.dtype == torch.float32
