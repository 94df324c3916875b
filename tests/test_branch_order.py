"""A step gives every branch the same update whatever their order: teachers stand as at its start."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from copd_engine.config import build_config
from copd_engine.trainer import Trainer
from copd_engine.types import Example
from tests.helpers import perturbed, tiny_model


def odd_length(response: str, example: Example) -> float:
    """A verifier with which an untrained model earns something."""
    return float(len(response) % 2)


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    policy, encoder = tiny_model()
    folder = tmp_path_factory.mktemp("base")
    policy.save(folder)
    encoder.save(folder)
    return folder


def trainer(
    base_folder, tmp_path, names: Sequence[str], signal: str = "sampled", prompts: int = 2, updates: int = 1, **schedule
) -> Trainer:
    data = {"source": "testbed", "size": 20, "eval_size": 2, "verifier": "tests.test_branch_order:odd_length"}
    config = build_config(
        {
            "model": {"path": str(base_folder)},
            "branches": [{"name": name, "data": data | {"domain": name}} for name in names],
            "schedule": {"cycles": 1, "rl_steps": 0, "opd_steps": 1} | schedule,
            "rollout": {"prompts_per_step": prompts, "group_size": 3, "max_new_tokens": 6},
            # A step of size g, so that rounding stays rounding (AdamW's first step is the gradient's sign).
            "optim": {"lr": 1.0, "eps": 1.0},
            "distillation": {"signal": signal},
            "objective": {"updates_per_step": updates},
            "diagnostics": {"every": 0},
            "num_threads": 1,
        }
    )
    built = Trainer(config, tmp_path / "run")
    for seed, name in enumerate(sorted(built.branches)):
        moved = perturbed(built.base, seed).named_parameters()
        with torch.no_grad():
            for key, parameter in built.branches[name].parameters.items():
                parameter.copy_(moved[key])
    return built


def weights_after_one_step(built: Trainer) -> dict[str, torch.Tensor]:
    start = {n: torch.cat([p.detach().flatten() for p in b.parameters.values()]) for n, b in built.branches.items()}
    record = built.step(built.schedule.plan(1))
    for name in built.branches:
        terms = record["branches"][name]["terms"]
        assert terms["grpo"]["num_tokens"] > 0
        assert any(term.startswith("opd:") for term in terms)
    end = {n: torch.cat([p.detach().flatten() for p in b.parameters.values()]) for n, b in built.branches.items()}
    assert all(float((end[n] - start[n]).norm()) > 1e-3 for n in end)
    return end


@pytest.mark.parametrize(
    ("topology", "signal"),
    [("hub", "sampled"), ("full", "sampled"), ("full", "sampled_cv"), ("full", "full"), ("hub", "forward")],
)
def test_teachers_stand_as_at_the_start_of_the_step_whatever_branch_comes_first(
    base_folder, tmp_path, topology, signal
):
    names = ("text", "image", "video")
    forward = weights_after_one_step(trainer(base_folder, tmp_path, names, signal, topology=topology))
    backward = trainer(base_folder, tmp_path, names, signal, topology=topology)
    backward.branches = dict(reversed(backward.branches.items()))
    for name, expected in weights_after_one_step(backward).items():
        assert torch.equal(forward[name], expected), name


@pytest.mark.parametrize(("prompts", "updates"), [(2, 1), (3, 2)])  # 3: one teacher of the hub has the odd prompt
def test_the_order_of_branches_in_the_config_changes_nothing(base_folder, tmp_path, prompts, updates):
    settings = {"prompts": prompts, "updates": updates, "topology": "hub", "hub": "text"}
    forward = trainer(base_folder, tmp_path, ("text", "image", "video"), **settings)
    backward = trainer(base_folder, tmp_path, ("video", "image", "text"), **settings)
    after = weights_after_one_step(backward)
    for name, expected in weights_after_one_step(forward).items():
        torch.testing.assert_close(after[name], expected, atol=1e-6, rtol=1e-6)
    drawn = [{r.prompt.example.uid: r.seed for r in built.measured.probes} for built in (forward, backward)]
    assert drawn[0] == drawn[1]
