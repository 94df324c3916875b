"""Masters and moments that leave for the host between updates: the same numbers as without, in other memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

from copd_engine import offload, runs, trainer
from copd_engine.branch import Branch
from copd_engine.checkpoint import load_checkpoint, save_checkpoint
from copd_engine.config import ObjectiveConfig, OptimConfig, RunConfig, build_config
from copd_engine.resolve import resolve
from copd_engine.types import UserError
from tests.small_run import contents, numbers, small_config, train, write_base, write_data
from tests.test_master_weights import bf16, model, samples

__all__ = ["model", "samples"]  # fixtures


@pytest.fixture(params=["float32", "bfloat16"])
def policy(request, model):
    return bf16(model[0]) if request.param == "bfloat16" else model[0].clone()


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some tensors share a piece, some have one of their own."""
    monkeypatch.setattr(offload, "PIECE_BYTES", 1 << 14)


def branch_of(policy, encoder, **optim) -> Branch:
    return Branch("text", policy.clone(), encoder, OptimConfig(lr=1e-4, **optim), ObjectiveConfig(), 1.0)


def states(branch: Branch) -> Iterator[tuple[str, torch.Tensor]]:
    """What belongs on the host: masters that are no parameters, and the optimizer's state."""
    for name, master in branch.masters.tensors.items():
        if master is not branch.parameters[name]:
            yield name, master
        for field, value in branch.optimizer.state.get(master, {}).items():
            yield f"{name}/{field}", value


def homes(branch: Branch) -> set[int]:
    assert branch.host_states is not None
    return {home.data_ptr() for home in branch.host_states._homes.values()}


def assert_same(one: Branch, two: Branch) -> None:
    for name, parameter in one.parameters.items():
        assert torch.equal(parameter, two.parameters[name]), name
    found, expected = dict(states(one)), dict(states(two))
    assert set(found) == set(expected)
    assert len(found) >= 3 * 20
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name


def test_training_is_bitwise_the_same(model, policy, samples):
    plain, offloaded = (branch_of(policy, model[1], offload=value) for value in (False, True))
    for _ in range(3):
        metrics = [branch.update(samples) for branch in (plain, offloaded)]
        assert metrics[0] == metrics[1]
        assert metrics[0]["skipped"] is False
    assert_same(plain, offloaded)
    merged = [branch.full_parameters() for branch in (plain, offloaded)]
    assert all(torch.equal(merged[0][name], merged[1][name]) for name in merged[0])


def test_states_are_elsewhere_during_an_update_and_at_home_after_it(model, policy, samples):
    branch = branch_of(policy, model[1], offload=True)
    seen = []
    branch.optimizer.register_step_pre_hook(lambda *_: seen.append([t.data_ptr() for _, t in states(branch)]))
    for _ in range(2):
        branch.update(samples)
        assert {tensor.data_ptr() for _, tensor in states(branch)} == homes(branch)
    during = set(seen[1])
    assert len(during) == len(list(states(branch)))
    assert not during & homes(branch)
    parameters = {parameter.data_ptr() for parameter in branch.parameters.values()}
    assert not parameters & homes(branch)
    assert all(parameter.grad is None for parameter in branch.parameters.values())


def test_states_come_home_when_an_update_fails(model, policy, samples, monkeypatch):
    branch = branch_of(policy, model[1], offload=True)
    branch.update(samples)
    before = {name: tensor.clone() for name, tensor in states(branch)}
    monkeypatch.setattr(branch.optimizer, "step", lambda: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        branch.update(samples)
    assert {tensor.data_ptr() for _, tensor in states(branch)} == homes(branch)
    assert all(torch.equal(before[name], tensor) for name, tensor in states(branch))


@pytest.mark.parametrize("before", [False, True])
def test_a_checkpoint_goes_on_with_and_without(model, policy, samples, tmp_path, before):
    """Saved with ``before``, loaded by both kinds."""
    branch = branch_of(policy, model[1], offload=before)
    branch.update(samples)
    path = save_checkpoint(tmp_path, 1, {"text": branch}, {}, keep=1)
    resumed = [branch_of(policy, model[1], offload=value) for value in (False, True)]
    for each in resumed:
        load_checkpoint(path, {"text": each})
    assert {tensor.data_ptr() for _, tensor in states(resumed[1])} == homes(resumed[1])
    for each in (branch, *resumed):
        each.update(samples)
    for each in resumed:
        assert_same(branch, each)


def test_memory_is_taken_in_whole_pieces_and_tensors_do_not_overlap(model, policy, samples):
    branch = branch_of(policy, model[1], offload=True)
    branch.update(samples)
    assert branch.host_states is not None
    spans = sorted((h.data_ptr(), h.data_ptr() + h.nbytes) for h in branch.host_states._homes.values())
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    assert all(start % offload.ALIGNMENT == 0 for start, _ in spans)
    pieces = {h.untyped_storage().data_ptr(): h.untyped_storage().nbytes() for h in branch.host_states._homes.values()}
    assert 1 < len(pieces) < len(spans)
    assert all(size >= offload.PIECE_BYTES for size in pieces.values())


def test_a_whole_run_is_the_same(tmp_path, monkeypatch):
    """As if the CPU were a GPU: metrics, merged model and checkpoints of a run of bf16 branches."""
    base, data = write_base(tmp_path / "base"), write_data(tmp_path / "data")
    changes = {"model": {"dtype": "bfloat16"}, "diagnostics": {"every": 1}}
    plain = train(small_config(base, data, tmp_path / "plain", **changes))

    def with_offload(config: RunConfig) -> RunConfig:
        def changed(config: RunConfig, offload: bool) -> RunConfig:
            return config.model_copy(update={"optim": config.optim.model_copy(update={"offload": offload})})

        return changed(resolve(changed(config, False)), True)

    for module in (runs, trainer):
        monkeypatch.setattr(module, "resolve", with_offload)
    offloaded = train(small_config(base, data, tmp_path / "offloaded", **changes))
    assert "offload: true" in (offloaded / "config.yaml").read_text()
    assert numbers(offloaded) == numbers(plain)
    assert contents(offloaded / "models") == contents(plain / "models") != {}
    for file in ("model-text.safetensors", "optim-image.safetensors"):
        one, two = (next((run / "checkpoints").glob(f"*6/{file}")).read_bytes() for run in (plain, offloaded))
        assert one == two


def test_without_a_gpu_it_is_an_error(tmp_path):
    config = build_config(small_config(tmp_path, tmp_path, tmp_path, optim={"offload": True}))
    with pytest.raises(UserError, match=r"optim\.offload = true: needs a GPU .* the device is 'cpu'"):
        resolve(config)
