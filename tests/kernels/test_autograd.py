"""Every operation under autocast and autograd: second backward, determinism, second derivatives, transforms, ties.

Numbers are compared bitwise where the same code runs twice, and against fp64 where it does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import copd_kernels
import pytest
import torch
from copd_kernels import reference
from copd_kernels._types import Head

from tests.kernels.op_cases import (
    COLUMN,
    DIFFERENTIABLE_OPS,
    EVERYTHING,
    PLAIN,
    every_differentiable_op,
    every_op,
    given,
    leaves_of,
    total,
)
from tests.kernels.problems import GRADIENT_BOUND, OPS, Problem, call, run, to_fp64


@pytest.mark.parametrize("backward_inside", [True, False])
@pytest.mark.parametrize("problem", [EVERYTHING, PLAIN], ids=["everything", "plain"])
@every_op
def test_autocast(op: str, problem: Problem, backward_inside: bool) -> None:
    """The bits of bf16 inputs; gradients in the dtype of the parameters. Nothing inside is rounded a second time."""
    inputs = problem.tensors(torch.float32)
    rounded = problem.tensors(torch.bfloat16)
    rounded.target, rounded.per_token, rounded.upstream = inputs.target, inputs.per_token, inputs.upstream
    rounded.student = rounded.student._replace(bias_V=inputs.student.bias_V)
    leaves, bf16_leaves = leaves_of(inputs.student), leaves_of(rounded.student)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = call(op, copd_kernels, problem, inputs, leaves)
        loss = total(op, outputs, inputs.upstream) if op in DIFFERENTIABLE_OPS else None
        if backward_inside and loss is not None:
            loss.backward()
    if not backward_inside and loss is not None:
        loss.backward()
    expected = call(op, copd_kernels, problem, rounded, bf16_leaves)
    for name, column in expected.items():
        assert torch.equal(outputs[name], column), name
    if loss is None:
        return
    total(op, expected, inputs.upstream).backward()
    for got, bf16 in zip(given(leaves), given(bf16_leaves), strict=True):
        assert got.grad.dtype == torch.float32
        assert torch.equal(got.grad, bf16.grad.float())


def test_autocast_leaves_fp64_alone() -> None:
    inputs = PLAIN.tensors(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        got = run("linear_divergence", copd_kernels, PLAIN, inputs)
    expected = run("linear_divergence", copd_kernels, PLAIN, inputs)
    for name, column in expected.values.items():
        assert torch.equal(got.values[name], column), name
    for name, gradient in expected.gradients.items():
        assert torch.equal(got.gradients[name], gradient), name


def test_autocast_beside_an_fp64_policy() -> None:
    """The bf16 head is projected by a plain product there, which autocast must not round to bf16 either."""
    inputs, other = PLAIN.tensors(torch.bfloat16), PLAIN.tensors(torch.float64)
    results = []
    for enabled in (True, False):
        hidden, weight = (x.clone().requires_grad_() for x in inputs.student[:2])
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = copd_kernels.linear_divergence(hidden, weight, *other.student[:2])
            out.symmetric_kl_T.sum().backward()
        results.append((out.symmetric_kl_T, hidden.grad, weight.grad))
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("problem", [EVERYTHING, PLAIN], ids=["everything", "plain"])
@every_differentiable_op
def test_second_backward(op: str, problem: Problem, dtype: torch.dtype) -> None:
    """Over the same graph, after the first gradients were overwritten and other operations took their memory."""
    inputs = problem.tensors(dtype)
    leaves = leaves_of(inputs.student)
    outputs = call(op, copd_kernels, problem, inputs, leaves)
    loss = total(op, outputs, inputs.upstream)
    before = {name: column.detach().clone() for name, column in outputs.items()}
    first = torch.autograd.grad(loss, given(leaves), retain_graph=True)
    expected = [gradient.clone() for gradient in first]
    for gradient in first:
        gradient.fill_(torch.nan)
    del first, gradient
    for other in OPS:
        run(other, copd_kernels, problem, problem.tensors(dtype))
    junk = [torch.full_like(x, torch.nan) for x in given(leaves) for _ in range(8)]
    for _ in range(2):
        again = torch.autograd.grad(loss, given(leaves), retain_graph=True)
        for got, value in zip(again, expected, strict=True):
            assert torch.equal(got, value)
        scaled = torch.autograd.grad(loss, given(leaves), grad_outputs=torch.full_like(loss, -2), retain_graph=True)
        for got, value in zip(scaled, expected, strict=True):
            torch.testing.assert_close(
                got.double(), -2 * value.double(), rtol=1e-2 if dtype.itemsize == 2 else 1e-5, atol=0
            )
    del junk
    for name, column in outputs.items():
        assert torch.equal(column, before[name]), name


@every_differentiable_op
def test_backward_adds_to_a_gradient(op: str) -> None:
    """Two backward passes of two graphs into one ``.grad``: a gradient that was given away is not written again."""
    inputs = PLAIN.tensors(torch.float64)
    leaves = leaves_of(inputs.student)
    losses = [total(op, call(op, copd_kernels, PLAIN, inputs, leaves), inputs.upstream) for _ in range(2)]
    once = torch.autograd.grad(losses[0], given(leaves), retain_graph=True)
    for loss in (losses[1], losses[0]):
        loss.backward()
    for leaf, value in zip(given(leaves), once, strict=True):
        torch.testing.assert_close(leaf.grad, 2 * value, rtol=1e-13, atol=0)


@pytest.fixture
def _threads() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_threads", [1, 2])
@every_op
def test_bitwise_the_same_on_a_second_run(op: str, num_threads: int, dtype: torch.dtype) -> None:
    """Large enough that two threads share the rows; several chunks and several tiles of the vocabulary."""
    torch.set_num_threads(num_threads)
    problem = Problem(num_tokens=40, hidden_size=8, vocab_size=4999, options={"chunk_tokens": 17, "temperature": 0.9})
    inputs = problem.tensors(dtype)
    first = run(op, copd_kernels, problem, inputs)
    for _ in range(2):
        again = run(op, copd_kernels, problem, inputs)
        for got, expected in ((again.values, first.values), (again.gradients, first.gradients)):
            assert got.keys() == expected.keys()
            for name, value in expected.items():
                assert torch.equal(got[name], value), name


@every_differentiable_op
def test_second_derivatives_raise(op: str) -> None:
    """They are not implemented. Beside a term that has some, a gradient without graph would pass for a constant."""
    inputs = EVERYTHING.tensors(torch.float64)
    leaves = leaves_of(inputs.student)
    hidden = leaves.hidden_TD
    loss = call(op, copd_kernels, EVERYTHING, inputs, leaves)[COLUMN[op]].sum() + hidden.square().sum()

    def differentiate_twice() -> None:
        (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
        torch.autograd.grad(gradient.square().sum(), hidden)

    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        differentiate_twice()


@every_differentiable_op
def test_create_graph_gives_the_same_first_derivative(op: str) -> None:
    inputs = EVERYTHING.tensors(torch.float64)
    results = []
    for create_graph in (False, True):
        leaves = leaves_of(inputs.student)
        loss = total(op, call(op, copd_kernels, EVERYTHING, inputs, leaves), inputs.upstream)
        results.append(torch.autograd.grad(loss, given(leaves), create_graph=create_graph))
    for expected, got in zip(*results, strict=True):
        assert torch.equal(got.detach(), expected)


@every_differentiable_op
def test_functional_transforms(op: str) -> None:
    """Each raises or is right: vmap maps, forward mode and functional reverse mode are not there."""
    inputs = EVERYTHING.tensors(torch.float64)
    hidden = inputs.student.hidden_TD

    def function(hidden_TD: torch.Tensor) -> torch.Tensor:
        return call(op, copd_kernels, EVERYTHING, inputs, inputs.student._replace(hidden_TD=hidden_TD))[
            COLUMN[op]
        ].sum()

    mapped = torch.func.vmap(function)(torch.stack([hidden, hidden / 2]))
    torch.testing.assert_close(mapped, torch.stack([function(hidden), function(hidden / 2)]), rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="hidden_TD must not carry a forward-mode tangent"):
        torch.func.jvp(function, (hidden,), (torch.ones_like(hidden),))
    for transform in (torch.func.grad, torch.func.jacrev):
        with pytest.raises(RuntimeError, match="setup_context"):
            transform(function)(hidden)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@every_differentiable_op
def test_tied_weights(op: str, dtype: torch.dtype) -> None:
    """Hidden states made from the embedding that is the lm_head: its gradient is the sum of both ways, against fp64."""
    problem = Problem(num_tokens=9, hidden_size=6, vocab_size=61, options={"temperature": 0.8})
    inputs = problem.tensors(dtype)
    ids = torch.arange(9) * 5 % 61

    def gradient(module: Any, tensors: Any, embedding: torch.Tensor) -> torch.Tensor:
        shared = embedding.detach().clone().requires_grad_()
        # 2 and not 1: the gradient of the hidden states is a tensor of its own.
        hidden = 2 * torch.nn.functional.embedding(ids, shared)
        outputs = call(op, module, problem, tensors, Head(hidden, shared, tensors.student.bias_V))
        total(op, outputs, tensors.upstream).backward()
        return shared.grad

    got = gradient(copd_kernels, inputs, inputs.student.weight_VD)
    exact = to_fp64(inputs)
    expected = gradient(reference, exact, exact.student.weight_VD)
    assert got.dtype == dtype
    # Two gradients, each rounded, and their sum rounded again.
    bound = 3 * GRADIENT_BOUND[dtype]
    assert (got.double() - expected).norm() <= bound * expected.norm()
    # Each way alone is far off: the test sees both.
    for way in ("hidden", "weight"):
        alone = run(op, reference, problem, exact).gradients[way]
        assert alone.norm() > 0
