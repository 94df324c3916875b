"""The problems of test_truth.py on a CUDA device, in bf16, fp32 and fp16, and the memory of the operations there.

Not run yet: without a GPU every test here is skipped. The kernels are tested in Triton's interpreter (test_gpu_*.py)
and compiled ahead of time (test_gpu_aot.py).
"""

from __future__ import annotations

from types import SimpleNamespace

import copd_kernels
import pytest
import torch
from copd_kernels import reference
from copd_kernels._types import Head

from tests.kernels.problems import GRADIENT_BOUND, OPS, Problem, bound_of, run, to_fp64
from tests.kernels.test_truth import PROBLEMS

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def on_device(inputs: SimpleNamespace) -> SimpleNamespace:
    def move(head: Head) -> Head:
        return Head(*(None if x is None else x.cuda() for x in head))

    return SimpleNamespace(
        student=move(inputs.student),
        teacher=move(inputs.teacher),
        target=inputs.target.cuda(),
        upstream=inputs.upstream.cuda(),
        per_token={name: x.cuda() for name, x in inputs.per_token.items()},
    )


def check(op: str, problem: Problem, dtype: torch.dtype) -> None:
    """Against fp64 on the CPU, of the same rounded inputs. Of small problems each of two roundings to bf16 can come out
    at its worst."""
    inputs = problem.tensors(dtype)
    exact = to_fp64(inputs)
    options = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in problem.options.items()}
    moved = Problem(**{**vars(problem), "options": options})
    got = run(op, copd_kernels, moved, on_device(inputs))
    true = run(op, reference, problem, exact)
    known = {k: v for k, v in problem.options.items() if k != "chunk_tokens"}
    lse = reference.linear_logprob(*exact.student[:2], exact.target, bias_V=exact.student.bias_V, **known).lse_T
    for name, value in got.values.items():
        expected = true.values[name].double()
        assert ((value.cpu().double() - expected).abs() <= bound_of(name, expected, lse, dtype)).all(), name
    is_small = problem.num_tokens * problem.vocab_size < 100_000
    for name, gradient in got.gradients.items():
        expected = true.gradients[name]
        error = float((gradient.cpu().double() - expected).norm())
        bound = GRADIENT_BOUND[dtype] * (2 if is_small and dtype != torch.float32 else 1)
        assert error <= bound * float(expected.norm()) + 1e-7 * problem.num_tokens**0.5, (name, error)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_values_and_gradients(op, name, dtype) -> None:
    check(op, PROBLEMS[name], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_tiles_of_production(op, dtype) -> None:
    """Several tiles each way, D of several steps, descriptors where the GPU has them."""
    check(op, Problem(num_tokens=300, hidden_size=192, vocab_size=2051, options={"temperature": 0.8}), dtype)


@pytest.mark.parametrize("op", OPS)
def test_more_tokens_than_a_grid_has_rows(op) -> None:
    check(op, Problem(num_tokens=65_537, hidden_size=16, vocab_size=3), torch.bfloat16)


@pytest.mark.parametrize("op", OPS)
def test_vocabulary_of_a_quarter_million(op) -> None:
    check(op, Problem(num_tokens=3, hidden_size=16, vocab_size=250_007, gap=0.05), torch.bfloat16)


@pytest.mark.parametrize("mode", ["population", "sample", "none", "rloo"])
def test_group_advantages(mode, randn) -> None:
    rewards, ids = randn(40, dtype=torch.float32), torch.arange(40) // 7
    found = copd_kernels.group_advantages(rewards.cuda(), ids.cuda(), mode=mode)
    expected = reference.group_advantages(rewards.double(), ids, mode, 1e-6)
    torch.testing.assert_close(found.advantages_B.cpu().double(), expected[0], rtol=3e-7, atol=1e-7)
    assert torch.equal(found.zero_variance_B.cpu(), expected[1])


def policy_loss_peak_bytes(num_tokens: int, vocab_size: int, size: int, **options: bool) -> int:
    """Peak above the inputs of forward and backward, bf16."""
    generator = torch.Generator("cuda").manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    hidden, weight = randn(num_tokens, size).requires_grad_(), (0.05 * randn(vocab_size, size)).requires_grad_()
    teacher = weight.detach() + 0.01 * randn(vocab_size, size)
    target = torch.randint(vocab_size, (num_tokens,), generator=generator, device="cuda")
    ones = torch.ones(num_tokens, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = copd_kernels.linear_policy_loss(
        hidden,
        weight,
        target,
        teacher_hidden_TD=hidden.detach(),
        teacher_weight_VD=teacher,
        divergence_weight_T=ones,
        **options,
    )
    out.loss.backward()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def test_peak_memory_of_the_policy_loss() -> None:
    """One chunk of fp16 logits of two heads, dW in fp32 and in bf16; the low-memory plan without the chunk. Twice the
    tokens change nothing but the numbers per token."""
    vocab_size, size, chunk = 65_536, 512, 4096
    weight_bytes = vocab_size * size * (4 + 2)
    stored, twice = (policy_loss_peak_bytes(n, vocab_size, size) for n in (2 * chunk, 4 * chunk))
    assert stored <= 1.25 * (4 * chunk * vocab_size + weight_bytes)
    assert twice <= stored + 16 * 2 * chunk * (size + 64)
    low = policy_loss_peak_bytes(2 * chunk, vocab_size, size, low_memory=True)
    assert low <= 1.25 * (2 * chunk * 16_384 + weight_bytes + 48 * vocab_size / 64 * chunk)
    assert low < stored
