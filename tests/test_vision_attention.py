"""Attention within segments against a loop over them; one call per layer inside the towers."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from copd_engine.models.vision_attention import NAME, vision_attention
from copd_engine.packing import pack
from tests.families import IMAGE, MERGE, VIDEO, VISION_FAMILIES, build, make_prompt, response
from tests.plain import plain_model

CASES = {
    "one": [7],
    "equal": [4, 4, 4],
    "different": [3, 1, 8, 2],
    "repeated": [2, 5, 2, 2, 5, 1],
    "empty between": [3, 0, 4],
    "windows and rests": [4, 2, 2, 1] * 3,
}


def inputs(num_rows, dtype=torch.float64):
    generator = torch.Generator().manual_seed(num_rows)
    return [torch.randn(1, 3, num_rows, 8, generator=generator, dtype=dtype).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("lengths", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("scaling", [None, 0.7])
def test_segments_attend_within_themselves(lengths, scaling):
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    packed, looped = inputs(sum(lengths)), inputs(sum(lengths))
    out, weights = vision_attention(torch.nn.Module(), *packed, None, scaling=scaling, cu_seq_lens_q=cu_seqlens)
    assert weights is None
    parts = zip(*(x.split(lengths, dim=2) for x in looped), strict=True)
    alone = torch.cat([scaled_dot_product_attention(q, k, v, scale=scaling) for q, k, v in parts], dim=2)
    torch.testing.assert_close(out, alone.transpose(1, 2))
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=out.dtype)
    (out * direction).sum().backward()
    (alone.transpose(1, 2) * direction).sum().backward()
    for one, other in zip(packed, looped, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_calls_that_it_cannot_answer():
    q, k, v = inputs(4)
    cu_seqlens = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seq_lens_q"):
        vision_attention(torch.nn.Module(), q, k, v, None)
    with pytest.raises(ValueError, match="no mask"):
        vision_attention(torch.nn.Module(), q, k, v, torch.zeros(1, 1, 4, 4), cu_seq_lens_q=cu_seqlens)
    both = [x.repeat(2, 1, 1, 1) for x in (q, k, v)]
    with pytest.raises(ValueError, match="one row"):
        vision_attention(torch.nn.Module(), *both, None, cu_seq_lens_q=cu_seqlens)


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_a_tower_calls_it_once_per_layer(family, monkeypatch):
    from transformers import AttentionInterface

    policy = build(family)
    calls = []

    def counted(*args, **options):
        calls.append(options["cu_seq_lens_q"].tolist())
        return vision_attention(*args, **options)

    monkeypatch.setitem(AttentionInterface._global_mapping, NAME, counted)
    prompts = [make_prompt(policy, 0, images=((2, 3), (1, 1), (3, 3))), make_prompt(policy, 1, videos=((2, 2, 2),))]
    batch = pack(prompts, [response(0, 2)] * 2, (IMAGE, VIDEO), MERGE)
    policy.hidden_states(batch)
    assert len(calls) == 3
    whole_frames = [0, 24, 28, 64, 80, 96]  # patches: 4 per token; each frame of a video is a segment
    if family == "qwen2_5_vl":
        windows = [0, 16, 24, 28, 44, 52, 60, 64, 80, 96]  # 2 x 2 tokens, and what is left at the edges
        assert calls == [windows, whole_frames, windows]
    else:
        assert calls == [whole_frames] * 3


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_features_equal_those_of_transformers_loop_over_images(family):
    policy = build(family)
    plain = plain_model(policy)
    pixels = torch.randn(24 + 4 + 36 + 32, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(0))
    grid = torch.tensor([[1, 4, 6], [1, 2, 2], [1, 6, 6], [2, 4, 4]])
    own, looped = (tower(pixels, grid_thw=grid, return_dict=True) for tower in (policy.visual, plain.model.visual))
    assert policy.visual.config._attn_implementation == NAME
    assert plain.model.visual.config._attn_implementation == "sdpa"
    torch.testing.assert_close(own.pooler_output, looped.pooler_output, atol=1e-5, rtol=1e-5)
