"""One problem for every operation, and how far a result may be from the fp64 truth of the same rounded inputs."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import types
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import copd_kernels
import pytest
import torch
from copd_kernels import _backend, _products, reference
from copd_kernels._types import Head

OPS = ("linear_logprob", "linear_divergence", "linear_policy_loss", "topk_overlap")


class Backend(NamedTuple):
    """Dtype of the inputs, and who works on the rows: ATen, the best compiled code, one instruction set of it, or the
    GPU's kernels in Triton's interpreter."""

    name: str
    dtype: torch.dtype
    rows: str


BACKENDS = [
    Backend("fp64", torch.float64, "auto"),
    Backend("fp32-aten", torch.float32, "aten"),
    Backend("fp32-avx512", torch.float32, "avx512"),
    Backend("fp32-avx2", torch.float32, "avx2"),
    Backend("fp32-portable", torch.float32, "portable"),
    Backend("bf16", torch.bfloat16, "auto"),
    Backend("bf16-aten", torch.bfloat16, "aten"),
    Backend("fp16", torch.float16, "auto"),
    Backend("fp32-triton", torch.float32, "triton"),
    Backend("bf16-triton", torch.bfloat16, "triton"),
]


class InterpretedDriver:
    """The GPU's driver on tensors of the CPU. The interpreter takes its time per program, not per number: tiles grow
    with the problem, and remain two; more of them are in test_gpu_statistics.py."""

    def __getattr__(self, name: str) -> Any:
        def call(head: Head, *args: Any, **options: Any) -> Any:
            with interpreter_tiles(head.hidden_TD.shape[0], head.weight_VD.shape[0]):
                return getattr(importlib.import_module("copd_kernels.gpu.driver"), name)(head, *args, **options)

        return call


@contextlib.contextmanager
def interpreter_tiles(num_tokens: int, vocab_size: int) -> Iterator[None]:
    configs, topk = (importlib.import_module(f"copd_kernels.gpu.{name}") for name in ("configs", "topk"))
    block_t = next((size for size in (4, 16) if num_tokens <= size * size), 16_384)
    # 65,536 by 16 of D is the interpreter's largest tile.
    block_v = next((size for size in (2**n for n in range(5, 16)) if vocab_size <= 2 * size), 65_536)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(configs, "_INTERPRETER_TILES", configs.Tiles(block_t, block_v, 16, 1, 1))
        patch.setattr(configs, "_INTERPRETER_ROW_BLOCKS", configs.RowBlocks(block_t, 1))
        patch.setattr(configs, "_INTERPRETER_MERGE_BLOCKS", configs.MergeBlocks(4, block_t, 1))
        patch.setattr(topk, "_INTERPRETER_TILES", configs.Tiles(block_t, block_v, 16, 1, 1))
        yield


@contextlib.contextmanager
def rows_by(rows: str) -> Iterator[None]:
    """Compute with these row operations; skip the test where the library or the CPU has them not."""
    if rows == "aten":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_products, "row_ops", lambda dtype: _products._ATEN_ROWS)
            yield
        return
    if rows == "auto":
        yield
        return
    if rows == "triton":
        pytest.importorskip("triton", reason="Triton is not installed (extra gpu)")
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("on a machine with a GPU the kernels run there: test_gpu_device.py")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_backend, "driver", lambda device: InterpretedDriver())
            kernels = importlib.import_module("copd_kernels.gpu.surrogate")
            patch.setattr(_backend, "surrogate", lambda device: kernels.surrogate)
            yield
        return
    if not hasattr(torch.ops.copd_kernels, "set_isa"):
        pytest.skip("the compiled row operations were not built")
    try:
        torch.ops.copd_kernels.set_isa(rows)
    except ValueError as error:
        pytest.skip(str(error))
    try:
        yield
    finally:
        torch.ops.copd_kernels.set_isa("auto")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """A student and a teacher near it, targets, and per-token numbers for the policy loss."""

    num_tokens: int
    hidden_size: int
    vocab_size: int
    # The teacher's weight may have other padding than the student's; the options then hold the real size.
    teacher_vocab_size: int | None = None
    gap: float = 0.1
    scale: float = 1.0
    student_bias: bool = True
    divergence: str = "reverse_kl"
    kl_estimator: str = "k3"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def tensors(self, dtype: torch.dtype) -> SimpleNamespace:
        """Inputs rounded to ``dtype``, the same for every backend up to that rounding."""
        generator = torch.Generator().manual_seed(0)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        num_tokens, size, vocab = self.num_tokens, self.hidden_size, self.vocab_size
        teacher_vocab = self.teacher_vocab_size or vocab
        common = self.options.get("vocab_size", vocab)
        hidden, weight = randn(num_tokens, size), self.scale * randn(vocab, size) / size**0.5
        teacher = randn(teacher_vocab, size)
        # Close to the student where both exist.
        shared = min(vocab, teacher_vocab)
        teacher[:shared] = weight[:shared] + self.gap * self.scale * teacher[:shared] / size**0.5
        inputs = SimpleNamespace(
            student=Head(
                *(x.to(dtype) for x in (hidden, weight)), randn(vocab).to(dtype) if self.student_bias else None
            ),
            teacher=Head((hidden + self.gap * randn(num_tokens, size)).to(dtype), teacher.to(dtype), None),
            target=torch.randint(common, (num_tokens,), generator=generator),
            upstream=torch.rand(8, num_tokens, generator=generator, dtype=torch.float64) + 0.5,
        )
        # Ratios away from the bounds of the clip, where rounding would decide about the whole gradient of a token.
        ratio = torch.tensor([0.5, 0.9, 1.1, 1.6], dtype=torch.float64)[torch.arange(num_tokens) % 4]
        exact = Head(*(None if x is None else x.double() for x in inputs.student))
        known = {k: v for k, v in self.options.items() if k != "chunk_tokens"}
        logp = reference.linear_logprob(*exact[:2], inputs.target, bias_V=exact.bias_V, **known).logp_T
        stored = torch.float64 if dtype == torch.float64 else torch.float32
        inputs.per_token = {
            "advantage_T": randn(num_tokens),
            "old_logp_T": logp - ratio.log(),
            "loss_weight_T": torch.rand(num_tokens, generator=generator),
            "reference_logp_T": logp + 0.3 * randn(num_tokens),
            "kl_weight_T": torch.rand(num_tokens, generator=generator),
            "divergence_weight_T": torch.rand(num_tokens, generator=generator),
        }
        inputs.per_token = {name: x.to(stored) for name, x in inputs.per_token.items()}
        return inputs


class Result(NamedTuple):
    """Named per-token outputs, and gradients of a weighted sum of all that is differentiable."""

    values: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]


_DIFFERENTIABLE = {
    "linear_logprob": ("logp_T", "entropy_T", "lse_T"),
    "linear_divergence": (
        "student_logp_T",
        "kl_student_teacher_T",
        "kl_teacher_student_T",
        "symmetric_kl_T",
        "student_entropy_T",
        "delta_T",
        "jsd_T",
    ),
    "linear_policy_loss": ("loss",),
    "topk_overlap": (),
}


def call(op: str, module: types.ModuleType, problem: Problem, inputs: SimpleNamespace, student: Head) -> dict[str, Any]:
    """The operation of ``module`` (copd_kernels or reference); its outputs by name."""
    options = dict(problem.options)
    if module is reference:
        options.pop("chunk_tokens", None)
    teacher = inputs.teacher
    function = getattr(module, op)
    if op == "linear_logprob":
        return function(*student[:2], inputs.target, bias_V=student.bias_V, **options)._asdict()
    pair, biases = (*student[:2], *teacher[:2]), {"student_bias_V": student.bias_V, "teacher_bias_V": teacher.bias_V}
    top_k = min(4, options.get("vocab_size", problem.vocab_size))
    if op == "linear_divergence":
        return function(*pair, inputs.target, **biases, top_k=top_k, jsd_beta=0.3, **options)._asdict()
    if op == "topk_overlap":
        options = {k: v for k, v in options.items() if k not in ("temperature", "softcap")}
        return {"overlap_T": function(*pair, **biases, top_k=top_k, **options)}
    out = function(
        *student[:2],
        inputs.target,
        bias_V=student.bias_V,
        teacher_hidden_TD=teacher.hidden_TD,
        teacher_weight_VD=teacher.weight_VD,
        teacher_bias_V=teacher.bias_V,
        divergence=problem.divergence,
        kl_estimator=problem.kl_estimator,
        jsd_beta=0.3,
        top_k=top_k,
        **inputs.per_token,
        **options,
    )._asdict()
    return out | {f"teacher {name}": x for name, x in out.pop("teacher")._asdict().items() if x is not None}


def run(op: str, module: types.ModuleType, problem: Problem, inputs: SimpleNamespace) -> Result:
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in inputs.student]
    values = call(op, module, problem, inputs, Head(*leaves))
    loss = sum(
        (values[name].double() * (weight if values[name].dim() else 1.7)).sum()
        for name, weight in zip(_DIFFERENTIABLE[op], inputs.upstream, strict=False)
    )
    gradients = {}
    if isinstance(loss, torch.Tensor):
        loss.backward()
        named = zip(("hidden", "weight", "bias"), leaves, strict=True)
        gradients = {name: x.grad for name, x in named if x is not None}
    return Result({name: x.detach() for name, x in values.items()}, gradients)


def to_fp64(inputs: SimpleNamespace) -> SimpleNamespace:
    """The same numbers in fp64."""

    def cast(head: Head) -> Head:
        return Head(*(None if x is None else x.double() for x in head))

    per_token = {name: x.double() for name, x in inputs.per_token.items()}
    return SimpleNamespace(
        student=cast(inputs.student),
        teacher=cast(inputs.teacher),
        target=inputs.target,
        upstream=inputs.upstream,
        per_token=per_token,
    )


# Relative Frobenius error of dH, dW and db. fp32: section 3 of the specification. bf16 and fp16: the gradient is
# rounded once, to 8 and 11 bits, on its way out; the specification allows 4e-3 for bf16, and fp16 has 3 bits more.
GRADIENT_BOUND = {torch.float64: 1e-11, torch.float32: 5e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}

# On a GPU the gradient of the logits is rounded to bf16 as well, and the interpreter cuts off instead of rounding. Of
# the few numbers of these problems each can come out at its worst; test_gpu_gradient.py holds half of this on more of
# them, and test_gpu_device.py the bound above on a GPU.
TRITON_GRADIENT_BOUND = GRADIENT_BOUND | {torch.bfloat16: 1e-2}


def bound_of(name: str, true: torch.Tensor, lse: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """How far a value may be from the truth. Inputs of 16 bits count as the fp32 numbers that they are."""
    name = name.removeprefix("teacher ")
    if dtype == torch.float64:
        return 1e-11 * (true.abs() + lse.abs().clamp(min=1))
    if name in ("lse_T", "entropy_T", "student_entropy_T", "teacher_entropy_T"):
        # Section 3: absolute, relative to the size of the log-sum.
        return 5e-6 * lse.abs().clamp(min=1)
    if name in ("logp_T", "student_logp_T", "teacher_logp_T", "delta_T"):
        # A logit less the log-sum: the logit of an unlikely target may be the larger of the two.
        return 5e-6 * (true.abs() + lse.abs()).clamp(min=1)
    if name in ("kl_student_teacher_T", "kl_teacher_student_T", "symmetric_kl_T", "jsd_T"):
        # Section 3: 1e-4 of the value down to 1e-5; below that 1e-9.
        return (1e-4 * true.abs()).clamp(min=1e-9)
    if name == "sum_min_T":
        return torch.full_like(true, 2e-6)
    if name in ("overlap_T", "clipped_T") or name.startswith("num_"):
        return torch.zeros_like(true)
    # The ratio and what is made of it: d rho = rho d logp.
    if name == "loss":
        return 2e-5 * (1 + true.abs()) * max(1, lse.numel())
    return 2e-5 * (1 + true.abs()) * lse.abs().clamp(min=1)


def check(op: str, problem: Problem, backend: Backend) -> Result:
    """Values and gradients of the operation against the truth; the result, for what else a test wants of it."""
    dtype = backend.dtype
    gradient_bound = TRITON_GRADIENT_BOUND[dtype] if backend.rows == "triton" else GRADIENT_BOUND[dtype]
    inputs = problem.tensors(dtype)
    exact = to_fp64(inputs)
    got, true = run(op, copd_kernels, problem, inputs), run(op, reference, problem, exact)
    known = {k: v for k, v in problem.options.items() if k != "chunk_tokens"}
    lse = reference.linear_logprob(*exact.student[:2], exact.target, bias_V=exact.student.bias_V, **known).lse_T
    assert got.values.keys() == true.values.keys()
    for name, value in got.values.items():
        expected = true.values[name].double()
        bound = bound_of(name, expected, lse, dtype)
        error = (value.double() - expected).abs()
        assert value.shape == expected.shape, name
        wrong = ~(error <= bound)
        assert not wrong.any(), (
            f"{name}: {value[wrong][:3]} for {expected[wrong][:3]}" if value.dim() else (name, error)
        )
        if name.endswith("logp_T"):
            assert (value <= 0).all(), name
        if "kl_" in name and "student" in name:
            assert (value >= 0).all(), name
    for name, gradient in got.gradients.items():
        expected = true.gradients[name]
        assert gradient.dtype == inputs.student[("hidden", "weight", "bias").index(name)].dtype
        assert gradient.isfinite().all(), name
        error = float((gradient.double() - expected).norm())
        # Every gradient is a sum over tokens and entries of both signs; where it is nothing but rounding (a vocabulary
        # of one, a masked batch), the floor counts.
        assert error <= gradient_bound * float(expected.norm()) + 1e-7 * inputs.target.numel() ** 0.5, (
            name,
            error / float(expected.norm()),
        )
    return got
