"""Liger: when it is used, what it replaces in each family, RoPE in Triton's interpreter, and all of it on a GPU."""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch

from copd_engine.models import liger
from copd_engine.models.liger import apply_liger, resolve_liger
from copd_engine.packing import pack
from copd_engine.types import UserError
from tests.families import FAMILIES, IMAGE, MERGE, VIDEO, build, prompts_of, response

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


def modeling_of(policy):
    return sys.modules[type(policy.backbone).__module__]


@pytest.fixture
def patched(request):
    """``patched(family)``: a policy with Liger; transformers' RoPE is put back at the end."""
    pytest.importorskip("liger_kernel")
    plain = {}

    def build_patched(family):
        policy = build(family)
        modeling = modeling_of(policy)
        plain.setdefault(modeling, modeling.apply_rotary_pos_emb)
        return policy, apply_liger(policy.module, policy.backbone)

    yield build_patched
    for modeling, rope in plain.items():
        modeling.apply_rotary_pos_emb = rope
    liger._replace_rope.cache_clear()


def test_the_choice(monkeypatch):
    installed = SimpleNamespace(find_spec=lambda name: object())
    monkeypatch.setattr(liger, "importlib", SimpleNamespace(util=installed))
    assert resolve_liger("auto", CUDA)
    assert resolve_liger(True, CUDA)
    assert not resolve_liger("auto", CPU)
    assert not resolve_liger(False, CUDA)
    with pytest.raises(UserError, match=r"model\.liger = true: its kernels run on CUDA, the device is 'cpu'"):
        resolve_liger(True, CPU)
    missing = SimpleNamespace(find_spec=lambda name: None)
    monkeypatch.setattr(liger, "importlib", SimpleNamespace(util=missing))
    assert not resolve_liger("auto", CUDA)
    with pytest.raises(UserError, match="needs the package liger-kernel: install the extra 'gpu'"):
        resolve_liger(True, CUDA)


# Decoder: two norms per layer and the last one; Qwen3 two more per layer. Qwen2.5-VL's tower: norms and SwiGLU too.
REPLACED = {
    "qwen3_vl": (13, 3),
    "qwen3_vl_moe": (13, 0),
    "qwen2_5_vl": (7 + 7, 3 + 3),
    "qwen3": (13, 3),
    "qwen3_moe": (13, 0),
    "qwen2": (7, 3),
    "llama": (7, 3),
    "mistral": (7, 3),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_replaced(family, patched):
    policy, words = patched(family)
    norms, mlps = REPLACED[family]
    assert f": {norms} RMSNorm, {mlps} SwiGLU, RoPE" in words
    names = [part._get_name() for part in policy.module.modules()]
    assert (names.count("LigerRMSNorm"), names.count("LigerSwiGLUMLP")) == (norms, mlps)
    # A clone runs on its own weights, and another model of the type is left alone.
    clone, other = policy.clone(), build(family)
    assert [part._get_name() for part in clone.module.modules()] == names
    for part in clone.module.modules():
        if "forward" in vars(part):
            assert part.forward.__self__ is part
    assert "LigerRMSNorm" not in [part._get_name() for part in other.module.modules()]


@pytest.mark.parametrize("family", FAMILIES)
def test_rope_on_a_cpu_stays_transformers_own(family, patched):
    plain = build(family)
    ids = (IMAGE, VIDEO) if plain.visual is not None else ()
    prompts = prompts_of(plain)
    batch = pack(prompts, [response(seed, 3) for seed in range(len(prompts))], ids, MERGE)
    expected = plain.hidden_states(batch)
    patched(family)
    once = modeling_of(plain).apply_rotary_pos_emb
    patched(family)
    assert modeling_of(plain).apply_rotary_pos_emb is once  # a second model does not wrap it again
    assert torch.equal(plain.hidden_states(batch), expected)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("family", FAMILIES)
def test_ligers_rope_in_the_interpreter_equals_transformers(family):
    """With the cosines of the family's own rotary embedding, M-RoPE included."""
    pytest.importorskip("liger_kernel")
    if torch.cuda.is_available():
        pytest.skip("the test on the GPU covers it")
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    policy = build(family)
    positions_3BT = torch.stack([torch.arange(9), torch.arange(9) // 2, torch.arange(9) % 4])[:, None]
    attention = policy.backbone.layers[0].self_attn
    generator = torch.Generator().manual_seed(0)
    # As the projections give them: heads are the second dimension of a transposed view.
    q = torch.randn(1, 9, 4, attention.head_dim, generator=generator).transpose(1, 2)
    k = torch.randn(1, 9, 2, attention.head_dim, generator=generator).transpose(1, 2)
    cos, sin = policy.backbone.rotary_emb(q, policy._backbone_positions(positions_3BT))
    expected = modeling_of(policy).apply_rotary_pos_emb(q, k, cos, sin)
    for own, other in zip(liger_rotary_pos_emb(q.clone(), k.clone(), cos, sin), expected, strict=True):
        torch.testing.assert_close(own, other, atol=1e-6, rtol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_gradients_on_a_gpu(family, patched):
    plain = build(family)
    ids = (IMAGE, VIDEO) if plain.visual is not None else ()
    prompts = prompts_of(plain)
    batch = pack(prompts, [response(seed, 3) for seed in range(len(prompts))], ids, MERGE).to(CUDA)
    results = []
    for make in (lambda: plain, lambda: patched(family)[0]):  # RoPE is replaced only once the plain model has run
        one = make()
        one.module.to(CUDA)
        hidden_ND = one.hidden_states(batch)
        hidden_ND.square().sum().backward()
        gradients = {name: p.grad for name, p in one.named_parameters().items() if p.grad is not None}
        results.append((hidden_ND, gradients))
    (expected, expected_gradients), (own, own_gradients) = results
    torch.testing.assert_close(own, expected, atol=1e-4, rtol=1e-4)
    assert own_gradients.keys() == expected_gradients.keys()
    whole = sum(float(g.square().sum()) for g in expected_gradients.values()) ** 0.5
    for name, gradient in expected_gradients.items():
        assert float((own_gradients[name] - gradient).norm()) < 1e-3 * max(float(gradient.norm()), 1e-2 * whole), name
