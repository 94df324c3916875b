"""The reference, which every operation is judged by: its gradients against finite differences, and numbers by hand."""

from __future__ import annotations

import math

import pytest
import torch
from copd_kernels import reference
from copd_kernels._types import Head

from tests.kernels.problems import _DIFFERENTIABLE, OPS, Problem, call

PLAIN = Problem(num_tokens=5, hidden_size=3, vocab_size=7, gap=0.4)
EVERYTHING = Problem(
    num_tokens=5,
    hidden_size=3,
    vocab_size=9,
    teacher_vocab_size=11,
    gap=0.4,
    options={
        "vocab_size": 8,
        "mask_T": torch.tensor([True, False, True, True, True]),
        "temperature": 0.7,
        "softcap": 4.0,
    },
)


@pytest.mark.parametrize("problem", [PLAIN, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("op", [op for op in OPS if _DIFFERENTIABLE[op]])
def test_gradcheck(op: str, problem: Problem) -> None:
    """Every differentiable output with respect to hidden states, weight and bias."""
    inputs = problem.tensors(torch.float64)
    leaves = tuple(x.clone().requires_grad_() for x in inputs.student)

    def outputs(*student: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values = call(op, reference, problem, inputs, Head(*student))
        return tuple(values[name] for name in _DIFFERENTIABLE[op])

    assert torch.autograd.gradcheck(outputs, leaves)


def test_numbers_by_hand() -> None:
    """Two tokens to choose from, the student at 3/4 : 1/4 and the teacher at 1/2 : 1/2."""
    hidden, target = torch.ones(1, 1, dtype=torch.float64), torch.tensor([1])
    student = torch.tensor([[math.log(3)], [0.0]], dtype=torch.float64)
    teacher = torch.zeros(2, 1, dtype=torch.float64)
    scores = reference.linear_logprob(hidden, student, target)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert [x.item() for x in scores] == pytest.approx([math.log(0.25), entropy, math.log(4)])
    out = reference.linear_divergence(hidden, student, hidden, teacher, target, top_k=1, jsd_beta=0.5)
    kl, kl_back = 0.75 * math.log(1.5) + 0.25 * math.log(0.5), 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
    mixture = 0.75 * math.log(0.75 / 0.625) + 0.25 * math.log(0.25 / 0.375)
    mixture += 0.5 * math.log(0.5 / 0.625) + 0.5 * math.log(0.5 / 0.375)
    expected = {
        "kl_student_teacher_T": kl,
        "kl_teacher_student_T": kl_back,
        "symmetric_kl_T": kl + kl_back,
        "jsd_T": mixture / 2,
        "sum_min_T": 0.75,
        "overlap_T": 1.0,
        "delta_T": math.log(0.25) - math.log(0.5),
        "teacher_entropy_T": math.log(2),
    }
    assert {name: getattr(out, name).item() for name in expected} == pytest.approx(expected)
