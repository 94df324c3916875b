"""gpu.driver in Triton's interpreter: what it shares with the CPU's driver, its chunks, shards, dtypes and memory."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import copd_kernels
import pytest
import torch
from copd_kernels import _backend, _driver, reference, statistics, vocab_parallel
from copd_kernels._types import Head

from tests.kernels.problems import Backend, Problem, check, interpreter_tiles, rows_by, run, to_fp64

pytest.importorskip("triton", reason="Triton is not installed (extra gpu)")
driver = pytest.importorskip("copd_kernels.gpu.driver")
launch = pytest.importorskip("copd_kernels.gpu.launch")

SCALE = {"temperature": 0.9, "softcap": 6.0}
ALL = (True, True, True)
FUNCTIONS = ("single_statistics", "dual_statistics", "single_gradient", "dual_gradient", "fused", "topk_overlap")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels were loaded for the GPU")


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Every ``torch.empty`` holds NaN, so that what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def head(randn, num_tokens: int, vocab_size: int, size: int = 8, dtype: torch.dtype = torch.float32) -> Head:
    return Head(randn(num_tokens, size).to(dtype), randn(vocab_size, size).to(dtype), randn(vocab_size).to(dtype))


def surrogate_coefficients(tokens: slice, stats_FC: torch.Tensor, second_3C: torch.Tensor | None) -> torch.Tensor:
    """Of -log p, and of the reverse KL with two heads."""
    ones = torch.ones_like(stats_FC[0])
    rows = [ones, 0 * ones, -ones]
    return torch.stack(rows if len(stats_FC) == 4 else [*rows, ones, 0 * ones, 0 * ones])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_of_the_cpu_driver(name) -> None:
    """By name, kind and default; the GPU's may take more, for tests, at the end."""
    cpu, gpu = (inspect.signature(getattr(module, name)).parameters for module in (_driver, driver))
    shared = {key: gpu[key] for key in cpu}
    assert [(p.name, p.kind, p.default) for p in shared.values()] == [(p.name, p.kind, p.default) for p in cpu.values()]
    assert all(gpu[key].default is not inspect.Parameter.empty for key in gpu.keys() - cpu.keys())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_tokens(randn, dtype) -> None:
    student, teacher = (head(randn, 0, 40, dtype=dtype) for _ in range(2))
    target = torch.empty(0, dtype=torch.int64)
    stats, second, overlap = driver.dual_statistics(student, teacher, target, **SCALE, second_beta=0.5, top_k=3)
    assert (stats.shape, second.shape, overlap.shape) == ((12, 0), (3, 0), (0,))
    assert driver.single_statistics(student, None, **SCALE).shape == (4, 0)
    options = {"coefficients": surrogate_coefficients, "second_beta": 0.5, "top_k": 3, "wanted": ALL, **SCALE}
    for low_memory in (False, True):
        *_, gradients = driver.fused(student, teacher, target, **options, low_memory=low_memory)
        for gradient, tensor in zip(gradients, student, strict=True):
            assert gradient.shape == tensor.shape
            assert gradient.dtype == dtype
            assert gradient.eq(0).all()


def test_an_outer_autocast_changes_nothing(randn, randint) -> None:
    """The operations have cast the heads before; the driver's own products stay in fp32."""
    student, teacher, target = head(randn, 5, 70), head(randn, 5, 70), randint(70, 5)
    options = {"coefficients": surrogate_coefficients, "second_beta": None, "top_k": 0, "wanted": ALL, **SCALE}
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            stats, _, _, gradients = driver.fused(student, teacher, target, **options)
        results.append([stats, *gradients])
    assert all(torch.equal(plain, cast) for plain, cast in zip(*results, strict=True))


def test_fp64_is_refused_by_every_function(randn) -> None:
    wide, good = head(randn, 2, 9, dtype=torch.float64), head(randn, 2, 9)
    target, stats = torch.zeros(2, dtype=torch.int64), torch.zeros(12, 2)
    options = {**SCALE, "wanted": ALL}
    calls = {
        "single_statistics": lambda a, b: driver.single_statistics(a, target, **SCALE),
        "dual_statistics": lambda a, b: driver.dual_statistics(a, b, target, **SCALE),
        "single_gradient": lambda a, b: driver.single_gradient(a, target, stats[:4], stats[:3], **options),
        "dual_gradient": lambda a, b: driver.dual_gradient(a, b, target, stats, None, stats[:6], beta=0.5, **options),
        "fused": lambda a, b: driver.fused(
            a, b, target, coefficients=surrogate_coefficients, second_beta=None, top_k=0, **options
        ),
        "topk_overlap": lambda a, b: driver.topk_overlap(a, b, top_k=1),
    }
    assert calls.keys() == set(FUNCTIONS)
    for name, call in calls.items():
        for pair in ((wide, good), (good, wide)):
            if pair[1] is wide and name.startswith("single"):
                continue
            with pytest.raises(ValueError, match=r"must be float32, .* on a GPU, were torch\.float64"):
                call(*pair)


class Recorder:
    """In place of a kernel: keeps grids and launches nothing."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, ...]] = []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *_, **__: None


def test_grids_beyond_65535_lie_on_axis_0(monkeypatch) -> None:
    """Two million tokens in one chunk. test_truth.py has the numbers of 65,537."""
    kernels = [
        (launch.tile_statistics, "dual_statistics_tile"),
        (launch.merge, "merge_tiles"),
        (launch.rows, "dual_gradient_rows"),
        (launch.rows, "second_rows"),
        (launch.gradient, "dual_gradient_tile"),
        (launch.gradient, "second_tile"),
    ]
    recorders = {name: Recorder() for _, name in kernels}
    for module, name in kernels:
        monkeypatch.setattr(module, name, recorders[name])
    num_tokens = 2_000_000
    one = Head(torch.zeros(num_tokens, 1), torch.zeros(2, 1), None)
    options = {"coefficients": surrogate_coefficients, "second_beta": 0.5, "top_k": 0, "wanted": ALL, **SCALE}
    torch.use_deterministic_algorithms(False)
    for low_memory in (False, True):
        driver.fused(one, one, None, **options, chunk_tokens=num_tokens, low_memory=low_memory)
    for name, recorder in recorders.items():
        assert recorder.grids, name
        for grid in recorder.grids:
            assert len(grid) == 1, name
            assert 65_535 < grid[0] == num_tokens // 16, name


# Bias and softcap, a shard of one entry, a target in each and one in none.
CUTS = [(0, 33), (33, 34), (34, 77)]


def test_vocabulary_shards(randn, randint) -> None:
    """Statistics of shards merge, and their gradients add up, to those of the whole in fp64."""
    student, teacher = head(randn, 9, 77), head(randn, 9, 77)
    target = randint(77, 9)
    target[:3] = torch.tensor([0, 33, 76])
    grads = randn(4, 9)
    exact = [Head(*(x.double() for x in one)) for one in (student, teacher)]
    leaves = [x.clone().requires_grad_() for x in exact[0]]
    truth = reference.linear_divergence(
        *leaves[:2], *exact[1][:2], target, student_bias_V=leaves[2], teacher_bias_V=exact[1].bias_V, **SCALE
    )
    columns = (truth.student_logp_T, truth.student_entropy_T, truth.kl_student_teacher_T, truth.kl_teacher_student_T)
    torch.autograd.backward(columns, tuple(grads))

    def shard(begin, end):
        heads = student[0], student[1][begin:end], teacher[0], teacher[1][begin:end], target
        biases = {"student_bias_V": student[2][begin:end], "teacher_bias_V": teacher[2][begin:end]}
        return heads, {"vocab_begin": begin, **biases, **SCALE}

    with rows_by("triton"):
        parts = []
        for cut in CUTS:
            heads, options = shard(*cut)
            parts.append(vocab_parallel.dual_statistics(*heads, **options))
        merged = copd_kernels.merge_statistics(torch.stack(parts))
        pieces = []
        for cut in CUTS:
            heads, options = shard(*cut)
            pieces.append(vocab_parallel.dual_gradient(*heads, merged, *grads.float(), **options))
        single = [
            vocab_parallel.single_statistics(
                *shard(*cut)[0][:2], target, vocab_begin=cut[0], bias_V=student[2][slice(*cut)], **SCALE
            )
            for cut in CUTS
        ]
        none = vocab_parallel.single_statistics(*shard(*CUTS[1])[0][:2], None, vocab_begin=33, **SCALE)
    torch.testing.assert_close(copd_kernels.merge_statistics(torch.stack(single)), merged[:4], rtol=1e-6, atol=1e-6)
    assert none[statistics.TARGET].isneginf().all()
    finals = statistics.head_finals(merged[:4])
    got = (finals.logp_T, finals.entropy_T, *statistics.divergences(merged))
    for value, true in zip(got, columns, strict=True):
        torch.testing.assert_close(value.double(), true.detach(), rtol=1e-5, atol=1e-5)
    found = (
        sum(piece.hidden_TD for piece in pieces),
        torch.cat([piece.weight_VD for piece in pieces]),
        torch.cat([piece.bias_V for piece in pieces]),
    )
    for gradient, leaf in zip(found, leaves, strict=True):
        assert (gradient.double() - leaf.grad).norm() <= 5e-6 * leaf.grad.norm()


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("teacher_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("student_dtype", DTYPES, ids=str)
def test_heads_of_different_dtypes(randn, randint, student_dtype, teacher_dtype) -> None:
    """And of different D, by descriptors. Values to fp32, gradients to the student's dtype, by both plans."""
    student, teacher = head(randn, 9, 77, 24, student_dtype), head(randn, 9, 77, 8, teacher_dtype)
    target = randint(77, 9)
    leaves = [x.double().requires_grad_() for x in student]
    exact = Head(*(x.double() for x in teacher))
    truth = reference.linear_divergence(
        *leaves[:2], *exact[:2], target, student_bias_V=leaves[2], teacher_bias_V=exact.bias_V, **SCALE
    )
    (truth.kl_student_teacher_T - truth.student_logp_T).sum().backward()
    options = {"coefficients": surrogate_coefficients, "second_beta": None, "top_k": 3, "wanted": ALL, **SCALE}
    with interpreter_tiles(9, 77):
        for low_memory in (False, True):
            stats, _, overlap, gradients = driver.fused(
                student, teacher, target, **options, low_memory=low_memory, use_tma=True
            )
            for value, true in zip(
                statistics.divergences(stats), (truth.kl_student_teacher_T, truth.kl_teacher_student_T), strict=True
            ):
                torch.testing.assert_close(value.double(), true.detach(), rtol=1e-5, atol=0)
            bound = {torch.float32: 5e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[student_dtype]
            for gradient, leaf in zip(gradients, leaves, strict=True):
                assert gradient.dtype == student_dtype
                assert (gradient.double() - leaf.grad).norm() <= bound * leaf.grad.norm()
    assert overlap.shape == (9,)


FP16 = Backend("fp16-triton", torch.float16, "triton")


@pytest.mark.parametrize("op", ["linear_logprob", "linear_divergence", "linear_policy_loss"])
def test_fp16(op) -> None:
    """Its gradient of the logits is fp32, its logits are stored in fp16: the bounds of test_truth.py all the same."""
    problem = Problem(num_tokens=17, hidden_size=7, vocab_size=97, options={"temperature": 0.8, "chunk_tokens": 12})
    with rows_by("triton"):
        check(op, problem, FP16)


def test_fp16_gradients_do_not_underflow(randn) -> None:
    """Nearly flat policies at a KL of 1e-6: gradients of logits of 1e-6, of which fp16 keeps no digit. Weights of 256
    so that it has those of the hidden states."""
    one = head(randn, 9, 300, 16)
    student = Head((one.hidden_TD / 2560).half(), (one.weight_VD * 256).half(), None)
    teacher = student._replace(weight_VD=(student.weight_VD.float() * (1 + 2e-3 * randn(300, 16))).half())
    hidden = student.hidden_TD.double().requires_grad_()
    exact = [x.double() for x in (student.weight_VD, *teacher[:2])]
    kl = reference.linear_divergence(hidden, *exact).kl_student_teacher_T
    kl.sum().backward()

    def coefficients(tokens, stats_FC, second_3C):
        zeros = torch.zeros_like(stats_FC[0])
        return torch.stack([zeros, zeros, zeros, zeros + 1, zeros, zeros])

    options = {"coefficients": coefficients, "second_beta": None, "top_k": 0, "wanted": (True, False, False)}
    with interpreter_tiles(9, 300):
        *_, gradients = driver.fused(student, teacher, None, **options, temperature=1.0, softcap=0.0)
    assert kl.max() < 1e-4
    assert (gradients[0].double() - hidden.grad).norm() <= 1e-3 * hidden.grad.norm()


def test_many_chunks_lose_nothing(randn) -> None:
    """dW of bf16 inputs is a sum over 8 chunks in fp32, and rounded once."""
    num_tokens = 128
    hidden = (1 + 0.1 * randn(num_tokens, 4)).bfloat16()
    student = Head(hidden, randn(40, 4).bfloat16(), None)
    target = torch.zeros(num_tokens, dtype=torch.int64)
    leaves = [x.double().requires_grad_() for x in student[:2]]
    (-reference.linear_logprob(*leaves, target).logp_T.sum()).backward()
    options = {"coefficients": surrogate_coefficients, "second_beta": None, "top_k": 0, "wanted": (False, True, False)}
    with interpreter_tiles(16, 20):
        *_, gradients = driver.fused(student, None, target, **options, temperature=1.0, softcap=0.0, chunk_tokens=16)
    assert gradients[0] is None
    assert gradients[2] is None
    assert (gradients[1].double() - leaves[1].grad).norm() <= 8e-3 * leaves[1].grad.norm()


@pytest.mark.parametrize("name", ["fused", "low memory", "statistics", "gradient"])
def test_no_tensor_is_tokens_by_vocabulary(randn, randint, largest_tensor, monkeypatch, name) -> None:
    """The workspace of a chunk is the largest new tensor; where no logits are stored, the gradient of a slice is."""
    num_tokens, vocab_size, chunk_tokens, slice_entries = 64, 2048, 16, 512
    monkeypatch.setattr(driver, "SLICE_ENTRIES", slice_entries)
    student, teacher = (head(randn, num_tokens, vocab_size, 2) for _ in range(2))
    target, stats = randint(vocab_size, num_tokens), torch.rand(12, num_tokens)
    options = {"temperature": 1.0, "softcap": 0.0, "chunk_tokens": chunk_tokens}
    fused = {"coefficients": surrogate_coefficients, "second_beta": 0.5, "top_k": 4, "wanted": ALL, **options}
    torch.use_deterministic_algorithms(False)
    with interpreter_tiles(16, vocab_size), largest_tensor:
        if name == "statistics":
            driver.dual_statistics(student, teacher, target, second_beta=0.5, top_k=4, **options)
        elif name == "gradient":
            driver.dual_gradient(student, teacher, target, stats, None, stats[:6], beta=0.5, wanted=ALL, **options)
        else:
            driver.fused(student, teacher, target, **fused, low_memory=name == "low memory")
    is_stored = name in ("fused", "statistics")
    assert largest_tensor.num_elements == chunk_tokens * (vocab_size if is_stored else slice_entries)


def test_low_memory_of_the_operation() -> None:
    """The same loss and gradients from ``linear_policy_loss``, on this driver and on the CPU's."""
    problem = Problem(num_tokens=9, hidden_size=6, vocab_size=61, divergence="jsd")
    again = Problem(num_tokens=9, hidden_size=6, vocab_size=61, divergence="jsd", options={"low_memory": True})
    for rows in ("triton", "auto"):
        with rows_by(rows):
            inputs = problem.tensors(torch.float32)
            stored, made_again = (run("linear_policy_loss", copd_kernels, p, inputs) for p in (problem, again))
        for name, value in stored.values.items():
            torch.testing.assert_close(made_again.values[name], value, rtol=1e-5, atol=1e-6, msg=name)
        for name, gradient in stored.gradients.items():
            torch.testing.assert_close(made_again.gradients[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_policy_loss_without_its_terms_in_turn() -> None:
    """A loss of the policy alone, of the reference alone and of distillation alone."""
    problem = Problem(num_tokens=9, hidden_size=6, vocab_size=61)
    terms = (
        ("advantage_T", "old_logp_T", "loss_weight_T"),
        ("reference_logp_T", "kl_weight_T"),
        ("divergence_weight_T",),
    )
    with rows_by("triton"):
        for kept in terms:
            inputs = problem.tensors(torch.float32)
            inputs.per_token = {name: x for name, x in inputs.per_token.items() if name in kept}
            got = run("linear_policy_loss", copd_kernels, problem, inputs)
            true = run("linear_policy_loss", reference, problem, to_fp64(inputs))
            torch.testing.assert_close(got.values["loss"].double(), true.values["loss"], rtol=1e-5, atol=1e-5)
            for name, gradient in got.gradients.items():
                assert (gradient.double() - true.gradients[name]).norm() <= 5e-6 * true.gradients[name].norm()


def test_the_gpu_is_asked_of_the_backend() -> None:
    """Driver, surrogate and group advantages of CUDA tensors; without Triton the error names the extra."""
    cuda = torch.device("cuda")
    assert _backend.driver(cuda) is driver
    assert _backend.surrogate(cuda) is __import__("copd_kernels.gpu.surrogate", fromlist=["surrogate"]).surrogate
    assert _backend.driver(torch.device("cpu")) is _driver
    with pytest.raises(ModuleNotFoundError, match=r"copd_kernels on cuda needs .*no_such; install copd-engine\[gpu\]"):
        _backend.gpu_module("no_such", cuda)
