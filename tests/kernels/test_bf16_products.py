"""Products of bf16 with fp32 sums: packing and rounding on every machine, brgemm where the CPU has a kernel for it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from copd_kernels import _products, native_available
from copd_kernels._types import Head

if not native_available():
    pytest.skip("the CPU kernels were not built", allow_module_level=True)

from tests.kernels.row_checks import every_isa, ops  # noqa: F401


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def needs_brgemm() -> None:
    if not ops.bf16_available():
        pytest.skip("this CPU has neither AMX nor avx512_bf16")


def panels(right_KN: torch.Tensor) -> torch.Tensor:
    """The layout in words: panels of 64 columns, pairs of rows side by side, zeros for what is missing."""
    depth, width = right_KN.shape
    padded = torch.zeros(depth + depth % 2, -(-width // 64) * 64, dtype=right_KN.dtype)
    padded[:depth, :width] = right_KN
    return padded.view(len(padded) // 2, 2, -1, 64).permute(2, 0, 3, 1).contiguous()


@pytest.mark.parametrize(("width", "depth"), [(1, 2), (64, 32), (65, 34), (200, 70), (67, 8), (4, 6)])
def test_packed(width: int, depth: int) -> None:
    wide = randn(width, depth + 3).bfloat16()
    matrix = wide[:, 1 : depth + 1]  # rows that are no multiple of a pair apart
    assert torch.equal(ops.bf16_pack(matrix, True), panels(matrix.T))
    assert torch.equal(ops.bf16_pack(matrix, False), panels(matrix))


@pytest.mark.parametrize(("rows", "depth", "width"), [(1, 2, 1), (130, 66, 201), (33, 300, 64), (5, 4098, 70)])
@pytest.mark.parametrize("add", [False, True])
def test_product(rows: int, depth: int, width: int, add: bool) -> None:
    needs_brgemm()
    left, right = randn(rows, depth).bfloat16(), randn(depth, width, seed=1).bfloat16()
    wide = torch.full((rows, width + 9), 7.0)
    ops.bf16_product_(left, ops.bf16_pack(right, False), wide[:, 4:-5], add)
    expected = left.double() @ right.double() + (7 if add else 0)
    bound = 1e-6 * (left.double().abs() @ right.double().abs()) + 1e-6
    assert ((wide[:, 4:-5].double() - expected).abs() <= bound).all()
    assert (wide[:, :4] == 7).all()
    assert (wide[:, -5:] == 7).all()


def test_product_does_not_depend_on_the_threads() -> None:
    needs_brgemm()
    left, packed = randn(300, 128).bfloat16(), ops.bf16_pack(randn(1000, 128, seed=1).bfloat16(), True)
    results = []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        results.append(torch.empty(300, 1000))
        ops.bf16_product_(left, packed, results[-1], False)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_nothing_to_multiply() -> None:
    needs_brgemm()
    for rows, depth, width in ((0, 4, 3), (3, 0, 2), (3, 4, 0)):
        out = torch.full((rows, width), 7.0)
        left = torch.zeros(rows, depth, dtype=torch.bfloat16)
        right = torch.zeros(depth, width, dtype=torch.bfloat16)
        ops.bf16_product_(left, ops.bf16_pack(right, False), out, False)
        assert (out == 0).all()


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (8, 8), (33, 70), (64, 40), (7, 129)])
def test_transposed(rows: int, columns: int) -> None:
    x = randn(rows, columns + 5).bfloat16()[:, 2:-3]
    out = torch.full((columns, rows + 4), 7.0, dtype=torch.bfloat16)
    ops.bf16_transpose_(x, out[:, 1:-3])
    assert torch.equal(out[:, 1:-3], x.T)
    assert (out[:, [0, -3, -2, -1]] == 7).all()


SPECIAL = [0.0, -0.0, 1e-45, -1e-40, 3.3895e38, -3.4e38, torch.inf, -torch.inf, torch.nan, 1 + 2**-8, 1 + 3 * 2**-8]


@pytest.mark.parametrize("columns", [1, 15, 128, 301])
def test_rounding_is_that_of_torch(columns: int) -> None:
    x = randn(6, columns) * 10 ** randn(6, columns, seed=1)
    numbers = torch.tensor([*SPECIAL, torch.tensor(0x7F800001, dtype=torch.int32).view(torch.float32).item()])
    x[:, : len(numbers)] = numbers[:columns]
    rounded = torch.full((6, columns + 2), 7.0, dtype=torch.bfloat16)
    hits = torch.zeros(6, 4, dtype=torch.int32)
    ops.round_bf16_(x, torch.full((6,), torch.inf), rounded[:, :-2], hits)
    torch.testing.assert_close(rounded[:, :-2], x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    assert (rounded[:, -2:] == 7).all()


@pytest.mark.parametrize("columns", [5, 128, 515])
def test_what_rounding_took_from_large_entries(columns: int) -> None:
    rows, size, room = 9, 37, 4
    x, threshold = randn(rows, columns), torch.full((rows,), 1.0)
    threshold[3] = torch.nan
    threshold[4] = 0.0
    x[5] = x[5].bfloat16().float()  # nothing is lost
    rounded, hits = torch.empty(rows, columns).bfloat16(), torch.full((rows, room), 77, dtype=torch.int32)
    ops.round_bf16_(x, threshold, rounded, hits)
    lost = torch.zeros(rows, columns)
    for row in range(rows):
        exact = x[row] == rounded[row].float()
        wanted = ((x[row].abs() >= threshold[row]) & ~exact).nonzero()[:room, 0].tolist()
        assert hits[row, : len(wanted)].tolist() == wanted
        if len(wanted) < room:
            assert hits[row, len(wanted)] == -1
        lost[row, wanted] = (x - rounded.float())[row, wanted]
    assert 0 < (lost != 0).sum() < lost.numel()
    weight, hidden = randn(columns, size, seed=1).bfloat16(), randn(rows, size, seed=2).bfloat16()
    out, transposed = torch.ones(rows, size), torch.ones(columns, size)
    ops.correct_bf16_(x, hits, weight, out, False)
    ops.correct_bf16_(x, hits, hidden, transposed, True)
    torch.testing.assert_close(out, 1 + lost @ weight.float(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(transposed, 1 + lost.T @ hidden.float(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["peaked", "target"])
def test_gradients_lose_little_to_the_rounding(kind: str) -> None:
    """Rows whose gradient lies in few entries: the sums, before they are rounded themselves, are good to 1e-3. Without
    the correction they are off by 1.5e-3 and more."""
    needs_brgemm()
    tokens, size, vocab = 96, 64, 2048
    grad = (2 * randn(tokens, vocab)).softmax(-1)
    if kind == "target":
        grad = grad / 50
        grad[:, 7] -= 0.9
    head = Head(randn(tokens, size, seed=1).bfloat16(), randn(vocab, size, seed=2).bfloat16(), None)
    projection = _products.Projection(head, 1.0, 0.0, torch.float32)
    gradient = _products.gradient_of(projection, (True, True, False), torch.float32)
    assert isinstance(gradient, _products.Bf16Gradient)
    tile, rows = slice(0, vocab), slice(0, tokens)
    gradient.begin_tile(tile)
    gradient.add_tile(rows, tile, grad, grad.abs().amax(-1))
    sums = gradient.hidden_TD, gradient._tile_grad
    true = grad.double() @ head.weight_VD.double(), grad.T.double() @ head.hidden_TD.double()
    plain = grad.bfloat16().double() @ head.weight_VD.double(), grad.bfloat16().T.double() @ head.hidden_TD.double()
    for got, rounded, exact in zip(sums, plain, true, strict=True):
        error, uncorrected = ((x.double() - exact).norm() / exact.norm() for x in (got, rounded))
        assert error <= 7e-4
        assert uncorrected >= 1.2e-3


def test_an_odd_hidden_size_is_converted() -> None:
    head = Head(torch.zeros(2, 3, dtype=torch.bfloat16), torch.zeros(2, 3, dtype=torch.bfloat16), None)
    assert not _products.multiplies_bf16(head, torch.float32)


Z = torch.zeros(2, 5)
B = Z.bfloat16()
HITS = torch.zeros(2, 4, dtype=torch.int32)
ERRORS = {
    "packed dtype": (partial(ops.bf16_pack, Z, True), "matrix must be BFloat16, was Float"),
    "packed odd": (partial(ops.bf16_pack, B, True), r"matrix must have an even number of columns, was \[2, 5\]"),
    "left": (
        partial(ops.bf16_product_, B, ops.bf16_pack(B[:, :4], True), torch.zeros(2, 2), False),
        r"a must be \[2, 4\], was \[2, 5\]",
    ),
    "right": (
        partial(ops.bf16_product_, B[:, :4], B, torch.zeros(2, 2), False),
        r"packed must be BFloat16 \[1, K / 2, 64, 2\], was BFloat16 \[2, 5\]",
    ),
    "out": (partial(ops.bf16_transpose_, B, B), r"out must be \[5, 2\], was \[2, 5\]"),
    "threshold": (partial(ops.round_bf16_, Z, torch.zeros(3), B, HITS), r"threshold must be \[2\], was \[3\]"),
    "hits": (partial(ops.round_bf16_, Z, torch.zeros(2), B, Z), "hits must be Int, was Float"),
    "factor": (partial(ops.correct_bf16_, Z, HITS, B, Z, False), r"factor must be \[5, 5\], was \[2, 5\]"),
    "corrected": (
        partial(ops.correct_bf16_, Z, HITS, B, Z, True),
        r"out must be \[5, 5\], was \[2, 5\]",
    ),
}


@pytest.mark.parametrize("case", list(ERRORS))
def test_errors_name_the_argument(case: str) -> None:
    call, match = ERRORS[case]
    with pytest.raises(ValueError, match=match):
        call()
