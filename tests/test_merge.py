"""The merge: theta_0 plus the weighted mean of the branches' changes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from copd_engine.merge import merge
from copd_engine.types import UserError


def tensors(*values: float, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {"weight": torch.tensor([values], dtype=dtype), "bias": torch.tensor(values[0], dtype=dtype)}


BASE = tensors(1.0, 2.0)
BRANCHES = {"text": tensors(2.0, 2.0), "image": tensors(1.0, 6.0), "video": tensors(-3.0, 4.0)}


def test_the_default_is_the_mean_of_the_branches():
    merged = merge(BASE, BRANCHES)
    torch.testing.assert_close(merged["weight"], torch.tensor([[0.0, 4.0]]), atol=0, rtol=0)
    torch.testing.assert_close(merged["bias"], torch.tensor(0.0), atol=0, rtol=0)


def test_weights_of_any_scale_are_normalised():
    # 1 + (1 * 1 + 2 * 0 + 1 * -4) / 4 and 2 + (0 + 2 * 4 + 2) / 4
    expected = torch.tensor([[0.25, 4.5]])
    for scale in (1.0, 0.1, 50.0):
        merged = merge(BASE, BRANCHES, {"video": scale, "text": scale, "image": 2 * scale})
        torch.testing.assert_close(merged["weight"], expected, atol=1e-7, rtol=0)


def test_a_weight_of_0_leaves_a_branch_out():
    merged = merge(BASE, BRANCHES, {"text": 0.0, "image": 3.0, "video": 0.0})
    assert torch.equal(merged["weight"], BRANCHES["image"]["weight"])


def test_one_branch_and_equal_branches_come_back_bitwise():
    generator = torch.Generator().manual_seed(0)
    base, branch = ({"w": torch.randn(50, generator=generator)} for _ in range(2))
    assert torch.equal(merge(base, {"a": branch})["w"], branch["w"])
    assert torch.equal(merge(base, dict.fromkeys("abc", branch))["w"], branch["w"])
    assert torch.equal(merge(base, dict.fromkeys("abc", base))["w"], base["w"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_fp64_and_the_result_has_the_bases_dtype(dtype):
    generator = torch.Generator().manual_seed(0)
    names = [f"branch{i}" for i in range(7)]
    base = {"w": torch.randn(200, generator=generator).to(dtype)}
    branches = {name: {"w": torch.randn(200, generator=generator).to(dtype)} for name in names}
    merged = merge(base, branches)["w"]
    exact = torch.stack([branches[name]["w"].double() for name in names]).mean(0)
    assert merged.dtype == dtype
    # Rounded once, at the end: half a unit in the last place (and fp64's own noise).
    assert ((merged.double() - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() * (1 + 1e-6) + 1e-12).all()


def test_inputs_stay_as_they_were():
    before = {name: value["weight"].clone() for name, value in BRANCHES.items()}
    merged = merge(BASE, BRANCHES)
    merged["weight"].zero_()
    assert torch.equal(BASE["weight"], torch.tensor([[1.0, 2.0]]))
    assert all(torch.equal(BRANCHES[name]["weight"], before[name]) for name in BRANCHES)


@given(st.permutations(list(BRANCHES)))
def test_the_order_of_branches_does_not_matter(order):
    merged = merge(BASE, {name: BRANCHES[name] for name in order})
    torch.testing.assert_close(merged["weight"], torch.tensor([[0.0, 4.0]]), atol=1e-7, rtol=0)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"text": 1.0}, "merge weights name"),
        ({"text": 1.0, "image": 1.0, "video": 1.0, "sound": 1.0}, "merge weights name"),
        ({"text": 1.0, "image": -1.0, "video": 1.0}, "must not be negative"),
        ({"text": 0.0, "image": 0.0, "video": 0.0}, "must not all be 0"),
        ({"text": 1.0, "image": float("inf"), "video": 1.0}, "must be finite"),
        ({"text": 1.0, "image": float("nan"), "video": 1.0}, "must be finite"),
    ],
)
def test_weights_that_do_not_fit(weights, message):
    with pytest.raises(UserError, match=message):
        merge(BASE, BRANCHES, weights)


def test_models_that_do_not_fit():
    with pytest.raises(UserError, match="at least one branch"):
        merge(BASE, {})
    with pytest.raises(UserError, match="'text' is not the same model as the base: bias is only in one"):
        merge(BASE, {"text": {"weight": BASE["weight"]}})
    with pytest.raises(UserError, match="extra is only in one"):
        merge(BASE, {"text": BASE | {"extra": torch.zeros(1)}})
    with pytest.raises(UserError, match=r"weight has shape \(2,\), the base has \(1, 2\)"):
        merge(BASE, {"text": BASE | {"weight": torch.zeros(2)}})
