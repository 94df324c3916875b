"""Gradients of the logits by both plans, in Triton's interpreter, against fp64 formulas on the same rounded inputs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from copd_kernels import _rows, statistics
from copd_kernels._types import Gradients, Head

from tests.kernels.row_checks import COEFS

pytest.importorskip("triton", reason="Triton is not installed (extra gpu)")
driver = pytest.importorskip("copd_kernels.gpu.driver")
configs = pytest.importorskip("copd_kernels.gpu.configs")

BETA = 0.3
# The interpreter cuts fp32 off to bf16, which is twice the error of the rounding on a GPU; there it is 4e-3, section 3
# of the specification (test_gpu_device.py).
CUT_OFF = 5e-3
SCALE = {"temperature": 0.9, "softcap": 20.0}
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels were loaded for the GPU")


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Every ``torch.empty`` holds NaN, so that what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def large_tiles(monkeypatch) -> None:
    """For problems large enough that roundings average: the interpreter takes its time per program."""
    monkeypatch.setattr(configs, "_INTERPRETER_TILES", configs.Tiles(64, 512, 32, 1, 1))
    monkeypatch.setattr(configs, "_INTERPRETER_ROW_BLOCKS", configs.RowBlocks(64, 1))
    monkeypatch.setattr(configs, "_INTERPRETER_MERGE_BLOCKS", configs.MergeBlocks(4, 64, 1))


def heads(randn, dtype, gap: float, num_tokens=33, vocab_size=150, size=24) -> tuple[Head, Head]:
    """A student and a teacher near it in weights and hidden states, rounded to ``dtype``."""
    hidden, weight = randn(num_tokens, size), randn(vocab_size, size) * 2 / size**0.5
    teacher = weight + gap * randn(vocab_size, size) / size**0.5
    student = Head(hidden.to(dtype), weight.to(dtype), randn(vocab_size).to(dtype))
    return student, Head(hidden.to(dtype), teacher.to(dtype), student.bias_V)


def true_gradients(student: Head, teacher: Head, target: torch.Tensor, coefs: torch.Tensor, scale) -> Gradients:
    """By the formulas of copd_kernels/_rows.py in fp64, on whole rows."""
    raw = [head.hidden_TD.double() @ head.weight_VD.double().T + head.bias_V.double() for head in (student, teacher)]
    s, t = (z.clone() for z in raw)
    for z in (s, t):
        _rows.prepare_aten(z, None, scale["temperature"], scale["softcap"])
    stats = statistics.empty_statistics(12, len(s), like=s, dtype=torch.float64)
    _rows.dual_stats_aten(s, t, 0, target, stats)
    second = torch.zeros(3, len(s), dtype=torch.float64)
    _rows.second_aten(s, t, stats, BETA, second)
    _rows.dual_grad_aten(s, t, 0, target, stats, second, coefs.double(), BETA, *scale.values())
    return s @ student.weight_VD.double(), s.T @ student.hidden_TD.double(), s.sum(0)


def gradients(student: Head, teacher: Head, target: torch.Tensor, coefs: torch.Tensor, **options) -> Gradients:
    """Of the fused operation; ``coefs`` ``[6, T]``."""
    with_jsd = bool(coefs[5].any())
    return driver.fused(
        student,
        teacher,
        target,
        coefficients=lambda tokens, stats, second: coefs[:, tokens],
        second_beta=BETA if with_jsd else None,
        top_k=0,
        wanted=(True, True, True),
        **options,
    )[3]


def relative_error(found: torch.Tensor, true: torch.Tensor) -> float:
    assert found.isfinite().all()
    return float((found.double() - true).norm() / true.norm())


def coefficients(name: str, num_tokens: int) -> torch.Tensor:
    """With a weight of its own for every token."""
    return torch.tensor(COEFS[name])[:, None] * torch.linspace(0.5, 1.5, num_tokens)


@pytest.mark.parametrize("name", COEFS)
@pytest.mark.parametrize("low_memory", [False, True])
def test_plans_in_fp32(randn, randint, monkeypatch, name, low_memory) -> None:
    """Each term alone and all together; chunks of 17 and 4 tokens, slices of the vocabulary of 64 and 16 entries."""
    monkeypatch.setattr(driver, "SLICE_ENTRIES", 64)
    # Of a gap in which the rounding of the product's sums does not show.
    student, teacher = heads(randn, torch.float32, 0.5, 21, 80)
    target, coefs = randint(80, 21), coefficients(name, 21)
    found = gradients(student, teacher, target, coefs, chunk_tokens=17, low_memory=low_memory, **SCALE)
    for got, true in zip(found, true_gradients(student, teacher, target, coefs, SCALE), strict=True):
        assert relative_error(got, true) <= 5e-6


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("name", COEFS)
@pytest.mark.parametrize("low_memory", [False, True])
def test_plans_in_bf16(randn, randint, name, low_memory) -> None:
    """The gradient of the logits in bf16, and the result. Roundings average on these many numbers."""
    student, teacher = heads(randn, torch.bfloat16, 0.1, 192, 1500, 64)
    target, coefs = randint(1500, 192), coefficients(name, 192)
    found = gradients(student, teacher, target, coefs, low_memory=low_memory, **SCALE)
    for got, true in zip(found, true_gradients(student, teacher, target, coefs, SCALE), strict=True):
        assert got.dtype == torch.bfloat16
        assert relative_error(got, true) <= CUT_OFF


@pytest.mark.parametrize("name", ["surrogate", "entropy"])
@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_one_head(randn, randint, dtype, name, low_memory) -> None:
    student, _ = heads(randn, dtype, 0.1)
    target, coefs = randint(150, 33), coefficients(name, 33)
    true = true_gradients(student, student, target, coefs, SCALE)
    found = driver.fused(
        student,
        None,
        target,
        coefficients=lambda tokens, stats, second: coefs[:3, tokens],
        second_beta=None,
        top_k=0,
        wanted=(True, True, True),
        low_memory=low_memory,
        **SCALE,
    )[3]
    for got, expected in zip(found, true, strict=True):
        assert relative_error(got, expected) <= {torch.float32: 5e-6, torch.float16: 1e-3}[dtype]


@pytest.mark.usefixtures("large_tiles")
def test_stored_fp16_survives_a_kl_of_1e_6(randn, randint) -> None:
    """The reason for centring. fp16 inputs, whose gradient of the logits is fp32, so that nothing else is rounded.

    Logits rounded to bf16 or fp16 hold nothing of the gap; (x, r) costs less than 1e-3 of the gradient."""
    num_tokens, vocab_size, size, scale = 48, 1500, 64, {"temperature": 1.0, "softcap": 0.0}
    student, teacher = heads(randn, torch.float16, 2e-3, num_tokens, vocab_size, size)
    target, coefs = randint(vocab_size, num_tokens), coefficients("reverse", num_tokens)
    kl = statistics.divergences(driver.dual_statistics(student, teacher, target, **scale)[0])[0]
    assert 3e-7 < kl.median() < 3e-6
    wide = [Head(*(x.float() for x in head)) for head in (student, teacher)]
    true = true_gradients(*wide, target, coefs, scale)
    # In fp32 of the same inputs, to see the gradient before it is rounded to fp16 (where most of it would underflow).
    stored = _gradient_before_rounding(student, teacher, target, coefs, scale)
    for got, expected in zip(stored, true, strict=True):
        assert relative_error(got, expected) <= 1e-3
    for dtype in (torch.bfloat16, torch.float16):
        s, t = ((h.hidden_TD @ h.weight_VD.T + h.bias_V).to(dtype).double() for h in wide)
        p = s.softmax(-1)
        delta = s.log_softmax(-1) - t.log_softmax(-1)
        rounded = coefs[3, :, None] * p * (delta - (p * delta).sum(-1, keepdim=True))
        assert relative_error(rounded @ wide[0].weight_VD.double(), true[0]) > 0.1


def _gradient_before_rounding(student: Head, teacher: Head, target, coefs, scale) -> Gradients:
    plane = driver._Pass(student, teacher, target, scale["temperature"], scale["softcap"])
    stored, tokens = plane.new_stored(), slice(0, len(target))
    assert stored.is_centred
    stats, _, partial = plane.statistics(tokens, stored)
    params = plane.params(stats, None, coefs)
    grad = plane.launcher.gradient_of_stored(stored, partial, params, plane.target_T, None)
    assert grad.dtype == torch.float32
    return grad @ student.weight_VD.float(), grad.T @ student.hidden_TD.float(), grad.sum(0)


def test_gradient_takes_the_memory_of_bf16_logits(randn, randint) -> None:
    """The workspace of a chunk is 4 bytes an entry for two heads, gradient and all."""
    student, teacher = heads(randn, torch.bfloat16, 0.1)
    plane = driver._Pass(student, teacher, randint(150, 33), 1.0, 0.0)
    stored = plane.new_stored()
    stats, _, partial = plane.statistics(slice(0, 33), stored)
    params = plane.params(stats, None, coefficients("all", 33))
    grad = plane.launcher.gradient_of_stored(stored, partial, params, plane.target_T, None)
    assert grad.data_ptr() == stored.x.data_ptr()
    assert stored.x.element_size() + stored.r.element_size() == 4


@pytest.mark.parametrize(("excluded", "name"), [("student", "reverse"), ("teacher", "forward"), ("teacher", "jsd")])
@pytest.mark.parametrize("low_memory", [False, True])
def test_tokens_that_a_policy_excludes(randn, randint, excluded, name, low_memory) -> None:
    """-inf in either bias, a whole tile of it: no gradient for the student's, and of the others none is NaN."""
    student, teacher = heads(randn, torch.bfloat16, 0.1, num_tokens=9)
    bias = student.bias_V.clone()
    bias[60:110] = -torch.inf
    pair = (
        (student._replace(bias_V=bias), teacher) if excluded == "student" else (student, teacher._replace(bias_V=bias))
    )
    # Of the divergences the one that stays finite.
    target, coefs, scale = randint(50, 9), coefficients(name, 9), {"temperature": 1.0, "softcap": 0.0}
    true = true_gradients(*pair, target, coefs, scale)
    found = gradients(*pair, target, coefs, **scale, low_memory=low_memory)
    for got, expected in zip(found, true, strict=True):
        assert relative_error(got, expected) <= 2 * CUT_OFF
    if excluded == "student":
        assert found[1][60:110].eq(0).all()
