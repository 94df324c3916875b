"""Gradient checkpointing: the same gradients from fewer stored activations, and layers really run again."""

from __future__ import annotations

import pytest
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from copd_engine.config import LoraConfig
from copd_engine.models.cache import PagePool, PrefillCache
from copd_engine.models.lora import add_adapters
from copd_engine.models.recompute import enable_recompute
from copd_engine.packing import pack
from tests.families import FAMILIES, IMAGE, MERGE, VIDEO, build, prompts_of, response


def batch_of(policy):
    prompts = prompts_of(policy)
    ids = (IMAGE, VIDEO) if policy.visual is not None else ()
    return pack(prompts, [response(seed, 3 + seed) for seed in range(len(prompts))], ids, MERGE)


def step(policy, batch):
    """Hidden states, gradients, layer calls in forward and backward, and bytes kept for backward."""
    calls = []
    layers = [m for m in policy.module.modules() if isinstance(m, GradientCheckpointingLayer)]
    hooks = [layer.register_forward_pre_hook(lambda layer, _: calls.append(id(layer))) for layer in layers]
    kept: dict[int, int] = {}

    def keep(tensor):
        # A storage is kept once, however many views of it are saved; weights are there anyway.
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    policy.module.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden_ND = policy.hidden_states(batch)
    num_forward = len(calls)
    hidden_ND.square().sum().backward()
    for hook in hooks:
        hook.remove()
    weights = {p.untyped_storage().data_ptr() for p in policy.module.parameters()}
    gradients = {name: p.grad.clone() for name, p in policy.named_parameters().items() if p.grad is not None}
    num_bytes = sum(size for pointer, size in kept.items() if pointer not in weights)
    return hidden_ND.detach(), gradients, num_forward, len(calls) - num_forward, num_bytes, len(layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_the_same_and_layers_run_again(family):
    policy = build(family)
    batch = batch_of(policy)
    hidden, gradients, forward, backward, num_bytes, num_layers = step(policy, batch)
    assert (forward, backward) == (num_layers, 0)
    enable_recompute(policy.module)
    again = step(policy, batch)
    assert torch.equal(again[0], hidden)
    assert again[1].keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(again[1][name], gradient, atol=1e-6, rtol=1e-6, msg=name)
    assert again[2:4] == (num_layers, num_layers)
    assert again[4] < 0.5 * num_bytes
    assert not any(part.training for part in policy.module.modules())


def test_it_works_with_adapters_and_survives_a_clone():
    policy = build("qwen3_vl")
    add_adapters(policy.module, policy.backbone, LoraConfig(rank=2))
    with torch.no_grad():
        for name, parameter in policy.named_parameters().items():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    batch = batch_of(policy)
    plain = step(policy, batch)
    enable_recompute(policy.module)
    again = step(policy.clone(), batch)
    assert again[3] == 3  # the frozen tower needs no backward
    for name, gradient in plain[1].items():
        torch.testing.assert_close(again[1][name], gradient, atol=1e-6, rtol=1e-6, msg=name)


def test_a_prefill_keeps_its_cache():
    """transformers would set the cache of a checkpointed layer to None."""
    policy = build("llama")
    enable_recompute(policy.module)
    batch = batch_of(policy)
    for grad in (True, False):
        pool = PagePool(32)
        cache = PrefillCache(pool, [(0, 16, pool.take(1))], policy.device)
        with torch.set_grad_enabled(grad):
            policy.hidden_states(batch, cache)
        assert len(pool.layers) == 3
        assert all(bool((pages != 0).all()) for pages in pool.layers)
