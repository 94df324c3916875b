"""Every operation as a citizen of torch: opcheck, fake tensors, compile."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import copd_kernels
import pytest
import torch
from copd_kernels import group_advantages
from copd_kernels._types import Head
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from tests.kernels.op_cases import DIFFERENTIABLE_OPS, EVERYTHING, PLAIN, every_op, given, leaves_of, total
from tests.kernels.problems import Problem, call


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
