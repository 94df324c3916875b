"""Two problems for every operation, and leaves to differentiate with respect to."""

from __future__ import annotations

import pytest
import torch
from copd_kernels._types import Head

from tests.kernels.problems import OPS, Problem

DIFFERENTIABLE_OPS = OPS[:3]
# One differentiable output of each.
COLUMN = {
    "linear_logprob": "logp_T",
    "linear_divergence": "kl_student_teacher_T",
    "linear_policy_loss": "loss",
}
# Each gives gradients apart, so that a wrong saved tensor cannot hide.
EVERYTHING = Problem(
    num_tokens=9,
    hidden_size=6,
    vocab_size=61,
    teacher_vocab_size=70,
    divergence="jsd",
    options={
        "mask_T": torch.arange(9) % 4 != 2,
        "vocab_size": 59,
        "temperature": 0.8,
        "softcap": 5.0,
        "chunk_tokens": 4,
    },
)
PLAIN = Problem(num_tokens=9, hidden_size=6, vocab_size=61, student_bias=False)
every_op = pytest.mark.parametrize("op", OPS)
every_differentiable_op = pytest.mark.parametrize("op", DIFFERENTIABLE_OPS)


def leaves_of(head: Head, frozen: tuple[bool, bool, bool] = (False, False, False)) -> Head:
    return Head(
        *(
            None if x is None else x.detach().clone().requires_grad_(not off)
            for x, off in zip(head, frozen, strict=True)
        )
    )


def given(head: Head) -> list[torch.Tensor]:
    return [x for x in head if x is not None]


def total(op: str, outputs: dict[str, torch.Tensor], upstream: torch.Tensor) -> torch.Tensor:
    """A weighted sum of all that is differentiable."""
    columns = [column for name, column in sorted(outputs.items()) if column.requires_grad]
    return sum((column * upstream[i, : column.numel()].to(column.dtype)).sum() for i, column in enumerate(columns))
