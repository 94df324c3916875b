"""Buckets and the checks of names, shapes and sums, without an engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from copd_engine.rollout.sglang_weights import (
    ALIGNMENT,
    KeptBuffers,
    WeightList,
    buckets,
    checkpoint_shapes,
    word_sum,
)


def weight_list(tensors: dict[str, torch.Tensor], dtype: torch.dtype | None = None) -> WeightList:
    return WeightList(
        {name: name for name in tensors},
        {name: (name,) for name in tensors},
        {name: dtype or tensor.dtype for name, tensor in tensors.items()},
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
    )


@given(
    st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=8),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.integers(1, 600),
)
def test_buckets_hold_every_tensor_as_the_engine_wants_it(
    shapes: list[list[int]], dtype: torch.dtype, max_bytes: int
) -> None:
    tensors = {str(i): torch.randn(shape, dtype=torch.float32) for i, shape in enumerate(shapes)}
    found = {}
    seen = list(buckets(tensors, weight_list(tensors, dtype), max_bytes))
    for bucket in seen:
        assert bucket.flat.is_shared()
        assert bucket.flat.numel() <= max_bytes or len(bucket.entries) == 1
        for name, shape, dtype_name, start, end in bucket.entries:
            assert start % ALIGNMENT == 0
            found[name] = bucket.flat[start:end].view(getattr(torch, dtype_name)).view(shape)
            assert bucket.sums[name] == word_sum(found[name])
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor.to(dtype))
    # The receiver may still be copying from one when the next is filled.
    assert len({bucket.flat.untyped_storage().data_ptr() for bucket in seen if bucket.flat.numel()}) == len(
        [bucket for bucket in seen if bucket.flat.numel()]
    )


def test_the_next_swap_fills_the_same_memory_a_bucket_each() -> None:
    kept = KeptBuffers()
    swaps = []
    for seed in range(3):
        torch.manual_seed(seed)
        tensors = {name: torch.randn(16 + (seed == 2), 3) for name in "abc"}  # the last one's are larger
        found = list(buckets(tensors, weight_list(tensors), 1, kept))
        for bucket, (name, tensor) in zip(found, tensors.items(), strict=True):
            assert torch.equal(bucket.flat[: tensor.nbytes].view(torch.float32).view(tensor.shape), tensor)
            assert bucket.flat.is_shared()
            assert bucket.sums == {name: word_sum(tensor)}
        swaps.append([bucket.flat.data_ptr() for bucket in found])
    first, second, larger = swaps
    assert first == second
    assert len(set(first)) == 3
    assert not set(first) & set(larger)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8])
def test_the_sum_of_a_whole_is_that_of_its_parts_and_notices_one_bit(dtype: torch.dtype) -> None:
    tensor = (100 * torch.randn(33, 7)).to(dtype)
    parts = [word_sum(part) for part in (tensor[:5], tensor[5:].t(), torch.zeros(3, dtype=dtype))]
    assert word_sum(tensor) == sum(parts) % 2**64
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    assert word_sum(tensor) == sum(tensor.view(-1).view(words).tolist()) % 2**64
    changed = tensor.clone()
    changed.view(-1).view(torch.uint8)[17] ^= 1
    assert word_sum(changed) != word_sum(tensor)


def test_fused_parameters_are_the_sum_of_what_goes_into_them_and_tied_ones_count_in_each() -> None:
    weights = WeightList({}, {"q": ("qkv",), "k": ("qkv",), "embed": ("embed", "head")}, {}, {})
    sums = {"q": 2**64 - 1, "k": 3, "embed": 7}
    assert weights.expected_sums(sums) == {"qkv": 2, "embed": 7, "head": 7}


def test_names_shapes_and_dtypes_are_checked() -> None:
    tensors = {"up.weight": torch.zeros(4, 2), "up.bias": torch.zeros(4)}
    weights = weight_list(tensors)
    weights.check("a", tensors)
    weights.check("a", {**tensors, "up.bias": torch.zeros(4, dtype=torch.bfloat16)})
    for wrong, message in (
        ({**tensors, "up.weights": torch.zeros(1)}, "weights of 'a': unknown name 'up.weights' .*mean 'up.weight'"),
        ({"up.weight": tensors["up.weight"]}, "weights of 'a': 'up.bias' is missing"),
        ({**tensors, "up.bias": torch.zeros(4, 1)}, r"'up.bias' has the shape \[4, 1\], the engine's \[4\]"),
        ({**tensors, "up.bias": torch.zeros(4, dtype=torch.int32)}, "'up.bias' is int32, the engine's float32"),
    ):
        with pytest.raises(ValueError, match=message):
            weights.check("a", wrong)


def answer() -> dict:
    entries = {"gate": "gate_up", "up": "gate_up", "embed": "embed"}
    tensors = {name: {"as": name, "parameters": [parameter], "dtype": "float32"} for name, parameter in entries.items()}
    return {"tensors": tensors, "parameters": {"gate_up": [6, 4], "embed": [64, 4]}}


def test_the_engines_own_list_says_what_it_takes() -> None:
    tensors = {"gate": torch.zeros(3, 4), "up": torch.zeros(3, 4), "embed": torch.zeros(35, 4)}
    on_disk = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    weights = WeightList.from_answers([answer()], tensors, on_disk)  # a vocabulary of 35 is rounded up to 64
    assert weights.parameters_of["up"] == ("gate_up",)
    older = answer()
    older["tensors"]["embed"]["as"] = "older.embed"
    weights = WeightList.from_answers([older], tensors, {"older.embed": (35, 4)})
    (bucket,) = buckets(tensors, weights, 1 << 20)
    assert [entry[0] for entry in bucket.entries] == list(bucket.sums) == ["gate", "up", "older.embed"]
    assert set(weights.expected_sums(bucket.sums)) == {"gate_up", "embed"}
    with pytest.raises(ValueError, match=r"'embed' has the shape \[35, 4\], in the model .* from \[36, 4\]"):
        WeightList.from_answers([older], tensors, {"older.embed": (36, 4)})
    refused = answer()
    refused["tensors"]["up"] = {"error": "the engine's has the shape [3, 5]"}
    with pytest.raises(ValueError, match=r"does not take 'up' of shape \[3, 4\]: the engine's has the shape \[3, 5\]"):
        WeightList.from_answers([refused], tensors, {})
    unknown = answer()
    del unknown["tensors"]["up"]
    with pytest.raises(ValueError, match="no weight 'up'"):
        WeightList.from_answers([unknown], tensors, {})


def test_shapes_are_read_from_all_files_of_a_checkpoint(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(())}, tmp_path / "model-1.safetensors")
    save_file({"c": torch.zeros(4)}, tmp_path / "model-2.safetensors")
    assert checkpoint_shapes(tmp_path) == {"a": (2, 3), "b": (), "c": (4,)}
    assert checkpoint_shapes(tmp_path / "nothing") == {}
