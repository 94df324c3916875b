"""The vision tower within a policy: left out of training, and run on a blank image where a rank has none."""

from __future__ import annotations

import pytest
import torch

from copd_engine.packing import pack
from tests.families import IMAGE, MERGE, VIDEO, VISION_FAMILIES, build, make_prompt, prompts_of, response


def packed(prompts):
    return pack(prompts, [response(seed, 4) for seed in range(len(prompts))], (IMAGE, VIDEO), MERGE)


def gradients(policy, batch):
    policy.module.zero_grad()
    hidden_ND = policy.hidden_states(batch)
    (hidden_ND @ policy.lm_head_weight.T).square().sum().backward()
    return hidden_ND.detach(), {name: p.grad for name, p in policy.module.named_parameters()}


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_a_blank_image_reaches_every_parameter_and_changes_nothing(family):
    policy = build(family)
    batch = packed([make_prompt(policy, seed) for seed in range(3)])
    hidden, without = gradients(policy, batch)
    policy.dummy_vision = True
    again, with_dummy = gradients(policy, batch)
    assert torch.equal(again, hidden)
    for name, gradient in with_dummy.items():
        if ".visual." in name:
            assert without[name] is None, name
            assert torch.equal(gradient, torch.zeros_like(gradient)), name
        else:
            assert torch.equal(gradient, without[name]), name


def test_most_parameters_have_no_gradient_without_it():
    policy = build("qwen3_vl")
    _, without = gradients(policy, packed([make_prompt(policy, 0)]))
    tower = [name for name in without if ".visual." in name]
    assert [name for name, gradient in without.items() if gradient is None] == tower
    assert (len(tower), len(without)) == (57, 93)


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_rows_with_images_run_the_tower_once(family):
    policy = build(family)
    calls = []
    policy.visual.register_forward_pre_hook(lambda *_: calls.append(1))
    for dummy, expected in ((False, 1), (True, 1)):
        policy.dummy_vision = dummy
        calls.clear()
        policy.hidden_states(packed(prompts_of(policy)))
        assert len(calls) == expected
    for dummy, expected in ((None, 0), (False, 0), (True, 1)):
        policy.dummy_vision = dummy
        calls.clear()
        policy.hidden_states(packed([make_prompt(policy, 0)]))
        assert len(calls) == expected


def _rank(rank: int, file: str, calls: torch.Tensor) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    policy = build("qwen3_vl")

    def count(*_) -> None:
        calls[rank] += 1

    policy.visual.register_forward_pre_hook(count)
    images = ((1, 1),) if rank else ()
    policy.hidden_states(packed([make_prompt(policy, 0, images=images)]))
    torch.distributed.destroy_process_group()


def test_in_a_distributed_run_a_rank_without_images_runs_it_by_itself(tmp_path):
    calls = torch.zeros(2, dtype=torch.int64).share_memory_()
    args = (str(tmp_path / "rendezvous"), calls)
    torch.multiprocessing.start_processes(_rank, args, nprocs=2, start_method="fork")
    assert calls.tolist() == [1, 1]


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_a_frozen_tower_is_not_trained(family):
    policy = build(family)
    batch = packed(prompts_of(policy))
    _, full = gradients(policy, batch)
    policy.freeze_vision()
    assert not any(".visual." in name for name in policy.named_parameters())
    assert len(policy.named_parameters()) == sum(".visual." not in name for name in full)
    assert policy.full_parameters().keys() == full.keys()
    _, frozen = gradients(policy, batch)
    for name, gradient in frozen.items():
        if ".visual." in name:
            assert gradient is None, name
        else:
            torch.testing.assert_close(gradient, full[name], msg=name)
    clone = policy.clone()
    for name, parameter in clone.module.named_parameters():
        shared = parameter is policy.module.get_parameter(name)
        assert shared == (".visual." in name), name


def test_a_text_model_has_no_tower_to_freeze():
    policy = build("llama")
    policy.freeze_vision()
    assert len(policy.named_parameters()) == len(list(policy.module.parameters()))
