"""Merging: every method by numbers, by an independent formula, and against peft."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from copd_engine.config import MergeConfig
from copd_engine.merge import merge, methods
from copd_engine.types import UserError


def tensors(*values: float, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {"weight": torch.tensor([values], dtype=dtype), "bias": torch.tensor(values[0], dtype=dtype)}


BASE = tensors(1.0, 2.0)
BRANCHES = {"text": tensors(2.0, 2.0), "image": tensors(1.0, 6.0), "video": tensors(-3.0, 4.0)}
SPARSE = ("ties", "dare", "dare_ties")


def weighted(weights: Mapping[str, float]) -> MergeConfig:
    return MergeConfig(method="weighted", weights=dict(weights))


def changed(recipe: MergeConfig, *taus: Sequence[float]) -> list[float]:
    """What the merge adds to a base of ones."""
    base = {"w": torch.ones(len(taus[0]), dtype=torch.float64)}
    branches = {f"b{k}": {"w": 1 + torch.tensor(tau, dtype=torch.float64)} for k, tau in enumerate(taus)}
    return (merge(base, branches, recipe)["w"] - 1).tolist()


def test_the_default_is_the_mean_of_the_branches():
    merged = merge(BASE, BRANCHES)
    torch.testing.assert_close(merged["weight"], torch.tensor([[0.0, 4.0]]), atol=0, rtol=0)
    torch.testing.assert_close(merged["bias"], torch.tensor(0.0), atol=0, rtol=0)


def test_weights_of_any_scale_are_normalised():
    # 1 + (1 * 1 + 2 * 0 + 1 * -4) / 4 and 2 + (0 + 2 * 4 + 2) / 4
    expected = torch.tensor([[0.25, 4.5]])
    for scale in (1.0, 0.1, 50.0):
        merged = merge(BASE, BRANCHES, weighted({"video": scale, "text": scale, "image": 2 * scale}))
        torch.testing.assert_close(merged["weight"], expected, atol=1e-7, rtol=0)


def test_a_weight_of_0_leaves_a_branch_out():
    merged = merge(BASE, BRANCHES, weighted({"text": 0.0, "image": 3.0, "video": 0.0}))
    assert torch.equal(merged["weight"], BRANCHES["image"]["weight"])


def test_task_arithmetic_by_hand():
    recipe = MergeConfig(method="task_arithmetic", scale=0.5)
    assert changed(recipe, [1.0, -2.0], [3.0, 0.5], [0.0, 4.0]) == [2.0, 1.25]


def test_ties_by_hand():
    # Half of each stays: [4, -3, 0, 0], [-1, -5, 0, 0] and [0, 0, 2, -2]. Sums: 3, -8, 2, -2.
    taus = [4.0, -3.0, 1.0, 0.5], [-1.0, -5.0, 0.25, 0.5], [0.5, 0.125, 2.0, -2.0]
    assert changed(MergeConfig(method="ties", density=0.5), *taus) == [4.0, -4.0, 2.0, -2.0]
    assert changed(MergeConfig(method="ties", density=0.5, scale=0.25), *taus) == [1.0, -1.0, 0.5, -0.5]
    # All stay: sums 3.5, -7.875, 3.25, -1; the mean is over those of that sign.
    assert changed(MergeConfig(method="ties", density=1.0), *taus) == [2.25, -4.0, pytest.approx(3.25 / 3), -2.0]


def test_ties_keeps_all_that_are_as_large_as_the_last_and_no_less_than_one_entry():
    assert changed(MergeConfig(method="ties", density=0.25), [2.0, -2.0, 1.0, 2.0]) == [2.0, -2.0, 0.0, 2.0]
    assert changed(MergeConfig(method="ties", density=0.01), [1.0, 3.0]) == [0.0, 3.0]


def test_changes_that_cancel_leave_the_base():
    for method in ("ties", "dare_ties"):
        assert changed(MergeConfig(method=method, density=1.0), [1.0, 2.0], [-1.0, 1.0]) == [0.0, 1.5]


def test_dare_keeps_its_share_of_each_branch_and_scales_it_up():
    n = 20_000
    recipe = MergeConfig(method="dare", density=0.25, scale=2.0)
    one = torch.tensor(changed(recipe, [1.0] * n))
    assert set(one.tolist()) == {0.0, 8.0}  # 2 * 1 / 0.25
    assert abs((one > 0).double().mean() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / n)
    # Two branches draw apart: both stay with probability 1 / 16.
    both = torch.tensor(changed(recipe, [1.0] * n, [1.0] * n))
    assert set(both.tolist()) == {0.0, 4.0, 8.0}
    assert abs((both == 8.0).double().mean() - 1 / 16) < 5 * math.sqrt(15 / 256 / n)
    elected = torch.tensor(changed(recipe.model_copy(update={"method": "dare_ties"}), [1.0] * n, [1.0] * n))
    assert torch.equal(elected > 0, both > 0)
    assert set(elected.tolist()) == {0.0, 8.0}  # the mean is over the branches that kept the entry


def test_dares_mean_over_seeds_is_the_linear_merge():
    generator = torch.Generator().manual_seed(0)
    taus = torch.randn(2, 50, generator=generator, dtype=torch.float64)
    num_seeds, density = 2000, 0.3
    runs = torch.tensor(
        [changed(MergeConfig(method="dare", density=density, seed=s), *taus.tolist()) for s in range(num_seeds)]
    )
    # Each entry's variance is (1 - density) / density * sum tau^2 / K^2.
    stderr = ((1 - density) / density * (taus**2).sum(0) / 4 / num_seeds).sqrt()
    assert ((runs.mean(0) - taus.mean(0)).abs() < 5 * stderr).all()


def test_dares_draws_depend_on_seed_tensor_and_branch_alone(monkeypatch):
    base = {"a": torch.zeros(1000), "b": torch.zeros(1000)}
    ones = {"a": torch.ones(1000), "b": torch.ones(1000)}
    recipe = MergeConfig(method="dare", density=0.5)
    alone = merge(base, {"x": ones}, recipe)
    assert not torch.equal(alone["a"], alone["b"])
    assert not torch.equal(alone["a"], merge(base, {"y": ones}, recipe)["a"])
    assert not torch.equal(alone["a"], merge(base, {"x": ones}, recipe.model_copy(update={"seed": 1}))["a"])
    backwards = merge(dict(reversed(base.items())), {"x": ones}, recipe)
    assert all(torch.equal(backwards[name], alone[name]) for name in base)
    # A second branch that has not moved: halves, of the same entries.
    assert torch.equal(merge(base, {"w": base, "x": ones}, recipe)["a"], alone["a"] / 2)
    monkeypatch.setattr(methods, "BLOCK", 7)
    assert torch.equal(merge(base, {"x": ones}, recipe)["a"], alone["a"])


@pytest.mark.parametrize("method", ["mean", "ties"])
def test_one_branch_and_equal_branches_come_back_bitwise(method):
    generator = torch.Generator().manual_seed(0)
    base, branch = ({"w": torch.randn(50, generator=generator)} for _ in range(2))
    recipe = MergeConfig(method=method, density=1.0 if method == "ties" else None)
    assert torch.equal(merge(base, {"a": branch}, recipe)["w"], branch["w"])
    assert torch.equal(merge(base, dict.fromkeys("abc", branch), recipe)["w"], branch["w"])
    assert torch.equal(merge(base, dict.fromkeys("abc", base), recipe)["w"], base["w"])


# Against formulas of others

VALUES = st.floats(-4, 4, width=32)


@st.composite
def merges(draw) -> tuple[torch.Tensor, torch.Tensor, MergeConfig]:
    """``[n]``, ``[K, n]`` in fp32, and a method without chance."""
    n, k = draw(st.integers(1, 40)), draw(st.integers(1, 4))
    rows = draw(st.lists(st.lists(VALUES, min_size=n, max_size=n), min_size=k + 1, max_size=k + 1))
    method = draw(st.sampled_from(["mean", "weighted", "task_arithmetic", "ties"]))
    settings = {}
    if method == "weighted":
        settings["weights"] = {f"b{i}": draw(st.floats(0.1, 9)) for i in range(k)}
    if method in ("task_arithmetic", "ties"):
        settings["scale"] = draw(st.floats(0.1, 3))
    if method == "ties":
        settings["density"] = draw(st.floats(0.01, 1))
    values = torch.tensor(rows, dtype=torch.float32)
    return values[0], values[1:], MergeConfig(method=method, **settings)


def straightforward(base_N: torch.Tensor, branches_KN: torch.Tensor, recipe: MergeConfig) -> torch.Tensor:
    """The same by sorting, entry by entry."""
    taus = (branches_KN.double() - base_N.double()).tolist()
    n, out = len(base_N), []
    if recipe.method == "ties":
        kept = max(1, round(recipe.kept * n))
        bars = [sorted(map(abs, tau), reverse=True)[kept - 1] for tau in taus]
        taus = [[x if abs(x) >= bar else 0.0 for x in tau] for tau, bar in zip(taus, bars, strict=True)]
    for column in zip(*taus, strict=True):
        if recipe.method == "ties":
            total = sum(column)
            agreeing = [x for x in column if x * total > 0]
            out.append(recipe.factor * sum(agreeing) / len(agreeing) if agreeing else 0.0)
        elif recipe.method == "task_arithmetic":
            out.append(recipe.factor * sum(column))
        else:
            weights = list((recipe.weights or {f"b{i}": 1.0 for i in range(len(column))}).values())
            out.append(sum(w * x for w, x in zip(weights, column, strict=True)) / sum(weights))
    return (base_N.double() + torch.tensor(out, dtype=torch.float64)).float()


@given(merges(), st.sampled_from([3, 2**16]))
def test_equals_the_straightforward_formula(case, block):
    base_N, branches_KN, recipe = case
    branches = {f"b{i}": {"w": row} for i, row in enumerate(branches_KN)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods, "BLOCK", block)
        merged = merge({"w": base_N}, branches, recipe)["w"]
    torch.testing.assert_close(merged, straightforward(base_N, branches_KN, recipe), atol=1e-6, rtol=1e-6)


@given(merges(), st.randoms(use_true_random=False))
def test_the_order_of_branches_does_not_matter(case, random):
    base_N, branches_KN, recipe = case
    branches = {f"b{i}": {"w": row} for i, row in enumerate(branches_KN)}
    shuffled = list(branches.items())
    random.shuffle(shuffled)
    assert torch.equal(merge({"w": base_N}, dict(shuffled), recipe)["w"], merge({"w": base_N}, branches, recipe)["w"])


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=50), st.data())
def test_the_kth_largest_magnitude_is_exact(values, data):
    count = data.draw(st.integers(1, len(values)))
    tensor = torch.tensor(values, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods, "BLOCK", 8)
        found = methods.kth_largest_magnitude(lambda begin, end: tensor[begin:end], len(values), count)
    assert found == sorted(map(abs, values), reverse=True)[count - 1]


@pytest.mark.parametrize("density", [0.25, 0.5, 1.0])
@pytest.mark.filterwarnings("ignore:The density")
def test_equals_peft(density):
    """Where the definitions agree: no equal magnitudes, no changes that cancel. peft's DARE has other draws."""
    utils = pytest.importorskip("peft.utils.merge_utils")
    generator = torch.Generator().manual_seed(0)
    taus = torch.randn(3, 20, 30, generator=generator, dtype=torch.float64)
    base = {"w": torch.zeros(20, 30, dtype=torch.float64)}
    branches = {f"b{i}": {"w": tau} for i, tau in enumerate(taus)}
    scale = 0.7
    weights = torch.full((3,), scale, dtype=torch.float64)
    for method, expected in (
        ("ties", utils.ties(list(taus), weights, density)),
        ("task_arithmetic", utils.task_arithmetic(list(taus), weights)),
    ):
        settings = {"density": density} if method == "ties" else {}
        merged = merge(base, branches, MergeConfig(method=method, scale=scale, **settings))["w"]
        torch.testing.assert_close(merged, expected, atol=1e-12, rtol=1e-12)
    # Our draws under peft's rules for the rest: each branch alone gives its entries that stayed, divided by density.
    dropped = [merge(base, {name: b}, MergeConfig(method="dare", density=density))["w"] for name, b in branches.items()]
    assert density == 1 or all((tau == 0).any() for tau in dropped)
    linear = merge(base, branches, MergeConfig(method="dare", density=density, scale=3 * scale))["w"]
    torch.testing.assert_close(linear, utils.dare_linear(dropped, weights, 1.0), atol=1e-12, rtol=1e-12)
    elected = merge(base, branches, MergeConfig(method="dare_ties", density=density, scale=scale))["w"]
    torch.testing.assert_close(elected, utils.dare_ties(dropped, weights, 1.0), atol=1e-12, rtol=1e-12)


# Kinds of numbers


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


def test_branches_in_fp32_of_a_bf16_base_are_not_rounded_first():
    base = {"w": torch.ones(1, dtype=torch.bfloat16)}
    small = 2**-9  # lost in bf16 next to 1; two of them are half a unit, three are more
    branches = {f"b{i}": {"w": torch.tensor([1 + small])} for i in range(3)}
    merged = merge(base, branches, MergeConfig(method="task_arithmetic"))["w"]
    assert merged.dtype == torch.bfloat16
    assert merged.item() == 1 + 2**-7


def test_integers_must_be_equal_and_are_the_bases():
    base = {"w": torch.ones(2), "step": torch.tensor([3, 4])}
    same = {"w": torch.zeros(2), "step": torch.tensor([3, 4])}
    merged = merge(base, {"a": same}, MergeConfig(method="ties"))
    assert merged["step"].dtype == torch.int64
    assert merged["step"].tolist() == [3, 4]
    with pytest.raises(UserError, match="'a': step holds integers that are not"):
        merge(base, {"a": same | {"step": torch.tensor([3, 5])}})
    with pytest.raises(UserError, match=r"'a': step is torch.float32, in the base it is torch.int64"):
        merge(base, {"a": same | {"step": torch.tensor([3.0, 4.0])}})


def test_no_entries_at_all():
    assert merge({"w": torch.empty(0, 3)}, {"a": {"w": torch.empty(0, 3)}})["w"].shape == (0, 3)


def test_inputs_stay_as_they_were():
    before = {name: value["weight"].clone() for name, value in BRANCHES.items()}
    merged = merge(BASE, BRANCHES)
    merged["weight"].zero_()
    assert torch.equal(BASE["weight"], torch.tensor([[1.0, 2.0]]))
    assert all(torch.equal(BRANCHES[name]["weight"], before[name]) for name in BRANCHES)


# What does not fit


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"text": 1.0}, "merge weights name"),
        ({"text": 1.0, "image": 1.0, "video": 1.0, "sound": 1.0}, "merge weights name"),
        ({"text": 0.0, "image": 0.0, "video": 0.0}, "must not all be 0"),
    ],
)
def test_weights_that_do_not_fit(weights, message):
    with pytest.raises(UserError, match=message):
        merge(BASE, BRANCHES, weighted(weights))


@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
def test_weights_that_are_none(value):
    with pytest.raises(UserError, match="must be finite, must not be negative"):
        methods.check_weights({"text": 1.0, "image": value}, ["image", "text"])
    with pytest.raises(ValidationError, match=r"weights\.image"):
        weighted({"text": 1.0, "image": value})


def test_weights_go_with_weighted():
    for recipe in (MergeConfig(method="weighted"), MergeConfig(weights={"text": 1.0})):
        with pytest.raises(UserError, match="go with method 'weighted'"):
            merge(BASE, BRANCHES, recipe)


@pytest.mark.parametrize("branch", ["base", "text"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_of_a_broken_model(branch, value):
    base, branches = dict(BASE), {name: dict(value) for name, value in BRANCHES.items()}
    models = {"base": base, **branches}
    models[branch]["weight"] = torch.tensor([[1.0, value]])
    with pytest.raises(UserError, match="weight has weights that are NaN or infinite"):
        merge(base, branches, MergeConfig(method="ties"))


def test_models_that_do_not_fit():
    with pytest.raises(UserError, match="at least one branch"):
        merge(BASE, {})
    with pytest.raises(UserError, match="'text' is not the same model as the base: bias is only in one"):
        merge(BASE, {"text": {"weight": BASE["weight"]}})
    with pytest.raises(UserError, match="extra is only in one"):
        merge(BASE, {"text": BASE | {"extra": torch.zeros(1)}})
    with pytest.raises(UserError, match=r"weight has shape \(2,\), the base has \(1, 2\)"):
        merge(BASE, {"text": BASE | {"weight": torch.zeros(2)}})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": 0.5}, "method 'mean' takes no 'density'; ties, dare, dare_ties do"),
        ({"scale": 0.5}, "method 'mean' takes no 'scale'; task_arithmetic, ties, dare, dare_ties do"),
        ({"method": "task_arithmetic", "density": 0.5}, "method 'task_arithmetic' takes no 'density'"),
        ({"method": "ties", "seed": 1}, "method 'ties' takes no 'seed'; dare, dare_ties do"),
        ({"method": "ties", "density": 0.0}, "greater than 0"),
        ({"method": "dare", "density": 1.1}, "less than or equal to 1"),
        ({"method": "ties", "scale": 0.0}, "greater than 0"),
    ],
)
def test_settings_that_do_not_fit_the_method(settings, message):
    with pytest.raises(ValidationError, match=message):
        MergeConfig(**settings)


@pytest.mark.parametrize("method", SPARSE)
def test_the_default_density_is_a_fifth(method):
    recipe = MergeConfig(method=method)
    assert (recipe.kept, recipe.factor, str(recipe)) == (0.2, 1.0, f"{method} density 0.2 scale 1")
