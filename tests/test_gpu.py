"""What only a CUDA GPU can show. Not run yet."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from copd_engine.metrics import read_metrics
from copd_engine.rollout.base import Sampling
from copd_engine.rollout.embedded import EmbeddedEngine
from copd_engine.step import StepRunner
from copd_engine.types import RolloutRequest
from tests import small_run
from tests.helpers import prompts_of_all_domains, response_of, tiny_model

pytestmark = pytest.mark.gpu


def test_packed_hidden_states_on_the_gpu_equal_those_on_the_cpu() -> None:
    from copd_engine.packing import pack

    policy, encoder = tiny_model()
    prompts = prompts_of_all_domains(encoder)
    responses = [response_of(encoder, prompt) for prompt in prompts]
    batch = pack(prompts, responses, encoder.visual_token_ids, encoder.spatial_merge_size)
    with torch.no_grad():
        on_cpu = policy.hidden_states(batch)
        gpu_policy = copy.deepcopy(policy)
        gpu_policy.module.to("cuda")
        on_gpu = gpu_policy.hidden_states(batch.to(torch.device("cuda"))).cpu()
    torch.testing.assert_close(on_gpu, on_cpu, atol=1e-4, rtol=1e-4)


def test_greedy_rollouts_on_the_gpu_equal_those_on_the_cpu() -> None:
    policy, encoder = tiny_model()
    requests = [RolloutRequest(prompt, i, i) for i, prompt in enumerate(prompts_of_all_domains(encoder))]
    sampling = Sampling(temperature=0, max_new_tokens=6)
    expected = EmbeddedEngine({"a": policy}, encoder).generate("a", requests, sampling)
    gpu_policy = copy.deepcopy(policy)
    gpu_policy.module.to("cuda")
    found = EmbeddedEngine({"a": gpu_policy}, encoder).generate("a", requests, sampling)
    assert [r.response_ids_N.tolist() for r in found] == [r.response_ids_N.tolist() for r in expected]


def test_a_whole_run_on_the_gpu(tmp_path: Path) -> None:
    base, data = small_run.write_base(tmp_path / "base"), small_run.write_data(tmp_path / "data")
    run_dir = small_run.train(small_run.small_config(base, data, tmp_path / "runs", device="cuda"))
    steps = read_metrics(run_dir)[1:]
    assert len(steps) == 6
    for row in steps:
        assert row["system"]["gpu"][0]["memory_used_bytes"] > 0
        assert all(not branch["skipped"] for branch in row["branches"].values())


def test_a_run_with_offload_is_the_same_and_leaves_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 branches whose masters and moments are in pinned host memory while the engine samples."""
    base, data = small_run.write_base(tmp_path / "base"), small_run.write_data(tmp_path / "data")
    held: dict[bool, list[int]] = {True: [], False: []}
    runs = {}
    for offload in (False, True):
        config = small_run.small_config(
            base, data, tmp_path / str(offload), device="cuda", model={"dtype": "bfloat16"}, optim={"offload": offload}
        )
        roll_out = StepRunner.roll_out

        def measured(self: StepRunner, *args: Any, offload: bool = offload, roll_out: Any = roll_out) -> Any:
            for branch in self.branches.values():
                for name, master in branch.masters.tensors.items():
                    tensors = [master, *branch.optimizer.state.get(master, {}).values()]
                    assert {t.is_cuda for t in tensors} == {not offload}, name
                    assert all(t.is_pinned() for t in tensors) == offload, name
            held[offload].append(torch.cuda.memory_allocated())
            return roll_out(self, *args)

        monkeypatch.setattr(StepRunner, "roll_out", measured)
        runs[offload] = small_run.train(config)
        monkeypatch.undo()
    assert small_run.numbers(runs[True]) == small_run.numbers(runs[False])
    assert small_run.contents(runs[True] / "models") == small_run.contents(runs[False] / "models")
    # after the first step there are moments too: 12 bytes per parameter of three branches, and the base's 2
    assert all(with_it < without for with_it, without in zip(held[True], held[False], strict=True))
