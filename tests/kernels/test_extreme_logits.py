"""Logits that break the usual formulas: huge, one-hot, excluded, and policies so close or so far that digits go.

Identity hidden states make the projection exact, so that what is judged is the work on the rows alone.
"""

from __future__ import annotations

import math

import pytest
import torch
from copd_kernels import linear_divergence, linear_logprob, linear_policy_loss, reference, topk_overlap

from tests.kernels.problems import Backend


def given(op, student: torch.Tensor, teacher: torch.Tensor | None = None, *args, **options):
    """The operation on given logits, and the student's weight, whose gradient is that of the logits."""
    # A hidden size of T: token t takes column t of the weight.
    eye = torch.eye(student.shape[0], dtype=student.dtype)
    weight = student.T.contiguous().requires_grad_()
    heads = (eye, weight) if teacher is None else (eye, weight, eye, teacher.T.contiguous())
    return op(*heads, *args, **options), weight


def reference_gradient(columns, weight) -> torch.Tensor:
    return torch.autograd.grad(sum(column.sum() for column in columns), weight)[0]


@pytest.mark.parametrize("vocab_size", [5, 4099])
@pytest.mark.parametrize("top", [1e2, 1e4])
def test_huge_logits(vocab_size: int, top: float, exact_backend: Backend, randn) -> None:
    """Of both signs, where exp() of a logit is 0 or infinite: against fp64 on the same logits."""
    dtype = exact_backend.dtype
    logits = randn(6, vocab_size, dtype=dtype, scale=top)
    logits[3] = -top
    logits[4] = top
    logits[5, vocab_size // 2] = 3 * top
    target = torch.tensor([0, vocab_size - 1, 1, 2, 3, vocab_size // 2])
    out, weight = given(linear_logprob, logits, None, target)
    true, exact = given(reference.linear_logprob, logits.double(), None, target)
    lse = true.lse_T.abs().clamp(min=1)
    assert ((out.lse_T - true.lse_T).abs() <= 5e-6 * lse).all()
    # Logits of 1e4 are exact here, and so are their distances from the largest one: entropy and log-prob lose nothing.
    torch.testing.assert_close(out.entropy_T.double(), true.entropy_T, rtol=5e-6, atol=5e-6)
    torch.testing.assert_close(out.logp_T.double(), true.logp_T, rtol=5e-6, atol=5e-6)
    assert out.logp_T.max() <= 0
    assert out.entropy_T.min() >= 0
    got, expected = reference_gradient(out, weight), reference_gradient(true, exact)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=5e-6)


@pytest.mark.parametrize("vocab_size", [3, 2500, 5000])
@pytest.mark.parametrize("peak", [30.0, 90.0, 500.0])
def test_one_hot_rows(vocab_size: int, peak: float, exact_backend: Backend) -> None:
    """The peaks of the policies lie in different tiles of the rows; KL is about the distance of the logits."""
    dtype = exact_backend.dtype
    student, teacher = (torch.zeros(2, vocab_size, dtype=dtype) for _ in range(2))
    student[0, 0], teacher[0, vocab_size - 1] = peak, peak
    student[1, vocab_size // 2], teacher[1, vocab_size // 2] = peak, peak + 1
    target = torch.tensor([0, vocab_size // 2])
    out, weight = given(linear_divergence, student, teacher, target, top_k=1)
    true, exact = given(reference.linear_divergence, student.double(), teacher.double(), target, top_k=1)
    for name in out._fields:
        value, expected = getattr(out, name).double(), getattr(true, name)
        bound = 1e-4 if "kl" in name or "jsd" in name else 5e-6
        # At a peak of 30 the second row is 1e-12 apart: the truth itself, in the plain formula, has no digit of that.
        torch.testing.assert_close(value, expected, rtol=bound, atol=1e-6, msg=name)
    assert out.kl_student_teacher_T[0].item() == pytest.approx(peak, rel=1e-5)
    columns = [
        [x.kl_student_teacher_T, x.kl_teacher_student_T, x.jsd_T, x.student_logp_T, x.student_entropy_T]
        for x in (out, true)
    ]
    got, expected = reference_gradient(columns[0], weight), reference_gradient(columns[1], exact)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("vocab_size", [2, 2100, 8200])
@pytest.mark.parametrize(
    ("low", "high"), [(-30.0, 10.0), (-75.0, 75.0), (-90.0, -5.0), (-110.0, 110.0), (-88.0, 86.0), (-200.0, 3.0)]
)
def test_teacher_lives_where_the_student_has_no_mass(
    vocab_size: int, low: float, high: float, exact_backend: Backend
) -> None:
    """exp(low) underflows or nearly; the gap there is so large that it decides about the KL all the same."""
    dtype = exact_backend.dtype
    student, teacher = (torch.full((1, vocab_size), -300.0, dtype=dtype) for _ in range(2))
    student[0, 0], teacher[0, 0] = 0, 0
    student[0, -1], teacher[0, -1] = low, high
    target = torch.tensor([0])
    out, _ = given(linear_divergence, student, teacher, target, top_k=1)
    true, _ = given(reference.linear_divergence, student.double(), teacher.double(), target, top_k=1)
    for name in ("kl_student_teacher_T", "kl_teacher_student_T", "jsd_T", "delta_T"):
        value, expected = getattr(out, name).double(), getattr(true, name)
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-9, msg=f"{name} {value} {expected}")


@pytest.mark.parametrize("vocab_size", [9, 4300])
def test_padding_of_minus_infinity(vocab_size: int, exact_backend: Backend, randn) -> None:
    """-inf on both sides, as a bias over the padding: no probability, no gradient, nothing NaN, in every operation."""
    dtype, real = exact_backend.dtype, vocab_size - vocab_size // 2
    hidden = randn(4, 5, dtype=dtype)
    weight, teacher = randn(vocab_size, 5, dtype=dtype), randn(vocab_size, 5, dtype=dtype)
    bias = randn(vocab_size, dtype=dtype)
    bias[real:] = -math.inf
    target, numbers = torch.tensor([0, 1, real - 1, 2]), randn(4, dtype=dtype)

    def columns(weight, bias, teacher):
        single = linear_logprob(hidden, weight, target, bias_V=bias)
        dual = linear_divergence(
            hidden, weight, hidden, teacher, target, student_bias_V=bias, teacher_bias_V=bias.detach(), top_k=3
        )
        losses = [
            linear_policy_loss(
                hidden,
                weight,
                target,
                bias_V=bias,
                advantage_T=numbers,
                old_logp_T=single.logp_T.detach(),
                loss_weight_T=numbers.abs(),
                teacher_hidden_TD=hidden,
                teacher_weight_VD=teacher,
                teacher_bias_V=bias.detach(),
                divergence=divergence,
                divergence_weight_T=numbers.abs(),
            ).loss[None]
            for divergence in ("reverse_kl", "forward_kl", "jsd")
        ]
        return [*single, *dual, *losses]

    results = []
    for size in (vocab_size, real):
        leaves = weight[:size].clone().requires_grad_(), bias[:size].clone().requires_grad_()
        out = columns(*leaves, teacher[:size])
        loss = sum((i + 1) * column.sum() for i, column in enumerate(out) if column.requires_grad)
        results.append((out, torch.autograd.grad(loss, leaves)))
    (padded, padded_gradients), (plain, gradients) = results
    bound = {"rtol": 1e-12, "atol": 1e-13} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-5}
    for got, expected in zip(padded, plain, strict=True):
        torch.testing.assert_close(got, expected, **bound)
    for got, expected in zip(padded_gradients, gradients, strict=True):
        assert got[real:].eq(0).all()
        torch.testing.assert_close(got[:real], expected, **bound)
    # As many as the GPU's kernel has slots for.
    top_k = min(real, 32) if exact_backend.rows == "triton" else real
    biases = {"student_bias_V": bias, "teacher_bias_V": bias}
    assert topk_overlap(hidden, weight, hidden, weight, top_k=top_k, **biases).eq(1).all()


@pytest.mark.parametrize("vocab_size", [6, 4300])
@pytest.mark.parametrize("excluded", ["student", "teacher"])
def test_one_side_excludes_tokens(vocab_size: int, excluded: str, exact_backend: Backend, randn) -> None:
    """The divergences that stay finite, and their gradients, against fp64; the others are infinite, not large."""
    dtype = exact_backend.dtype
    student, teacher = randn(3, vocab_size, dtype=dtype), randn(3, vocab_size, dtype=dtype)
    biases = {name: torch.zeros(vocab_size, dtype=dtype) for name in ("student", "teacher")}
    # The whole of a tile, and some of the next.
    biases[excluded][vocab_size // 3 :] = -math.inf
    target, finite = torch.tensor([0, 1, 0]), ["jsd_T", "student_entropy_T", "student_logp_T", "sum_min_T"]
    finite += ["kl_student_teacher_T" if excluded == "student" else "kl_teacher_student_T", "delta_T"]
    columns = []
    for op, cast in ((linear_divergence, dtype), (reference.linear_divergence, torch.float64)):
        options = {f"{name}_bias_V": bias.to(cast) for name, bias in biases.items()}
        out, weight = given(op, student.to(cast), teacher.to(cast), target, top_k=1, **options)
        infinite = out.kl_teacher_student_T if excluded == "student" else out.kl_student_teacher_T
        assert infinite.eq(math.inf).all()
        values = [getattr(out, name) for name in finite]
        differentiable = [x for x in values if x.requires_grad]
        columns.append((values, [torch.autograd.grad(x.sum(), weight, retain_graph=True)[0] for x in differentiable]))
    bound = {"rtol": 1e-11, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 2e-6}
    for got, expected in zip(columns[0][0], columns[1][0], strict=True):
        torch.testing.assert_close(got.double(), expected, **bound)
    names = [name for name in finite if name != "sum_min_T"]
    for name, got, expected in zip(names, columns[0][1], columns[1][1], strict=True):
        if excluded == "student" and expected.isnan().any():
            # Autograd of the plain formula multiplies 0 by the -inf of its own intermediate.
            expected = expected.nan_to_num(nan=0)
        torch.testing.assert_close(got.double(), expected, **bound, msg=lambda text, name=name: f"{name}: {text}")


def test_jsd_under_underflow(exact_backend: Backend) -> None:
    """Disjoint policies: JSD(1/2) is log 2, and the probabilities that underflow leave no 0 log 0."""
    dtype = exact_backend.dtype
    student = torch.tensor([[0.0, -1e3, -2e3, -1e4]], dtype=dtype)
    teacher = torch.tensor([[-1e4, -2e3, -1e3, 0.0]], dtype=dtype)
    out, weight = given(linear_divergence, student, teacher, top_k=1)
    assert out.jsd_T.item() == pytest.approx(math.log(2), rel=1e-6)
    assert out.sum_min_T.item() == 0
    assert torch.autograd.grad(out.jsd_T.sum(), weight)[0].isfinite().all()
    for beta in (0.1, 0.9):
        # beta KL(q || m) = beta log(1 / beta), and the same with the rest for p.
        out, _ = given(linear_divergence, student, teacher, top_k=1, jsd_beta=beta)
        expected = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
        assert out.jsd_T.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("vocab_size", [61, 20_011])
@pytest.mark.parametrize(
    ("gap", "offset"), [(0.5, 0.0), (0.05, 0.0), (0.005, 0.0), (0.0005, 0.0), (0.5, 7.0), (0.05, 3.0), (0.005, 1.0)]
)
def test_close_policies(vocab_size: int, gap: float, offset: float, exact_backend: Backend, randn) -> None:
    """Section 2 of the specification: true KL from 4e-2 to 1e-7, where the one-pass formula has no digit left.

    An ``offset`` that all of the teacher's logits have changes neither policy, but the mean gap is then a number of its
    size, stored with a relative error of 6e-8: the gradient loses that over the gap.
    """
    dtype = exact_backend.dtype
    student = randn(3, vocab_size, dtype=dtype, scale=2.0)
    teacher = student + randn(3, vocab_size, dtype=dtype, scale=gap) + offset
    out, weight = given(linear_divergence, student, teacher, torch.tensor([0, 1, 2]))
    # The truth is the centred form in fp64: the plain one loses eight digits at a KL of 1e-8 in fp64 as well.
    p, q = student.double().log_softmax(-1), teacher.double().log_softmax(-1)
    delta = p - q
    reverse = (p.exp() * (delta + torch.expm1(-delta))).sum(-1)
    forward = (q.exp() * (-delta + torch.expm1(delta))).sum(-1)
    log_ratio = -torch.log1p(0.5 * torch.expm1(-delta))
    jsd = 0.5 * (p.exp() * (log_ratio + q.sub(p).exp() * (log_ratio - delta))).sum(-1)
    for name, true in (("kl_student_teacher_T", reverse), ("kl_teacher_student_T", forward)):
        torch.testing.assert_close(getattr(out, name).double(), true, rtol=1e-4, atol=0, msg=name)
    # The reverse KL of each to the mixture, so of a quarter of the size; its terms are no better than those of the KL.
    torch.testing.assert_close(out.jsd_T.double(), jsd, rtol=1e-4, atol=0)
    torch.testing.assert_close(out.delta_T.double(), delta[torch.arange(3), torch.arange(3)], rtol=1e-4, atol=1e-6)
    # d KL(p || q) / ds = p (delta - E[delta]); d KL(q || p) / ds = p - q; section 3: 5e-6 for fp32. The logits were
    # rounded at a size of 10 and their distances at the size of the gap, so the difference is exact.
    gradients = (
        (out.kl_student_teacher_T, p.exp() * (delta - (p.exp() * delta).sum(-1, keepdim=True))),
        (out.kl_teacher_student_T, -p.exp() * torch.expm1(-delta)),
    )
    for column, true in gradients:
        got = torch.autograd.grad(column.sum(), weight, retain_graph=True)[0].T.double()
        bound = 5e-6 if dtype == torch.float32 else 1e-11
        # The GPU's kernels round the mean gap of a tile and that of all tiles.
        rounding = 1.2e-7 * (2 if exact_backend.rows == "triton" else 1)
        assert (got - true).norm() <= (bound + rounding * offset / gap) * true.norm()
