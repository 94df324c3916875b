"""linear_policy_loss against (SURROGATE) and its gradient written out in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from copd_kernels import linear_divergence, linear_logprob, linear_policy_loss, reference

LOW, HIGH = 0.2, 0.28


def by_hand(hidden, weight, bias, target, advantage, old_logp, loss_weight, temperature):
    """Loss and gradients, token by token: d loss / d logits = -w A rho (onehot - p) / temperature unless clipped."""
    vocab_size = weight.shape[0]
    loss = 0.0
    grad_logits = torch.zeros(hidden.shape[0], vocab_size, dtype=torch.float64)
    clipped = []
    for t in range(hidden.shape[0]):
        logits = (weight @ hidden[t] + bias) / temperature
        p = (logits - logits.max()).exp()
        p = p / p.sum()
        w, a = float(loss_weight[t]), float(advantage[t])
        rho = math.exp(math.log(float(p[target[t]])) - float(old_logp[t]))
        bounded = min(max(rho, 1 - LOW), 1 + HIGH)
        loss -= w * min(rho * a, bounded * a)
        cut = (a > 0 and rho > 1 + HIGH) or (a < 0 and rho < 1 - LOW)
        clipped.append(cut)
        if not cut:
            onehot = torch.zeros(vocab_size, dtype=torch.float64)
            onehot[target[t]] = 1
            grad_logits[t] = -w * a * rho * (onehot - p) / temperature
    return loss, grad_logits @ weight, grad_logits.T @ hidden, grad_logits.sum(0), clipped


def inputs(randn, randint, num_tokens=11, hidden_size=5, vocab_size=17, dtype=torch.float64):
    """Old log-probs a little off the current ones, so that ratios fall on both sides of the clip."""
    hidden, weight, bias = (
        randn(num_tokens, hidden_size, dtype=dtype),
        randn(vocab_size, hidden_size, dtype=dtype),
        randn(vocab_size, dtype=dtype),
    )
    target = randint(vocab_size, num_tokens)
    logp = linear_logprob(hidden, weight, target, bias_V=bias, temperature=0.8).logp_T
    per_token = {
        "advantage_T": randn(num_tokens, dtype=dtype),
        "old_logp_T": (logp + randn(num_tokens, dtype=dtype, scale=0.3)).detach(),
        "loss_weight_T": randn(num_tokens, dtype=dtype).abs(),
    }
    return (hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()), target, per_token


@pytest.mark.parametrize("chunk_tokens", [1, 4, 11, None])
def test_loss_and_gradient(chunk_tokens, randn, randint) -> None:
    parameters, target, per_token = inputs(randn, randint)
    hidden, weight, bias = parameters
    out = linear_policy_loss(
        hidden, weight, target, bias_V=bias, temperature=0.8, chunk_tokens=chunk_tokens, **per_token
    )
    detached = [x.detach() for x in parameters]
    loss, *grads, clipped = by_hand(*detached, target, *per_token.values(), 0.8)
    assert {True, False} == set(clipped)
    assert out.loss.item() == pytest.approx(loss, rel=1e-12)
    assert out.clipped_T.tolist() == clipped
    for got, expected in zip(torch.autograd.grad(out.loss, parameters), grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)


def test_against_reference_and_logprob(randn, randint) -> None:
    (hidden, weight, bias), target, per_token = inputs(randn, randint)
    out = linear_policy_loss(hidden, weight, target, bias_V=bias, temperature=0.8, chunk_tokens=3, **per_token)
    plain = reference.linear_policy_loss(hidden, weight, target, bias_V=bias, temperature=0.8, **per_token)
    assert out.teacher is None
    assert plain.teacher is None
    for name, got in out._replace(teacher=torch.zeros(()))._asdict().items():
        expected = torch.zeros(()) if name == "teacher" else getattr(plain, name)
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13, msg=name)
    same = linear_logprob(hidden, weight, target, bias_V=bias, temperature=0.8)
    torch.testing.assert_close(out.logp_T, same.logp_T, rtol=1e-13, atol=0)
    torch.testing.assert_close(out.entropy_T, same.entropy_T, rtol=1e-13, atol=0)
    assert not any(x.requires_grad for x in out[1:] if x is not None)


def test_gradcheck(randn, randint) -> None:
    parameters, target, per_token = inputs(randn, randint, num_tokens=7)

    def run(hidden, weight, bias):
        return (
            3
            * linear_policy_loss(hidden, weight, target, bias_V=bias, temperature=0.8, chunk_tokens=2, **per_token).loss
        )

    assert torch.autograd.gradcheck(run, parameters)


# ratio, sign of the advantage -> whether the token's gradient is cut, and the value of min(rho A, clip(rho) A)
CLIP_CASES = [
    (1.5, 1.0, True, 1.28),
    (1.5, -1.0, False, -1.5),
    (0.5, 1.0, False, 0.5),
    (0.5, -1.0, True, -0.8),
    (1.2, 1.0, False, 1.2),
    (1.2, -1.0, False, -1.2),
    (0.9, 1.0, False, 0.9),
    (0.9, -1.0, False, -0.9),
    (1.5, 0.0, False, 0.0),
]


@pytest.mark.parametrize(("ratio", "advantage", "cut", "surrogate"), CLIP_CASES)
def test_clip(ratio, advantage, cut, surrogate, randn) -> None:
    hidden, weight = randn(1, 3).requires_grad_(), randn(5, 3).requires_grad_()
    target = torch.tensor([2])
    logp = linear_logprob(hidden, weight, target).logp_T
    out = linear_policy_loss(
        hidden,
        weight,
        target,
        advantage_T=torch.tensor([advantage], dtype=torch.float64),
        old_logp_T=logp.detach() - math.log(ratio),
        loss_weight_T=torch.tensor([0.5], dtype=torch.float64),
    )
    assert out.ratio_T.item() == pytest.approx(ratio)
    assert out.clipped_T.item() is cut
    assert out.loss.item() == pytest.approx(-0.5 * surrogate)
    assert out.loss_T.tolist() == [out.loss.item()]
    assert not out.loss_T.requires_grad
    got = torch.autograd.grad(out.loss, (hidden, weight))
    if cut or advantage == 0:
        assert all(grad.eq(0).all() for grad in got)
    else:
        # d(-w rho A) = -w A rho d log p
        for grad, of_logp in zip(got, torch.autograd.grad(logp.sum(), (hidden, weight)), strict=True):
            torch.testing.assert_close(grad, -0.5 * advantage * ratio * of_logp)


def test_student_equal_to_teacher_gives_no_gradient(randn, randint) -> None:
    """(OPD-DELTA) of a policy with itself is exactly 0, so (OPD-ADV) moves nothing."""
    hidden, weight = randn(9, 5, dtype=torch.float32), randn(31, 5, dtype=torch.float32)
    target = randint(31, 9)
    scores = linear_divergence(hidden, weight, hidden.clone(), weight.clone(), target)
    delta = scores.teacher_logp_T - scores.student_logp_T
    assert delta.eq(0).all()
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    old_logp = linear_logprob(hidden, weight, target).logp_T.detach()
    out = linear_policy_loss(
        hidden, weight, target, advantage_T=delta, old_logp_T=old_logp, loss_weight_T=torch.ones(9)
    )
    out.loss.backward()
    assert out.loss.item() == 0
    assert out.ratio_T.eq(1).all()
    assert hidden.grad.eq(0).all()
    assert weight.grad.eq(0).all()


def test_opd_gradient_is_the_reverse_kl(randn) -> None:
    """Over all targets weighted by the student's probability, (OPD-ADV) descends KL(student || teacher)."""
    vocab_size = 13
    hidden, weight, teacher = randn(1, 4).requires_grad_(), randn(vocab_size, 4), randn(vocab_size, 4)
    target = torch.arange(vocab_size)
    rows = hidden.expand(vocab_size, 4)
    scores = linear_divergence(rows.detach(), weight, rows.detach(), teacher, target)
    out = linear_policy_loss(
        rows,
        weight,
        target,
        advantage_T=scores.teacher_logp_T - scores.student_logp_T,
        old_logp_T=scores.student_logp_T,
        loss_weight_T=scores.student_logp_T.exp(),
    )
    (got,) = torch.autograd.grad(out.loss, hidden)
    student_logp, teacher_logp = ((hidden @ w.T).log_softmax(-1) for w in (weight, teacher))
    kl = (student_logp.exp() * (student_logp - teacher_logp.detach())).sum()
    (expected,) = torch.autograd.grad(kl, hidden)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    assert out.loss.item() == pytest.approx(kl.item(), rel=1e-10)


def test_backward_scales_and_repeats(randn, randint) -> None:
    parameters, target, per_token = inputs(randn, randint)
    loss = linear_policy_loss(*parameters[:2], target, **per_token).loss
    once = torch.autograd.grad(loss, parameters[:2], retain_graph=True)
    scaled = torch.autograd.grad(loss, parameters[:2], grad_outputs=torch.tensor(-3.0).double(), retain_graph=True)
    again = torch.autograd.grad(loss, parameters[:2])
    for first, third, second in zip(once, scaled, again, strict=True):
        torch.testing.assert_close(third, -3 * first)
        assert torch.equal(first, second)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 5e-6), (torch.bfloat16, math.inf)])
def test_low_precision(dtype, bound, randn, randint) -> None:
    """Gradient errors against fp64 on the same rounded inputs: at most twice the plain formula's, plus a floor.

    For bf16 the plain formula is the only measure: logits rounded to bf16 move rho by some percent in either.
    """
    (hidden, weight, _), target, per_token = inputs(
        randn, randint, num_tokens=64, hidden_size=32, vocab_size=499, dtype=dtype
    )
    # No ratio near a clip bound, where a rounding error decides about the whole gradient of a token.
    per_token["old_logp_T"] = linear_logprob(hidden, weight, target).logp_T.detach()
    per_token = {name: x.float() for name, x in per_token.items()}

    def gradients(op, dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight)]
        out = op(*leaves, target, **{name: x.to(torch.promote_types(dtype, x.dtype)) for name, x in per_token.items()})
        return torch.autograd.grad(out.loss, leaves)

    truths = gradients(reference.linear_policy_loss, torch.float64)
    plains = gradients(reference.linear_policy_loss, dtype)
    for got, plain, true in zip(gradients(linear_policy_loss, dtype), plains, truths, strict=True):
        assert got.dtype == dtype
        error, plain_error = (float((x.double() - true).norm() / true.norm()) for x in (got, plain))
        assert error <= min(bound, 2 * plain_error + 1e-6)


def test_frozen_weight_has_no_gradient_buffer(watch, randn, randint) -> None:
    """With a frozen lm_head nothing of its size is allocated at all."""
    num_tokens, hidden_size, vocab_size = 16, 64, 300
    (hidden, weight, _), target, per_token = inputs(randn, randint, num_tokens, hidden_size, vocab_size)
    weight.requires_grad_(False)
    with watch:
        out = linear_policy_loss(hidden, weight, target, chunk_tokens=1, **per_token)
        out.loss.backward()
    assert watch.num_elements == num_tokens * hidden_size
    assert watch.wanted == [(True, False, False)]
    assert weight.grad is None
    plain = reference.linear_policy_loss(hidden, weight, target, **per_token)
    torch.testing.assert_close(hidden.grad, torch.autograd.grad(plain.loss, hidden)[0])


def test_no_logits_beyond_a_chunk(watch, randn, randint) -> None:
    num_tokens, hidden_size, vocab_size, chunk = 512, 4, 1000, 8
    (hidden, weight, bias), target, per_token = inputs(randn, randint, num_tokens, hidden_size, vocab_size)
    with watch:
        out = linear_policy_loss(hidden, weight, target, bias_V=bias, chunk_tokens=chunk, **per_token)
        out.loss.backward()
    assert watch.num_elements == chunk * vocab_size


@pytest.mark.parametrize("chunk_tokens", [1, 16])
def test_no_grad_needs_no_gradients(chunk_tokens, watch, randn, randint) -> None:
    (hidden, weight, _), target, per_token = inputs(randn, randint, num_tokens=64, hidden_size=64)
    with torch.no_grad(), watch:
        out = linear_policy_loss(hidden, weight, target, chunk_tokens=chunk_tokens, **per_token)
    assert not out.loss.requires_grad
    assert watch.num_elements < min(hidden.numel(), weight.numel())
    expected = reference.linear_policy_loss(hidden, weight, target, **per_token)
    torch.testing.assert_close(out.loss, expected.loss.detach())


def test_no_tokens(randn) -> None:
    hidden, weight, none = randn(0, 5).requires_grad_(), randn(7, 5).requires_grad_(), torch.zeros(0)
    out = linear_policy_loss(
        hidden, weight, torch.zeros(0, dtype=torch.int64), advantage_T=none, old_logp_T=none, loss_weight_T=none
    )
    out.loss.backward()
    assert out.loss.item() == 0
    assert weight.grad.eq(0).all()
    assert hidden.grad.shape == (0, 5)


def test_hidden_states_that_are_not_finite(randn, randint) -> None:
    (hidden, weight, _), target, per_token = inputs(randn, randint, num_tokens=3)
    spoiled = hidden.detach().clone()
    spoiled[1, 0] = math.nan
    with pytest.raises(ValueError, match=r"hidden_TD must be finite, row 1 .* holds \[nan\]"):
        linear_policy_loss(spoiled, weight, target, **per_token)
    mask = torch.tensor([True, False, True])
    out = linear_policy_loss(spoiled, weight, target, mask_T=mask, **per_token)
    kept = {name: x[mask] for name, x in per_token.items()}
    expected = linear_policy_loss(spoiled[mask], weight, target[mask], **kept)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", ["advantage_T", "old_logp_T", "loss_weight_T"])
def test_nan_per_token_spoils_its_token(name, randn, randint) -> None:
    (hidden, weight, _), target, per_token = inputs(randn, randint, num_tokens=3)
    # Not a token whose gradient the clip cuts: that is 0 whatever the weight.
    per_token["old_logp_T"][1] = linear_logprob(hidden, weight, target).logp_T[1].detach()
    per_token[name][1] = math.nan
    out = linear_policy_loss(hidden, weight, target, **per_token)
    assert out.loss.isnan()
    assert out.loss_T.isnan().tolist() == [False, True, False]
    (grad,) = torch.autograd.grad(out.loss, hidden)
    assert grad.isnan().all(-1).tolist() == [False, True, False]
    mask = torch.tensor([True, False, True])
    out = linear_policy_loss(hidden, weight, target, mask_T=mask, **per_token)
    assert torch.autograd.grad(out.loss, hidden)[0].isfinite().all()


def test_nan_in_weight_gives_nan(randn, randint) -> None:
    (hidden, weight, _), target, per_token = inputs(randn, randint, num_tokens=3)
    spoiled = weight.detach().clone()
    spoiled[4] = math.nan
    out = linear_policy_loss(hidden, spoiled, target, **per_token)
    assert out.loss.isnan()
    assert out.logp_T.isnan().all()
    assert out.ratio_T.isnan().all()
    assert torch.autograd.grad(out.loss, hidden)[0].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_low_memory_changes_rounding_only(dtype, divergence, watch, randn, randint) -> None:
    """Logits are made a second time, by tiles of the vocabulary, and the workspace no longer holds a whole row."""
    num_tokens, vocab_size = 64, 5003
    hidden, weight = randn(num_tokens, 4, dtype=dtype), randn(vocab_size, 4, dtype=dtype)
    teacher = {"teacher_hidden_TD": hidden, "teacher_weight_VD": weight + 0.1 * randn(vocab_size, 4, dtype=dtype)}
    weights = randn(num_tokens).abs().to(torch.promote_types(dtype, torch.float32))
    results, largest = [], []
    for low_memory in (False, True):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        with watch:
            watch.num_elements = 0
            out = linear_policy_loss(
                *leaves,
                randint(vocab_size, num_tokens),
                **teacher,
                divergence=divergence,
                divergence_weight_T=weights,
                low_memory=low_memory,
            )
            largest.append(watch.num_elements)
        out.loss.backward()
        results.append([out.loss.detach(), *(leaf.grad for leaf in leaves)])
    # 16-bit gradients go by tiles either way.
    bound = {torch.float64: 1e-11, torch.float32: 2e-6, torch.bfloat16: 1e-9}[dtype]
    for stored, again in zip(*results, strict=True):
        assert (stored.double() - again.double()).norm() <= bound * stored.double().norm()
    if dtype != torch.bfloat16 and divergence == "reverse_kl":
        assert largest[1] < num_tokens * vocab_size <= largest[0]
