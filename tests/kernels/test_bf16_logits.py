"""The bf16 projection with fp32 results: the packed layout everywhere, the product where the CPU has one."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tests.kernels.row_checks import needs_native, ops

pytestmark = needs_native


@pytest.mark.parametrize(("vocab", "num_hidden"), [(1, 2), (64, 32), (65, 34), (200, 70)])
def test_packed_weights_give_the_same_product(vocab: int, num_hidden: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    wide = torch.randn(vocab, num_hidden + 3, generator=generator).bfloat16()
    weight = wide[:, 1 : num_hidden + 1]  # rows that are no multiple of a pair apart
    packed = ops.pack_vnni(weight)
    assert packed.shape == ((vocab + 63) // 64, num_hidden // 2, 64, 2)
    for v in range(len(packed) * 64):
        row = packed[v // 64, :, v % 64].reshape(-1)
        assert torch.equal(row, weight[v] if v < vocab else torch.zeros_like(row))


def test_bf16_logits_are_fp32_or_refused() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 66, generator=generator).bfloat16() for n in (130, 201))
    wide = torch.full((130, 300), 7.0)
    if not ops.bf16_logits_(hidden, weight, wide[:, 50:251]):
        assert (wide == 7).all()
        pytest.skip("no AMX: brgemm has no bf16 kernel here")
    torch.testing.assert_close(wide[:, 50:251].double(), hidden.double() @ weight.double().T, rtol=1e-5, atol=1e-5)
    assert (wide[:, :50] == 7).all()
    assert (wide[:, 251:] == 7).all()


def test_bf16_logits_refuse_an_odd_hidden_size() -> None:
    hidden, out = torch.zeros(2, 3, dtype=torch.bfloat16), torch.full((2, 2), 7.0)
    assert not ops.bf16_logits_(hidden, hidden, out)
    assert (out == 7).all()


Z = torch.zeros(2, 5)
ERRORS = {
    "hidden": (
        partial(ops.bf16_logits_, Z, Z, Z),
        "hidden must be BFloat16, was Float",
    ),
    "weight": (
        partial(ops.bf16_logits_, Z.bfloat16(), Z[:, :4].bfloat16(), torch.zeros(2, 2)),
        r"weight must be \[Vt, 5\] like hidden \[2, 5\], was \[2, 4\]",
    ),
    "out": (partial(ops.bf16_logits_, Z.bfloat16(), Z.bfloat16(), Z), r"out must be \[2, 2\], was \[2, 5\]"),
    "odd": (partial(ops.pack_vnni, Z.bfloat16()), r"weight must have an even number of columns, was \[2, 5\]"),
}


@pytest.mark.parametrize("case", list(ERRORS))
def test_errors_name_the_argument(case: str) -> None:
    call, match = ERRORS[case]
    with pytest.raises(ValueError, match=match):
        call()
