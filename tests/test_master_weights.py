"""fp32 masters of bf16 weights: small updates are kept, gradients sum in fp32, checkpoints resume to the same bits."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from copd_engine.branch import Branch
from copd_engine.checkpoint import load_checkpoint, save_checkpoint
from copd_engine.config import ObjectiveConfig, OptimConfig
from copd_engine.master_weights import MasterWeights
from copd_engine.models.base import Policy
from copd_engine.objectives import TrainSample
from copd_engine.rollout.base import Sampling
from copd_engine.rollout.embedded import EmbeddedEngine
from copd_engine.types import RolloutRequest
from tests.helpers import prompts_of_all_domains, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def bf16(policy: Policy) -> Policy:
    copied = policy.clone()
    copied.module.to(torch.bfloat16)
    return copied


def branch_of(policy: Policy, encoder, **optim) -> Branch:
    return Branch("text", policy, encoder, OptimConfig(**{"lr": 1e-6} | optim), ObjectiveConfig(), 1.0)


@pytest.fixture(scope="module")
def samples(model) -> list[TrainSample]:
    """Two rollouts of every kind of prompt with advantages of both signs."""
    policy, encoder = model
    prompts = prompts_of_all_domains(encoder, 1)
    requests = [RolloutRequest(p, 10 * i + j, i) for i, p in enumerate(prompts) for j in range(2)]
    rollouts = EmbeddedEngine({"text": policy}, encoder).generate("text", requests, Sampling(1.0, 6))
    return [
        TrainSample(r, "grpo", 1 / (len(rollouts) * r.num_tokens), advantage=1.0 - 2 * (i % 2))
        for i, r in enumerate(rollouts)
    ]


def test_an_fp32_model_is_its_own_master(model):
    parameters = model[0].clone().named_parameters()
    masters = MasterWeights(parameters)
    assert all(masters.tensors[name] is parameter for name, parameter in parameters.items())


def test_gradients_of_several_backwards_are_summed_in_fp32():
    """1 + 2^-9 + 2^-9: bf16 would lose both small ones."""
    parameter = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    masters = MasterWeights({"w": parameter})
    for scale in (1.0, 2.0**-9, 2.0**-9):
        (parameter * scale).sum().backward()
        assert parameter.grad is None
    gradient = masters.tensors["w"].grad
    assert gradient is not None
    assert gradient.dtype == torch.float32
    assert gradient.tolist() == [1 + 2.0**-8] * 3


def test_updates_below_the_rounding_of_bf16_add_up():
    """100 steps of 1e-4 on a weight of 1: bf16 alone would stand still, its spacing below 1 is 2^-8."""
    parameter = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    masters = MasterWeights({"w": parameter})
    optimizer = torch.optim.SGD(masters.tensors.values(), lr=1e-4)
    for _ in range(100):
        parameter.sum().backward()
        optimizer.step()
        masters.round_into_model()
        optimizer.zero_grad()
    assert masters.tensors["w"].item() == pytest.approx(0.99, abs=1e-5)
    assert parameter.item() == torch.tensor(0.99).bfloat16().item() != 1.0


def test_a_bf16_branch_follows_adamw_on_its_own_gradients(model, samples):
    """Three updates: the masters are those of AdamW in fp32 with the same gradients, the model is their rounding."""
    branch = branch_of(bf16(model[0]), model[1], max_grad_norm=1e9)
    start = {name: p.detach().float() for name, p in branch.parameters.items()}
    by_hand = {name: nn.Parameter(value.clone()) for name, value in start.items()}
    plain = torch.optim.AdamW(by_hand.values(), lr=1e-6, weight_decay=0.0, fused=True)

    def also_by_hand(*_: object) -> None:
        for name, master in branch.masters.tensors.items():
            by_hand[name].grad = None if master.grad is None else master.grad.clone()
        plain.step()

    branch.optimizer.register_step_pre_hook(also_by_hand)
    for _ in range(3):
        assert branch.update(samples)["skipped"] is False
    moved = 0
    for name, parameter in branch.parameters.items():
        assert parameter.dtype == torch.bfloat16
        assert parameter.grad is None
        assert torch.equal(branch.masters.tensors[name], by_hand[name]), name
        assert torch.equal(parameter, by_hand[name].bfloat16()), name
        moved += int((by_hand[name] != start[name]).sum())
    # At this learning rate hardly any bf16 weight moves, while nearly every master does.
    stuck = sum(int((p.float() == start[n]).sum()) for n, p in branch.parameters.items())
    total = sum(value.numel() for value in start.values())
    assert moved > 0.9 * total
    assert stuck > 0.9 * total


def test_a_checkpoint_holds_the_masters(model, samples, tmp_path):
    """What bf16 cannot show must survive: a resumed branch goes on to the same bits."""
    branch = branch_of(bf16(model[0]), model[1])
    branch.update(samples)
    path = save_checkpoint(tmp_path, 1, {"text": branch}, {}, keep=1)
    resumed = branch_of(bf16(model[0]), model[1])
    load_checkpoint(path, {"text": resumed})
    for each in (branch, resumed):
        each.update(samples)
    for name, master in branch.masters.tensors.items():
        assert torch.equal(master, resumed.masters.tensors[name]), name
        assert torch.equal(branch.parameters[name], resumed.parameters[name]), name


def test_an_update_left_out_leaves_no_gradient_behind(model, samples):
    branch = branch_of(bf16(model[0]), model[1])
    before = copy.deepcopy({name: m.detach() for name, m in branch.masters.tensors.items()})
    broken = [TrainSample(s.rollout, s.term, float("nan"), s.advantage) for s in samples]
    assert branch.update(broken)["skipped"]
    assert all(m.grad is None for m in branch.masters.tensors.values())
    assert all(torch.equal(before[name], m) for name, m in branch.masters.tensors.items())
