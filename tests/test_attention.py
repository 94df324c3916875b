"""Packed attention against each sample alone: outputs, gradients, masks, and what is refused.

The truth is softmax(q k^T / sqrt(d)) v of one sample at a time in fp64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from copd_engine.models import attention, packed_layout
from copd_engine.models.attention import sdpa_packed, varlen_attention, varlen_packed
from copd_engine.models.flash import check_version, resolve_attention
from copd_engine.models.packed_layout import BLOCK, PackedLayout
from copd_engine.types import UserError
from tests import model_inputs
from tests.helpers import prompts_of_all_domains
from tests.model_inputs import packed_logp

model = model_inputs.model
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8
CPU = torch.device("cpu")
# Prompt length and its responses' lengths, then padding rows.
CASES = {
    "one prompt": ([(5, [])], 0),
    "one sample": ([(5, [7])], 0),
    "one token each": ([(1, [1])], 0),
    "one-token responses": ([(5, [0, 0]), (3, [0])], 0),
    "a group": ([(5, [7, 0, 3, 7, 1])], 0),
    "groups of mixed lengths": ([(5, [7, 0, 3]), (1, [2]), (17, [1, 1, 31]), (5, [6, 2])], 3),
    "long responses in blocks": ([(40, [BLOCK + 37, 3 * BLOCK, BLOCK + 36, BLOCK]), (40, [BLOCK + 1, 2])], 5),
    "a long prompt with short responses": ([(700, [3, 90, 2, 88])], 1),
}


def layout_of(groups: list[tuple[int, list[int]]], padding: int = 0) -> PackedLayout:
    prompts = tuple(prompt for prompt, _ in groups)
    responses = tuple(length for _, lengths in groups for length in lengths)
    prompt_of = tuple(p for p, (_, lengths) in enumerate(groups) for _ in lengths)
    return PackedLayout(sum(prompts) + sum(responses) + padding, prompts, responses, prompt_of, CPU)


def samples_of(layout: PackedLayout) -> list[tuple[list[int], int]]:
    """Rows of each sample (prompts alone, then prompt and response), and how many of its last rows are its own."""
    starts = [0]
    for length in (*layout.prompt_lengths_P, *layout.response_lengths_B):
        starts.append(starts[-1] + length)
    rows = [list(range(a, b)) for a, b in itertools.pairwise(starts)]
    num_prompts = len(layout.prompt_lengths_P)
    alone = [(rows[p], len(rows[p])) for p in range(num_prompts)]
    return alone + [
        (rows[p] + own, len(own)) for p, own in zip(layout.prompt_of_B, rows[num_prompts:], strict=True) if own
    ]


def naive(query, key, value, layout: PackedLayout) -> torch.Tensor:
    """``[1, T, heads, head_dim]``, sample by sample, in the inputs' dtype; 0 on padding rows."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    out = torch.zeros_like(query)
    for rows, own in samples_of(layout):
        q, k, v = (x[0][:, rows] for x in (query, key, value))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), float("-inf"))
        out = out.index_copy(2, torch.tensor(rows[-own:]), (scores.softmax(-1) @ v)[None, :, -own:])
    return out.transpose(1, 2)


def qkv(tokens: int, dtype: torch.dtype = torch.float32, heads=(HEADS, KV_HEADS, KV_HEADS)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, h, tokens, HEAD_DIM, generator=generator, dtype=torch.float64).to(dtype) for h in heads]


def outputs_and_gradients(attend: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The output, and the gradients of q, k and v for a fixed random cotangent."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = attend(*leaves)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    return [out.detach(), *torch.autograd.grad((out * direction).sum(), leaves)]


def packed(layout: PackedLayout, **kwargs: Any) -> Callable[..., torch.Tensor]:
    return lambda q, k, v: sdpa_packed(q, k, v, layout.sdpa, **kwargs)


def errors(found: list[torch.Tensor], truth: list[torch.Tensor]) -> list[float]:
    return [float((f.double() - t.double()).norm() / t.double().norm()) for f, t in zip(found, truth, strict=True)]


# Scaled dot-product attention


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("heads", [(4, 2, 2), (2, 2, 2), (4, 1, 1)], ids=["grouped", "equal", "one key head"])
def test_packed_attention_equals_each_sample_alone(case, heads):
    layout = layout_of(*CASES[case])
    inputs = qkv(layout.num_tokens, heads=heads)
    found = outputs_and_gradients(packed(layout), inputs)
    truth = outputs_and_gradients(lambda *x: naive(*x, layout), [x.double() for x in inputs])
    # fp32: 24 bits, sums of up to a thousand terms.
    for f, t in zip(found, truth, strict=True):
        torch.testing.assert_close(f.double(), t, atol=5e-6, rtol=5e-6)


@pytest.mark.parametrize("case", CASES)
def test_padding_rows_give_zero_and_get_no_gradient(case):
    groups, _ = CASES[case]
    layout = layout_of(groups, padding=3)
    inputs = qkv(layout.num_tokens)
    for x in inputs:
        x[:, :, -3:] = float("nan")  # a real row that looked at one would be NaN
    for attend in (packed(layout), lambda q, k, v: varlen_packed(naive_varlen, q, k, v, layout.varlen)):
        out, *gradients = outputs_and_gradients(attend, inputs)
        assert torch.equal(out[:, -3:], torch.zeros_like(out[:, -3:]))
        assert torch.isfinite(out).all()
        assert all(torch.equal(g[:, :, -3:], torch.zeros_like(g[:, :, -3:])) for g in gradients)


@pytest.mark.parametrize("case", ["groups of mixed lengths", "long responses in blocks"])
def test_bf16_errs_at_most_twice_as_much_as_plain_sdpa_in_bf16(case):
    """Plain: one call per sample with transformers' own arguments, in bf16; the truth from the same rounded inputs."""
    layout = layout_of(*CASES[case])
    inputs = qkv(layout.num_tokens, torch.bfloat16)

    def plain(query, key, value):
        out = torch.zeros_like(query)
        for rows, own in samples_of(layout):
            q, k, v = (x[:, :, rows] for x in (query, key, value))
            sample = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            out = out.index_copy(2, torch.tensor(rows[-own:]), sample[:, :, -own:])
        return out.transpose(1, 2)

    truth = outputs_and_gradients(lambda *x: naive(*x, layout), [x.double() for x in inputs])
    ours = errors(outputs_and_gradients(packed(layout), inputs), truth)
    theirs = errors(outputs_and_gradients(plain, inputs), truth)
    assert all(own < 2 * other + 1e-4 for own, other in zip(ours, theirs, strict=True)), (ours, theirs)
    assert min(theirs) > 1e-4  # it was bf16


@settings(max_examples=40)
@given(
    groups=st.lists(st.tuples(st.integers(1, 40), st.lists(st.integers(0, 40), max_size=5)), min_size=1, max_size=6),
    padding=st.integers(0, 4),
    block=st.integers(1, 9),
    call_pairs=st.sampled_from([0, 50, 4096]),
)
def test_any_layout_with_any_block_and_bucket(groups, padding, block, call_pairs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_layout, "BLOCK", block)
        patch.setattr(packed_layout, "CALL_PAIRS", call_pairs)
        layout = layout_of(groups, padding)
        inputs = qkv(layout.num_tokens)
        torch.testing.assert_close(packed(layout)(*inputs), naive(*inputs, layout), atol=5e-6, rtol=5e-6)
        # Bounded padding: every bucket may waste one call or a share of its work.
        plan = layout.sdpa
        num_calls = len(plan.whole) + len(plan.continuations)
        in_blocks = sum(n * q * (p + q) for n, p, q in plan.continuations) if block < 41 else 0
        assert plan.num_pairs <= layout.num_pairs * (1 + 1 / 16) + num_calls * call_pairs + in_blocks


def test_few_calls_for_small_sequences_and_little_padding_for_long_ones():
    generator = torch.Generator().manual_seed(0)
    short = layout_of([(10 + i % 3, [4, 5, 6, 7]) for i in range(32)])
    assert len(short.sdpa.whole) == 1
    assert len(short.sdpa.continuations) == 3  # one for each prompt length
    lengths = torch.empty(64).log_normal_(6.5, 1.0, generator=generator).int().clamp(1, 8192).tolist()
    group = layout_of([(5, [3, 900, 4])])
    assert group.sdpa.whole == ((1, 905),)  # the longest response goes with its prompt: nothing of it is masked
    long = layout_of([(100, [length]) for length in lengths])
    assert long.sdpa.num_pairs / long.num_pairs < 1.07


@pytest.mark.parametrize("case", CASES)
def test_without_blocks_as_on_cuda(case, monkeypatch):
    """Torch makes the mask itself then, aligned with the last key; on CUDA in its kernels, here as a tensor."""
    monkeypatch.setattr(packed_layout, "NO_MASK_DEVICES", ("cpu",))
    layout = layout_of(*CASES[case])
    assert layout.sdpa.block is None
    assert layout.sdpa.mask.numel() == 0
    inputs = qkv(layout.num_tokens)
    found = outputs_and_gradients(packed(layout), inputs)
    truth = outputs_and_gradients(lambda *x: naive(*x, layout), [x.double() for x in inputs])
    for f, t in zip(found, truth, strict=True):
        torch.testing.assert_close(f.double(), t, atol=5e-6, rtol=5e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_sdpa_on_the_gpu_equals_each_sample_alone(case, dtype):
    layout = layout_of(*CASES[case])
    inputs = [x.to(dtype) for x in wide_qkv(layout.num_tokens)]
    truth = outputs_and_gradients(lambda *x: naive(*x, layout), [x.double() for x in inputs])
    plain = errors(outputs_and_gradients(packed(layout), inputs), truth)
    ours = errors(on_the_gpu(lambda q, k, v, plan: sdpa_packed(q, k, v, plan.sdpa), layout, inputs), truth)
    floor = 1e-3 if dtype == torch.bfloat16 else 1e-5
    assert all(own < 2 * other + floor for own, other in zip(ours, plain, strict=True)), (ours, plain)


def on_the_gpu(attend: Callable[..., torch.Tensor], layout: PackedLayout, inputs: list[torch.Tensor]):
    """Output and gradients of ``attend(q, k, v, layout)`` on the GPU, for the cotangent of the other tests."""
    device = torch.device("cuda")
    leaves = [x.to(device).requires_grad_() for x in inputs]
    out = attend(*leaves, replace(layout, device=device))
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out)
    return [x.detach().cpu() for x in (out, *torch.autograd.grad((out * direction).sum(), leaves))]


# Long rows


class LargestTensor(TorchDispatchMode):
    """The largest tensor that any operation returns, and the largest mask that attention is given, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.tensor = self.mask = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple) else (out,):
            if isinstance(x, torch.Tensor):
                self.tensor = max(self.tensor, x.numel())
        if "scaled_dot_product" in str(func) and (kwargs or {}).get("attn_mask") is not None:
            self.mask = max(self.mask, kwargs["attn_mask"].numel())
        return out


@pytest.mark.parametrize(
    ("groups", "largest_mask"),
    [
        ([(1024, [31 * 1024])], 0),
        ([(32 * 1024, [])], 0),
        ([(1024, [8000, 8000, 7000, 7000])], BLOCK * (1024 + 8000)),
    ],
    ids=["one response", "one prompt", "a group"],
)
def test_no_mask_or_temporary_of_a_32k_row_is_larger_than_a_block_of_its_keys(groups, largest_mask):
    layout = layout_of(groups)
    inputs = [x.requires_grad_() for x in qkv(layout.num_tokens, heads=(1, 1, 1))]
    with LargestTensor() as largest:
        out = sdpa_packed(*inputs, layout.sdpa)
        out.sum().backward()
    assert largest.mask <= largest_mask
    longest = max(prompt + length for prompt, lengths in groups for length in (*lengths, 0))
    assert largest.tensor <= max(BLOCK * longest, 2 * layout.num_tokens * HEAD_DIM)
    assert torch.isfinite(inputs[0].grad).all()


def test_backward_keeps_no_mask_and_no_copy_per_block():
    """Bytes kept for backward grow with the row, not with its square: twice the row, at most 2.2 times the bytes."""

    def kept(length: int) -> int:
        layout = layout_of([(64, [length, length])])
        storages: dict[int, int] = {}

        def pack(x: torch.Tensor) -> torch.Tensor:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        inputs = [x.requires_grad_() for x in qkv(layout.num_tokens)]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            sdpa_packed(*inputs, layout.sdpa)
        return sum(storages.values()) - layout.sdpa.mask.numel() * 4

    assert kept(4 * BLOCK) < 2.2 * kept(2 * BLOCK)


# flash-attn's variable-length call


def naive_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """``flash_attn.flash_attn_varlen_func`` (2.1 and later) word by word, with its demands on the arguments.

    q ``[total_q, heads, d]``, k and v ``[total_k, kv_heads, d]``; segment i is rows ``cu_seqlens[i]`` to
    ``cu_seqlens[i + 1]``; a causal mask is aligned to the bottom right corner of each segment's scores.
    """
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert (len(q), len(k), len(v)) == (int(cu_seqlens_q[-1]), int(cu_seqlens_k[-1]), int(cu_seqlens_k[-1]))
    lengths_q, lengths_k = cu_seqlens_q.diff(), cu_seqlens_k.diff()
    assert int(lengths_q.min()) > 0
    assert (int(lengths_q.max()), int(lengths_k.max())) == (max_seqlen_q, max_seqlen_k)
    scale = softmax_scale if softmax_scale is not None else q.shape[-1] ** -0.5
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    outputs = []
    for i, (num_q, num_k) in enumerate(zip(lengths_q.tolist(), lengths_k.tolist(), strict=True)):
        part_q = q[int(cu_seqlens_q[i]) :][:num_q].transpose(0, 1)
        part_k, part_v = (x[int(cu_seqlens_k[i]) :][:num_k].transpose(0, 1) for x in (k, v))
        scores = part_q @ part_k.transpose(-1, -2) * scale
        if causal:
            row, column = torch.arange(num_q)[:, None], torch.arange(num_k)[None]
            scores = scores.masked_fill(column > row + num_k - num_q, float("-inf"))
        outputs.append((scores.softmax(-1) @ part_v).transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("case", CASES)
def test_the_varlen_call_equals_each_sample_alone(case):
    layout = layout_of(*CASES[case])
    inputs = qkv(layout.num_tokens)
    found = outputs_and_gradients(lambda q, k, v: varlen_packed(naive_varlen, q, k, v, layout.varlen), inputs)
    truth = outputs_and_gradients(lambda *x: naive(*x, layout), [x.double() for x in inputs])
    for f, t in zip(found, truth, strict=True):
        torch.testing.assert_close(f.double(), t, atol=5e-6, rtol=5e-6)


def test_the_varlen_call_hands_on_the_scale_and_takes_the_lse_of_flash_attn_3():
    layout = layout_of([(5, [7, 3])])
    inputs = qkv(layout.num_tokens)

    def with_lse(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return naive_varlen(*args, **kwargs), None

    found = varlen_packed(with_lse, *inputs, layout.varlen, scaling=0.5)
    torch.testing.assert_close(found, sdpa_packed(*inputs, layout.sdpa, scaling=0.5), atol=1e-6, rtol=1e-6)
    assert not torch.allclose(found, sdpa_packed(*inputs, layout.sdpa))


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_flash_attn_on_the_gpu_equals_each_sample_alone(case):
    if resolve_attention("auto", torch.device("cuda")) != "flash":
        pytest.skip("flash-attn is not installed")
    layout = layout_of(*CASES[case])
    inputs = [x.to(torch.bfloat16) for x in wide_qkv(layout.num_tokens)]

    def flash(q, k, v, layout):
        return attention.flash_attention(torch.nn.Module(), q, k, v, None, layout=layout)[0]

    truth = outputs_and_gradients(lambda *x: naive(*x, layout), [x.double() for x in inputs])
    plain = errors(outputs_and_gradients(packed(layout), inputs), truth)
    ours = errors(on_the_gpu(flash, layout, inputs), truth)
    assert all(own < 2 * other + 1e-3 for own, other in zip(ours, plain, strict=True)), (ours, plain)


@pytest.mark.gpu
def test_flash_attn_of_a_vision_tower_on_the_gpu():
    device = torch.device("cuda")
    if resolve_attention("auto", device) != "flash":
        pytest.skip("flash-attn is not installed")
    query, key, value = (x.to(torch.bfloat16) for x in wide_qkv(24, heads=(2, 2, 2)))
    cu_seqlens = torch.tensor([0, 4, 20, 24], dtype=torch.int32)
    out, _ = attention.flash_vision_attention(
        torch.nn.Module(),
        *(x.to(device) for x in (query, key, value)),
        None,
        cu_seq_lens_q=cu_seqlens.to(device),
        max_length_q=16,
    )
    truth = naive_varlen(*(x[0].transpose(0, 1).double() for x in (query, key, value)), cu_seqlens, cu_seqlens, 16, 16)
    torch.testing.assert_close(out[0].cpu().double(), truth, atol=2e-2, rtol=2e-2)


def wide_qkv(tokens: int, heads=(HEADS, KV_HEADS, KV_HEADS), head_dim: int = 64) -> list[torch.Tensor]:
    """flash-attn wants head dimensions that are multiples of 8; 64 is one it is tuned for."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, h, tokens, head_dim, generator=generator) for h in heads]


# The choice


def test_auto_is_sdpa_without_a_gpu_and_flash_says_what_is_missing(monkeypatch):
    assert resolve_attention("auto", CPU) == "sdpa"
    assert resolve_attention("sdpa", torch.device("cuda")) == "sdpa"
    with pytest.raises(UserError, match="flash-attn runs on CUDA, the model is on cpu"):
        resolve_attention("flash", CPU)
    with pytest.raises(UserError, match="must be auto, flash or sdpa"):
        resolve_attention("flex", CPU)
    monkeypatch.setattr("copd_engine.models.flash.flash_module", lambda device: None)
    assert resolve_attention("auto", torch.device("cuda")) == "sdpa"
    with pytest.raises(UserError, match=r"pip install 'copd-engine\[gpu\]'"):
        resolve_attention("flash", torch.device("cuda"))
    monkeypatch.setattr("copd_engine.models.flash.flash_module", lambda device: "flash_attn")
    assert resolve_attention("auto", torch.device("cuda")) == "flash"
    assert resolve_attention("auto", torch.device("cuda"), torch.float32) == "sdpa"
    with pytest.raises(UserError, match=r"computes in bfloat16, the model in float32: set model\.dtype=bfloat16"):
        resolve_attention("flash", torch.device("cuda"), torch.float32)


def test_flash_attn_2_must_align_causal_masks_with_the_last_key():
    for version in ("2.1.0", "2.8.3", "2.10.0.post1", "3.0.0b1"):
        check_version(version)
    with pytest.raises(UserError, match=r"flash-attn 2\.0\.9 is too old: install 2\.1 or later"):
        check_version("2.0.9")


def test_transformers_still_refuses_flex_attention_for_qwen3_vl(model):
    """The reason why packed attention is our own; when this fails, flex_attention has become a choice."""
    with pytest.raises(ValueError, match="does not support an attention implementation through torch's flex_attention"):
        model[0].module.set_attn_implementation("flex_attention")


# What transformers calls


def test_attention_without_layout_is_plain_and_not_causal():
    query, key, value = (x.repeat(2, 1, 1, 1) for x in qkv(3, heads=(2, 1, 1)))
    out, weights = varlen_attention(torch.nn.Module(), query, key, value, None)
    scores = (query @ key.transpose(-1, -2) / math.sqrt(HEAD_DIM)).softmax(-1) @ value  # one key head serves both
    torch.testing.assert_close(out, scores.transpose(1, 2))
    assert weights is None


def test_attention_refuses_what_it_would_get_wrong(model):
    policy, encoder = model
    prompts = prompts_of_all_domains(encoder, 1)
    layout_of = policy.module.model.language_model  # a real layout, caught on its way
    caught = {}
    handle = layout_of.register_forward_pre_hook(lambda _, args, kwargs: caught.update(kwargs), with_kwargs=True)
    packed_logp(policy, encoder, prompts[0], torch.tensor([1, 2]))
    handle.remove()
    plain = torch.nn.Module()
    two = [x.repeat(2, 1, 1, 1) for x in qkv(3)]
    with pytest.raises(ValueError, match=r"takes one row of \d+ tokens, got a batch of 2 of 3 tokens"):
        varlen_attention(plain, *two, None, layout=caught["layout"])
    with pytest.raises(ValueError, match="takes a layout, not an attention_mask"):
        varlen_attention(plain, *qkv(3), torch.ones(1, 1, 3, 3))
    for option in ("softcap", "sliding_window", "s_aux"):
        with pytest.raises(ValueError, match=f"does not support {option}"):
            varlen_attention(plain, *qkv(3), None, **{option: 4})
    with pytest.raises(ValueError, match="takes one row with cu_seq_lens_q"):
        attention.flash_vision_attention(plain, *qkv(3), None)
    # transformers would run the decoder without a causal mask: wrong numbers, no error.
    with pytest.raises(ValueError, match="needs a layout in a decoder"):
        policy.module(input_ids=prompts[0].input_ids_T[None])
