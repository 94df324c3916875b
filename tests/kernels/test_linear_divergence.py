"""linear_divergence against the definitions in fp64, down to the tiny divergences that CoPD lives on."""

from __future__ import annotations

import math

import pytest
import torch
from copd_kernels import Divergence, linear_divergence, linear_logprob, reference
from hypothesis import given
from hypothesis import strategies as st


def by_hand(student_logits, teacher_logits, target, top_k) -> Divergence:
    """Every field by its definition, one token and one vocabulary entry at a time."""
    rows = []
    for s, t, y in zip(student_logits.tolist(), teacher_logits.tolist(), target.tolist(), strict=True):
        log_p, log_q = ([z - math.log(math.fsum(map(math.exp, row))) for z in row] for row in (s, t))
        p, q = [math.exp(x) for x in log_p], [math.exp(x) for x in log_q]
        kl_st = math.fsum(a * (x - y) for a, x, y in zip(p, log_p, log_q, strict=True))
        kl_ts = math.fsum(b * (y - x) for b, x, y in zip(q, log_p, log_q, strict=True))
        mixture = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
        jsd = math.fsum(
            (a * (x - math.log(m)) + b * (y - math.log(m))) / 2
            for a, b, x, y, m in zip(p, q, log_p, log_q, mixture, strict=True)
        )
        top_s, top_t = (set(sorted(range(len(row)), key=lambda v, row=row: (-row[v], v))[:top_k]) for row in (s, t))
        rows.append(
            (
                log_p[y],
                log_q[y],
                kl_st,
                kl_ts,
                kl_st + kl_ts,
                len(top_s & top_t) / top_k,
                math.fsum(map(min, p, q)),
                -math.fsum(a * x for a, x in zip(p, log_p, strict=True)),
                -math.fsum(b * x for b, x in zip(q, log_q, strict=True)),
                log_p[y] - log_q[y],
                jsd,
            )
        )
    return Divergence(*torch.tensor(rows, dtype=torch.float64).T)


def from_logits(student_logits: torch.Tensor, teacher_logits: torch.Tensor, *args, **options) -> Divergence:
    """The operation on given logits: identity hidden states make the projection exact."""
    eye = torch.eye(student_logits.shape[0], dtype=student_logits.dtype)
    return linear_divergence(eye, student_logits.T.contiguous(), eye, teacher_logits.T.contiguous(), *args, **options)


@pytest.mark.parametrize("chunk_tokens", [1, 4, None])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("gap", [0.0, 0.1, 3.0])
def test_values(chunk_tokens, temperature, gap, randn, randint) -> None:
    """Hidden sizes differ between the policies; biases on both."""
    num_tokens, vocab_size = 7, 23
    student, teacher = (
        (randn(num_tokens, 5), randn(vocab_size, 5)),
        (randn(num_tokens, 8), randn(vocab_size, 8, scale=gap)),
    )
    student_bias, teacher_bias = randn(vocab_size), randn(vocab_size)
    target = randint(vocab_size, num_tokens)
    options = {"student_bias_V": student_bias, "teacher_bias_V": teacher_bias, "temperature": temperature, "top_k": 4}
    expected = by_hand(
        (student[0] @ student[1].T + student_bias) / temperature,
        (teacher[0] @ teacher[1].T + teacher_bias) / temperature,
        target,
        4,
    )
    out = linear_divergence(*student, *teacher, target, chunk_tokens=chunk_tokens, **options)
    plain = reference.linear_divergence(*student, *teacher, target, **options)
    for name, value in expected._asdict().items():
        torch.testing.assert_close(getattr(out, name), value, rtol=1e-11, atol=1e-12, msg=name)
        torch.testing.assert_close(getattr(plain, name), value, rtol=1e-9, atol=1e-12, msg=f"reference {name}")


@pytest.mark.parametrize("gap", [0.05, 0.005, 0.0005])
@pytest.mark.parametrize("spread", [2.0, 6.0])
def test_tiny_kl_in_fp32(gap, spread, randn) -> None:
    """Relative error <= 1e-4 at a true KL of 1e-5 and below, where the one-pass formula has no digit left."""
    student = randn(3, 20_011, dtype=torch.float32, scale=spread)
    teacher = student + randn(3, 20_011, dtype=torch.float32, scale=gap)
    out = from_logits(student, teacher)
    truth = from_logits(student.double(), teacher.double())
    plain = reference.linear_divergence(
        torch.eye(3).double(), student.T.double(), torch.eye(3).double(), teacher.T.double()
    )
    for name in ("kl_student_teacher_T", "kl_teacher_student_T", "symmetric_kl_T"):
        value, true = getattr(out, name), getattr(truth, name)
        torch.testing.assert_close(true, getattr(plain, name), rtol=1e-6, atol=0, msg=name)
        torch.testing.assert_close(value.double(), true, rtol=1e-4, atol=0, msg=name)
    if gap == 0.005 and spread == 2.0:
        assert 3e-6 < truth.kl_student_teacher_T.mean() < 3e-5


logits = st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=40)


@given(student=logits, noise=st.integers(-9, 2), seed=st.integers(0, 2**31))
def test_never_negative(student: list[float], noise: int, seed: int) -> None:
    """At any distance: gaps from 1e-9 to 100."""
    student_logits = torch.tensor([student], dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    teacher_logits = student_logits + torch.randn(student_logits.shape, generator=generator) * 10.0**noise
    out = from_logits(student_logits, teacher_logits, top_k=1)
    truth = from_logits(student_logits.double(), teacher_logits.double(), top_k=1)
    for name in ("kl_student_teacher_T", "kl_teacher_student_T"):
        assert getattr(out, name).item() >= 0
        torch.testing.assert_close(getattr(out, name).double(), getattr(truth, name), rtol=1e-3, atol=1e-12)


def test_equal_policies_are_at_distance_zero(randn, randint) -> None:
    hidden, weight = randn(9, 5, dtype=torch.float32), randn(101, 5, dtype=torch.float32)
    out = linear_divergence(hidden, weight, hidden.clone(), weight.clone(), randint(101, 9), chunk_tokens=4)
    assert torch.equal(out.student_logp_T, out.teacher_logp_T)
    for column in (out.kl_student_teacher_T, out.kl_teacher_student_T, out.symmetric_kl_T):
        assert column.eq(0).all()
    assert out.overlap_T.eq(1).all()
    assert torch.equal(out.student_entropy_T, out.teacher_entropy_T)
    torch.testing.assert_close(out.sum_min_T, torch.ones(9))


def test_log_probs_and_entropy_agree_with_linear_logprob(randn, randint) -> None:
    hidden, weight, other, target = randn(9, 5), randn(31, 5), randn(31, 5), randint(31, 9)
    out = linear_divergence(hidden, weight, hidden, other, target, temperature=0.7)
    for head, logp, entropy in (
        (weight, out.student_logp_T, out.student_entropy_T),
        (other, out.teacher_logp_T, out.teacher_entropy_T),
    ):
        expected = linear_logprob(hidden, head, target, temperature=0.7)
        torch.testing.assert_close(logp, expected.logp_T, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(entropy, expected.entropy_T, rtol=1e-12, atol=1e-13)


def test_overlap_resolves_ties_by_lower_index() -> None:
    student = torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0], [2.0, 1.0, 1.0, 1.0, 3.0]])
    teacher = torch.tensor([[0.0, 0.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0, 1.0]])
    # Row 0: {0, 1, 2} and {2, 3, 4}. Row 1: {4, 0, 1} and {0, 1, 2}.
    assert from_logits(student, teacher, top_k=3).overlap_T.tolist() == pytest.approx([1 / 3, 2 / 3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [30.0, 95.0, 200.0])
def test_distant_policies(gap, dtype) -> None:
    """One-hot rows that disagree: KL is the gap of the logits. In fp32 exp(-95) is denormal, exp(95) infinite."""
    student, teacher = torch.tensor([[gap, 0.0, 0.0]], dtype=dtype), torch.tensor([[0.0, gap, 0.0]], dtype=dtype)
    out = from_logits(student, teacher, torch.tensor([0]), top_k=1)
    for name, value in {
        "kl_student_teacher_T": gap,
        "kl_teacher_student_T": gap,
        "student_logp_T": 0.0,
        "teacher_logp_T": -gap,
        "overlap_T": 0.0,
        "sum_min_T": 0.0,
        "student_entropy_T": 0.0,
    }.items():
        assert getattr(out, name).item() == pytest.approx(value, abs=1e-6), name


def test_excluded_tokens(randn) -> None:
    """-inf on both sides counts nothing; -inf on the teacher's side alone makes the reverse KL infinite."""
    student, teacher = randn(2, 6), randn(2, 6)
    both = [torch.cat([x, torch.full((2, 3), -math.inf, dtype=x.dtype)], 1) for x in (student, teacher)]
    out, expected = (
        linear_divergence(
            torch.zeros(1, 1).double(),
            torch.zeros(s.shape[1], 1).double(),
            torch.zeros(1, 1).double(),
            torch.zeros(s.shape[1], 1).double(),
            torch.tensor([0]),
            student_bias_V=s[0],
            teacher_bias_V=t[0],
            top_k=3,
        )
        for s, t in (both, (student, teacher))
    )
    for got, value in zip(out, expected, strict=True):
        torch.testing.assert_close(got, value, rtol=1e-12, atol=1e-14)
    eye = torch.zeros(1, 1).double()
    bias = student[0].clone()
    bias[int(student[0].argmin())] = -math.inf
    one_sided = linear_divergence(
        eye,
        torch.zeros(6, 1).double(),
        eye,
        torch.zeros(6, 1).double(),
        student_bias_V=student[0],
        teacher_bias_V=bias,
        top_k=3,
    )
    assert one_sided.kl_student_teacher_T.item() == math.inf
    # The teacher is the student without its least likely token: KL(teacher || student) = -log(1 - p_min).
    assert one_sided.kl_teacher_student_T.item() == pytest.approx(-math.log1p(-student[0].softmax(-1).min().item()))


@pytest.mark.parametrize("spoiled", ["student", "teacher"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_hidden_states_that_are_not_finite(spoiled, bad, randn, randint) -> None:
    """An error where the token counts, nothing where it is masked."""
    hidden = {"student": randn(3, 5), "teacher": randn(3, 5)}
    heads, target = (randn(17, 5), randn(17, 5)), randint(17, 3)
    hidden[spoiled][1, 2] = bad
    args = hidden["student"], heads[0], hidden["teacher"], heads[1], target
    with pytest.raises(ValueError, match=rf"{spoiled}_hidden_TD must be finite, row 1 .* holds \[{bad}\]"):
        linear_divergence(*args)
    mask = torch.tensor([True, False, True])
    out = linear_divergence(*args, mask_T=mask)
    expected = linear_divergence(hidden["student"][mask], heads[0], hidden["teacher"][mask], heads[1], target[mask])
    for got, value in zip(out, expected, strict=True):
        assert got[1] == 0
        torch.testing.assert_close(got[mask], value, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("spoiled", ["student", "teacher"])
@pytest.mark.parametrize("where", ["weight", "bias"])
def test_nan_in_nan_out(spoiled, where, exact_backend, randn, randint) -> None:
    """NaN in a head spoils every token: no number comes out of it, and none of the other head's is lost."""
    dtype = exact_backend.dtype
    hidden, target = randn(3, 5, dtype=dtype), randint(17, 3)
    heads = {
        name: {"weight": randn(17, 5, dtype=dtype), "bias": randn(17, dtype=dtype)} for name in ("student", "teacher")
    }
    heads[spoiled][where][3] = math.nan
    student, teacher = heads["student"], heads["teacher"]
    out = linear_divergence(
        hidden,
        student["weight"],
        hidden,
        teacher["weight"],
        target,
        student_bias_V=student["bias"],
        teacher_bias_V=teacher["bias"],
    )
    untouched = "teacher" if spoiled == "student" else "student"
    for name, column in out._asdict().items():
        expected = not name.startswith(untouched)
        assert column.isnan().tolist() == [expected] * 3, name


def test_no_target_no_log_probs(randn) -> None:
    out = linear_divergence(randn(3, 5), randn(17, 5), randn(3, 5), randn(17, 5))
    assert out.student_logp_T is None
    assert out.teacher_logp_T is None
    assert out.delta_T is None
    assert out.overlap_T.shape == (3,)


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_few_tokens(num_tokens, randn, randint) -> None:
    hidden, weight, teacher = randn(num_tokens, 5), randn(17, 5), randn(17, 5)
    out = linear_divergence(hidden, weight, hidden, teacher, randint(17, num_tokens))
    expected = reference.linear_divergence(hidden, weight, hidden, teacher, out.student_logp_T.long() * 0)
    assert all(column.shape == (num_tokens,) for column in out)
    torch.testing.assert_close(out.kl_student_teacher_T, expected.kl_student_teacher_T)


def test_no_logits_beyond_a_chunk(watch, randn, randint) -> None:
    num_tokens, vocab_size, chunk = 512, 1000, 8
    hidden, weight = randn(num_tokens, 4).requires_grad_(), randn(vocab_size, 4).requires_grad_()
    with watch:
        out = linear_divergence(hidden, weight, hidden, weight, randint(vocab_size, num_tokens), chunk_tokens=chunk)
        out.symmetric_kl_T.sum().backward()
    assert watch.num_elements == chunk * vocab_size


def test_what_has_a_gradient(randn, randint) -> None:
    """The teacher is a constant, the counts have no slope."""
    student, teacher = (randn(3, 5), randn(17, 5)), (randn(3, 5), randn(17, 5))
    for x in (*student, *teacher):
        x.requires_grad_()
    out = linear_divergence(*student, *teacher, randint(17, 3))
    constant = {"teacher_logp_T", "overlap_T", "sum_min_T", "teacher_entropy_T"}
    assert {name for name, column in out._asdict().items() if not column.requires_grad} == constant
    sum(column.sum() for column in out if column.requires_grad).backward()
    assert all(x.grad is None for x in teacher)
    assert all(x.grad.norm() > 0 for x in student)


def test_mixed_dtypes(randn) -> None:
    hidden, weight = randn(3, 5, dtype=torch.bfloat16), randn(17, 5, dtype=torch.bfloat16)
    assert linear_divergence(hidden, weight, hidden.float(), weight.float()).symmetric_kl_T.dtype == torch.float32
    assert linear_divergence(hidden, weight, hidden.double(), weight.double()).symmetric_kl_T.dtype == torch.float64
