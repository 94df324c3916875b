"""Products of fp32 by brgemm, where the CPU is one that torch.mm leaves half idle: values, strides, threads, errors."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from copd_kernels import _products, native_available

if not native_available():
    pytest.skip("the CPU kernels were not built", allow_module_level=True)

ops = torch.ops.copd_kernels
needs_brgemm = pytest.mark.skipif(
    not _products.has_fp32_brgemm(), reason="torch.mm multiplies fp32 on this CPU, or it has no AVX-512"
)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_product(got: torch.Tensor, left: torch.Tensor, right: torch.Tensor, start: float = 0.0) -> None:
    """Entry by entry, relative to the sum of the sizes of what was added."""
    expected = left.double() @ right.double() + start
    size = left.double().abs() @ right.double().abs() + abs(start)
    assert ((got.double() - expected).abs() <= 2e-6 * size).all()


SHAPES = [(1, 1, 1), (7, 5, 13), (130, 1100, 201), (129, 257, 65), (3, 2050, 600)]


@needs_brgemm
@pytest.mark.parametrize(("num_tokens", "hidden_size", "vocab_size"), SHAPES)
def test_logits(num_tokens: int, hidden_size: int, vocab_size: int) -> None:
    hidden, weight = randn(num_tokens, hidden_size + 3)[:, 1:-2], randn(vocab_size, hidden_size, seed=1)
    wide = torch.full((num_tokens, vocab_size + 9), 7.0)
    ops.fp32_logits_(hidden, weight, wide[:, 4:-5])
    assert_product(wide[:, 4:-5], hidden, weight.T)
    assert (wide[:, [0, 1, 2, 3, -5, -4, -3, -2, -1]] == 7).all()


@needs_brgemm
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(("num_tokens", "hidden_size", "vocab_size"), SHAPES)
def test_gradients(num_tokens: int, hidden_size: int, vocab_size: int, add: bool) -> None:
    grad = randn(num_tokens, vocab_size + 5)[:, 2:-3]
    hidden, weight = randn(num_tokens, hidden_size, seed=1), randn(vocab_size, hidden_size, seed=2)
    start = 7.0 if add else 0.0
    for op, factor, left in (
        (ops.fp32_hidden_grad_, weight, grad),
        (ops.fp32_weight_grad_, hidden, grad.T),
    ):
        wide = torch.full((len(left), hidden_size + 3), 7.0)
        op(grad, factor, wide[:, 1:-2], add)
        assert_product(wide[:, 1:-2], left, factor, start)
        assert (wide[:, [0, -2, -1]] == 7).all()


@needs_brgemm
def test_long_sums_keep_their_digits() -> None:
    """Against plain fp32, whose error is the yardstick: a sum over 100,000 entries, and logits over 4,096."""
    grad, weight = randn(5, 100_003), randn(100_003, 8, seed=1)
    hidden, rows = randn(64, 4096, seed=2), randn(300, 4096, seed=3)
    for op, factors, right in (
        (ops.fp32_hidden_grad_, (grad, weight), weight),
        (ops.fp32_logits_, (hidden, rows), rows.T),
    ):
        out = torch.empty(len(factors[0]), right.shape[1])
        op(*factors, out, *([False] if op is ops.fp32_hidden_grad_ else []))
        true = factors[0].double() @ right.double()
        assert (out - true).norm() <= 1e-6 * true.norm()


@needs_brgemm
def test_the_same_for_any_number_of_threads() -> None:
    hidden, weight = randn(150, 96), randn(1000, 96, seed=1)
    results = []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        logits, hidden_grad, weight_grad = torch.empty(150, 1000), torch.empty(150, 96), torch.empty(1000, 96)
        ops.fp32_logits_(hidden, weight, logits)
        ops.fp32_hidden_grad_(logits, weight, hidden_grad, False)
        ops.fp32_weight_grad_(logits, hidden, weight_grad, False)
        results.append((logits, hidden_grad, weight_grad))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_brgemm
def test_nothing_to_multiply() -> None:
    for num_tokens, hidden_size, vocab_size in ((0, 3, 4), (3, 0, 4), (3, 4, 0)):
        hidden, weight = torch.ones(num_tokens, hidden_size), torch.ones(vocab_size, hidden_size)
        grad = torch.ones(num_tokens, vocab_size)
        logits, hidden_grad, weight_grad = (torch.full_like(x, 7.0) for x in (grad, hidden, weight))
        ops.fp32_logits_(hidden, weight, logits)
        ops.fp32_hidden_grad_(grad, weight, hidden_grad, False)
        ops.fp32_weight_grad_(grad, hidden, weight_grad, False)
        for got, expected in (
            (logits, hidden @ weight.T),
            (hidden_grad, grad @ weight),
            (weight_grad, grad.T @ hidden),
        ):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("is_first", [False, True])
@pytest.mark.parametrize("by", ["torch", "the faster"])
def test_either_way_the_same_product(by: str, is_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the driver calls, over and under the size from which brgemm is used."""
    if by == "torch":
        monkeypatch.setattr(_products, "has_fp32_brgemm", lambda: False)
    for num_tokens, hidden_size, vocab_size in ((9, 8, 33), (70, 40, 1000)):
        hidden, weight = randn(num_tokens, hidden_size), randn(vocab_size, hidden_size, seed=1)
        grad = torch.empty(num_tokens, vocab_size)
        _products.logits_(hidden, weight, grad)
        assert_product(grad, hidden, weight.T)
        out_hidden, out_weight = torch.ones_like(hidden), torch.ones_like(weight)
        _products.add_hidden_(out_hidden, grad, weight, is_first=is_first)
        _products.add_weight_(out_weight, grad, hidden, is_first=is_first)
        assert_product(out_hidden, grad, weight, 0.0 if is_first else 1.0)
        assert_product(out_weight, grad.T, hidden, 0.0 if is_first else 1.0)


Z = torch.zeros(2, 5)
ERRORS = {
    "dtype": (partial(ops.fp32_logits_, Z.double(), Z, torch.zeros(2, 2)), "hidden must be Float, was Double"),
    "hidden size": (partial(ops.fp32_logits_, Z, Z[:, :4], Z), r"weight must be \[2, 5\], was \[2, 4\]"),
    "logits": (partial(ops.fp32_logits_, Z, Z, Z), r"out must be \[2, 2\], was \[2, 5\]"),
    "vocabulary": (partial(ops.fp32_hidden_grad_, Z, Z, Z, False), r"weight must be \[5, 5\], was \[2, 5\]"),
    "tokens": (partial(ops.fp32_weight_grad_, Z, Z[:1], Z, False), r"hidden must be \[2, 5\], was \[1, 5\]"),
    "columns": (
        partial(ops.fp32_weight_grad_, Z.T.contiguous().T, Z, Z, False),
        r"grad must have adjacent columns, had strides \[1, 2\]",
    ),
}


@pytest.mark.parametrize("case", list(ERRORS))
def test_errors_name_the_argument(case: str) -> None:
    call, match = ERRORS[case]
    with pytest.raises(ValueError, match=match):
        call()
