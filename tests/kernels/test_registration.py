"""Every operation as a citizen of torch: opcheck, compile, autocast, fake tensors, second backward, determinism.

Numbers are compared bitwise where the same code runs twice, and against fp64 where it does not.
"""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import copd_kernels
import pytest
import torch
from copd_kernels import group_advantages, reference
from copd_kernels._types import Head
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from tests.kernels.problems import GRADIENT_BOUND, OPS, Problem, call, run, to_fp64

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


def raw_arguments(
    op: str,
    *,
    bias: bool = True,
    teacher: bool = True,
    mask: bool = True,
    dtype: torch.dtype = torch.float32,
    requires_grad: bool = False,
    wanted: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Any, ...]:
    """Arguments of ``torch.ops.copd_kernels.<op>`` in the order of its schema."""
    problem = Problem(num_tokens=5, hidden_size=4, vocab_size=13, student_bias=bias, options={"vocab_size": 11})
    inputs = problem.tensors(dtype)
    student = leaves_of(inputs.student, (not requires_grad,) * 3)
    arguments = {
        "target_T": inputs.target if teacher or op != "linear_divergence" else None,
        "mask_T": torch.tensor([True, False, True, True, False]) if mask else None,
        "vocab_size": 11,
        "temperature": 0.8,
        "softcap": 5.0,
        "top_k": 3,
        "jsd_beta": 0.3,
        "chunk_tokens": 2,
        "clip_low": 0.2,
        "clip_high": 0.28,
        "kl_estimator": "k3",
        "divergence": "jsd",
        "low_memory": False,
        "wanted": [want and tensor is not None for want, tensor in zip(wanted, student, strict=True)],
        **inputs.per_token,
        # A positive loss: opcheck differentiates |loss|, and backward scales the gradients among the outputs in place,
        # so that the outputs which it compares afterwards would differ by a sign.
        "advantage_T": -inputs.per_token["advantage_T"].abs(),
    }
    for name, tensor in zip(Head._fields, student, strict=True):
        arguments[name] = arguments[f"student_{name}"] = tensor
    for name, tensor in zip(Head._fields, inputs.teacher, strict=True):
        arguments[f"teacher_{name}"] = tensor if teacher or op != "linear_policy_loss" else None
    if not teacher:
        arguments["divergence_weight_T"] = None
    schema = getattr(torch.ops.copd_kernels, op).default._schema
    if op.endswith("_backward"):
        forward = getattr(torch.ops.copd_kernels, op.removesuffix("_backward"))
        columns, *saved = forward(*(arguments[x.name] for x in forward.default._schema.arguments))
        names = [x.name for x in schema.arguments if x.name.startswith(("stats_", "second_"))]
        arguments |= dict(zip(names, saved, strict=True))
        generator = torch.Generator().manual_seed(3)
        upstream = torch.rand(columns.shape, generator=generator, dtype=columns.dtype)
        arguments |= {"grad_3T": upstream, "grad_FT": upstream}
    return tuple(arguments[x.name] for x in schema.arguments)


RAW_OPS = (
    "linear_logprob",
    "linear_logprob_backward",
    "linear_divergence",
    "linear_divergence_backward",
    "linear_policy_loss",
    "topk_overlap",
)


@pytest.mark.parametrize("full", [True, False], ids=["all arguments", "fewest arguments"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", RAW_OPS)
def test_opcheck(op: str, dtype: torch.dtype, full: bool) -> None:
    """Schema, autograd registration, fake tensors and AOT dispatch with dynamic shapes."""
    arguments = raw_arguments(
        op, bias=full, teacher=full, mask=full, dtype=dtype, requires_grad=op in DIFFERENTIABLE_OPS
    )
    torch.library.opcheck(getattr(torch.ops.copd_kernels, op).default, arguments)


def test_opcheck_of_group_advantages() -> None:
    rewards_B, ids_B = torch.tensor([0.0, 1.0, 1.0]), torch.tensor([0, 0, 1])
    for mode in ("population", "sample", "none", "rloo"):
        torch.library.opcheck(torch.ops.copd_kernels.group_advantages.default, (rewards_B, ids_B, mode, 1e-6))
    # Not the ATen body under another name.
    assert torch._C._dispatch_has_kernel_for_dispatch_key("copd_kernels::group_advantages", "CPU")


WANTED = [(True, True, True), (True, False, True), (False, True, False), (False, False, False)]


@pytest.mark.parametrize("op", RAW_OPS)
def test_fake_tensors(op: str) -> None:
    """Shape, dtype, stride and device of every output for every combination of optional arguments."""
    combinations = itertools.product(
        (True, False), (True, False), (True, False), WANTED, (torch.float32, torch.float64)
    )
    for bias, teacher, mask, wanted, dtype in combinations:
        arguments = raw_arguments(op, bias=bias, teacher=teacher, mask=mask, wanted=wanted, dtype=dtype)
        real = getattr(torch.ops.copd_kernels, op)(*arguments)
        with FakeTensorMode() as mode:
            fake_arguments = tree_map_only(torch.Tensor, mode.from_tensor, arguments)
            fake = getattr(torch.ops.copd_kernels, op)(*fake_arguments)
        real, fake = (out if isinstance(out, tuple) else (out,) for out in (real, fake))
        assert len(real) == len(fake)
        for i, (got, expected) in enumerate(zip(fake, real, strict=True)):
            case = (op, i, bias, teacher, mask, wanted, dtype)
            assert got.shape == expected.shape, case
            assert got.dtype == expected.dtype, case
            assert got.stride() == expected.stride(), case
            assert got.device == expected.device, case


def test_fake_tensors_with_one_fp64_policy() -> None:
    """Statistics are fp64 as soon as one of the two is."""
    student, teacher = (raw_arguments("linear_divergence", dtype=dtype) for dtype in (torch.float32, torch.float64))
    for first, second in ((student, teacher), (teacher, student)):
        arguments = (*first[:3], *second[3:6], *first[6:])
        real = torch.ops.copd_kernels.linear_divergence(*arguments)
        with FakeTensorMode() as mode:
            fake = torch.ops.copd_kernels.linear_divergence(*tree_map_only(torch.Tensor, mode.from_tensor, arguments))
        assert [x.dtype for x in real] == [x.dtype for x in fake] == [torch.float64] * 3


@pytest.fixture
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compare_with_eager(op: str, problem: Problem, dtype: torch.dtype, backend: str) -> None:
    inputs = problem.tensors(dtype)

    def function(*student: torch.Tensor | None) -> dict[str, torch.Tensor]:
        return call(op, copd_kernels, problem, inputs, Head(*student))

    results = []
    for form in (function, torch.compile(function, backend=backend, fullgraph=True)):
        leaves = leaves_of(inputs.student)
        outputs = form(*leaves)
        gradients = []
        if op in DIFFERENTIABLE_OPS:
            gradients = list(torch.autograd.grad(total(op, outputs, inputs.upstream), given(leaves)))
            assert all(gradient.norm() > 0 for gradient in gradients)
        results.append((outputs, gradients))
    (eager, eager_gradients), (compiled, compiled_gradients) = results
    assert eager.keys() == compiled.keys()
    for name, column in eager.items():
        assert column.requires_grad == compiled[name].requires_grad, name
        assert torch.equal(column, compiled[name]), name
    for got, expected in zip(compiled_gradients, eager_gradients, strict=True):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("problem", [EVERYTHING, PLAIN], ids=["everything", "plain"])
@every_op
def test_compile(op: str, problem: Problem) -> None:
    compare_with_eager(op, problem, torch.float32, "aot_eager")


@pytest.mark.usefixtures("_fresh_dynamo")
def test_compile_in_bf16() -> None:
    compare_with_eager("linear_policy_loss", EVERYTHING, torch.bfloat16, "aot_eager")


@pytest.mark.usefixtures("_fresh_dynamo")
def test_compile_follows_the_shape() -> None:
    """One dynamic graph for several numbers of tokens: the fake kernel must not have burnt one of them in."""
    inputs = [Problem(num_tokens=n, hidden_size=6, vocab_size=61).tensors(torch.float32) for n in (5, 7, 12)]
    graphs = []

    def count(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    def function(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return copd_kernels.linear_logprob(hidden, weight, target).logp_T

    compiled = torch.compile(function, backend=count, fullgraph=True, dynamic=True)
    for x in inputs:
        arguments = (x.student.hidden_TD, x.student.weight_VD, x.target)
        assert torch.equal(compiled(*arguments), function(*arguments))
    assert len(graphs) == 1


@pytest.mark.usefixtures("_fresh_dynamo")
def test_compile_with_inductor() -> None:
    try:
        subprocess.run(["c++", "--version"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("inductor needs a C++ compiler")
    problem = EVERYTHING
    inputs = problem.tensors(torch.float32)

    def step(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        # Something before and after for inductor to fuse with.
        outputs = call("linear_policy_loss", copd_kernels, problem, inputs, Head(hidden * 2, weight, bias))
        return outputs["loss"] * 3 + outputs["entropy_T"].sum()

    results = []
    for form in (step, torch.compile(step, fullgraph=True)):
        leaves = given(leaves_of(inputs.student))
        loss = form(*leaves)
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("mode", ["population", "rloo"])
def test_compile_of_group_advantages(mode: str) -> None:
    rewards_B, ids_B = torch.tensor([0.0, 1.0, 1.0, 4.0]), torch.tensor([0, 0, 0, 1])
    compiled = torch.compile(lambda r, i: group_advantages(r, i, mode=mode), backend="aot_eager", fullgraph=True)
    for got, expected in zip(compiled(rewards_B, ids_B), group_advantages(rewards_B, ids_B, mode=mode), strict=True):
        assert torch.equal(got, expected)


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
