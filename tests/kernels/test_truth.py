"""Every operation on every backend against fp64, on the shapes that break kernels."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.problems import OPS, Backend, Problem, check


def _mask(num_tokens: int, *off: slice) -> torch.Tensor:
    mask = torch.ones(num_tokens, dtype=torch.bool)
    for part in off:
        mask[part] = False
    return mask


# The reason for each stands in its name. The tiles of the C++ rows and of the driver end at multiples of 2048.
PROBLEMS = {
    "odd": Problem(num_tokens=7, hidden_size=5, vocab_size=13),
    "prime": Problem(num_tokens=17, hidden_size=11, vocab_size=257, options={"chunk_tokens": 3}),
    "one token": Problem(num_tokens=1, hidden_size=3, vocab_size=101),
    "no token": Problem(num_tokens=0, hidden_size=5, vocab_size=7),
    "vocabulary of one": Problem(num_tokens=5, hidden_size=4, vocab_size=1),
    "vocabulary of two": Problem(num_tokens=6, hidden_size=4, vocab_size=2, options={"temperature": 0.5}),
    "one past a tile": Problem(num_tokens=9, hidden_size=6, vocab_size=2049),
    "three tiles and a bit": Problem(
        num_tokens=9, hidden_size=6, vocab_size=6151, gap=0.05, options={"temperature": 1.3, "chunk_tokens": 4}
    ),
    "temperature": Problem(num_tokens=9, hidden_size=6, vocab_size=61, options={"temperature": 0.6}),
    "softcap": Problem(num_tokens=9, hidden_size=6, vocab_size=61, scale=4, options={"softcap": 3.0}),
    "softcap and temperature": Problem(
        num_tokens=9, hidden_size=6, vocab_size=61, scale=4, options={"softcap": 5.0, "temperature": 0.7}
    ),
    "no bias": Problem(num_tokens=9, hidden_size=6, vocab_size=61, student_bias=False),
    "teacher with more padding": Problem(
        num_tokens=9, hidden_size=6, vocab_size=61, teacher_vocab_size=80, options={"vocab_size": 59}
    ),
    "student with more padding": Problem(
        num_tokens=9, hidden_size=6, vocab_size=2100, teacher_vocab_size=2060, options={"vocab_size": 2060}
    ),
    "masked": Problem(
        num_tokens=11, hidden_size=5, vocab_size=23, options={"mask_T": _mask(11, slice(0, 1), slice(4, 7))}
    ),
    "a chunk all masked": Problem(
        num_tokens=12, hidden_size=5, vocab_size=23, options={"mask_T": _mask(12, slice(4, 8)), "chunk_tokens": 4}
    ),
    "all masked": Problem(num_tokens=6, hidden_size=5, vocab_size=23, options={"mask_T": _mask(6, slice(0, 6))}),
    "policies far apart": Problem(num_tokens=9, hidden_size=6, vocab_size=61, gap=3.0),
    "policies close": Problem(num_tokens=9, hidden_size=6, vocab_size=2111, gap=0.02),
    "one-hot rows": Problem(num_tokens=9, hidden_size=6, vocab_size=61, scale=30.0, gap=0.3),
    "everything": Problem(
        num_tokens=13,
        hidden_size=7,
        vocab_size=2203,
        teacher_vocab_size=2300,
        scale=2,
        options={
            "vocab_size": 2199,
            "mask_T": _mask(13, slice(2, 3), slice(8, 11)),
            "temperature": 0.8,
            "softcap": 6.0,
            "chunk_tokens": 5,
        },
    ),
}


def _skip_repeats(backend: Backend) -> None:
    """The interpreter is slow, and what bf16 changes on a GPU is in the other problems and in test_gpu_gradient.py."""
    if backend.name == "bf16-triton":
        pytest.skip("by fp32-triton")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_values_and_gradients(op: str, name: str, backend: Backend) -> None:
    check(op, PROBLEMS[name], backend)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "symmetric_kl", "jsd"])
@pytest.mark.parametrize("kl_estimator", ["k1", "k2", "k3"])
def test_terms_of_the_policy_loss(divergence: str, kl_estimator: str, backend: Backend) -> None:
    _skip_repeats(backend)
    problem = Problem(
        num_tokens=9,
        hidden_size=6,
        vocab_size=97,
        divergence=divergence,
        kl_estimator=kl_estimator,
        options={"temperature": 0.9, "softcap": 8.0, "chunk_tokens": 4},
    )
    check("linear_policy_loss", problem, backend)


@pytest.mark.parametrize("op", OPS)
def test_more_tokens_than_a_grid_has_rows(op: str, backend: Backend) -> None:
    """65,537 tokens: one more than the second dimension of a GPU's grid takes, and many chunks."""
    _skip_repeats(backend)
    # The interpreter takes its time per program: three chunks instead of 33.
    options = {"chunk_tokens": 30_000} if backend.rows == "triton" else {}
    check(op, Problem(num_tokens=65_537, hidden_size=2, vocab_size=3, options=options), backend)


@pytest.mark.parametrize("op", OPS)
def test_vocabulary_of_a_quarter_million(op: str, backend: Backend) -> None:
    _skip_repeats(backend)
    check(op, Problem(num_tokens=3, hidden_size=4, vocab_size=250_007, gap=0.05), backend)
