"""The memory plan against arithmetic by hand, and against the bytes of real models, optimizers and caches on a CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from copd_engine.branch import Branch
from copd_engine.config import (
    LoraConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
)
from copd_engine.models.decode_layout import PAGE
from copd_engine.models.loading import load_model
from copd_engine.models.meta import model_sizes
from copd_engine.models.qwen3_vl import Qwen3VLPromptEncoder
from copd_engine.packing import pack
from copd_engine.plan import plan_mode, plan_run
from copd_engine.plan_estimates import CONTEXT_BYTES, FRAGMENTATION, activation_bytes
from copd_engine.plan_items import UPDATED
from copd_engine.plan_text import plan_text
from copd_engine.rollout.base import Sampling
from copd_engine.rollout.embedded import EmbeddedEngine
from copd_engine.types import RolloutRequest, UserError
from tests.helpers import prompts_of_all_domains
from tests.plan_setup import GPU, TEXT, VISION, item, qwen_folder, run_config, sizes


def test_parameters_of_the_testbed_by_hand() -> None:
    d, vocab, layers, intermediate, q, kv, head = 64, 384, 4, 192, 64, 32, 16
    layer = d * q + 2 * d * kv + q * d + 3 * d * intermediate + 2 * d + 2 * head
    assert vocab * d + layers * layer + d == TEXT
    patch = 3 * 2 * 4 * 4 * 64 + 64 + 64 * 64
    block = 4 * 64 + (64 * 192 + 192) + (64 * 64 + 64) + (64 * 128 + 128) + (128 * 64 + 64)
    merger = (256 * 256 + 256) + (256 * 64 + 64)
    assert patch + 2 * block + (2 * 64 + merger) + (2 * 256 + merger) == VISION
    found = model_sizes(ModelConfig())
    assert (found.num_parameters, found.vision_parameters) == (TEXT + VISION, VISION)
    assert (found.lm_head_parameters, found.tied_lm_head) == (vocab * d, True)
    assert found.weight_bytes == 4 * (TEXT + VISION)
    assert model_sizes(ModelConfig(freeze_vision=True)).trained_parameters == TEXT
    # B [out, r] and A [r, in] of the seven linear layers
    rank = 3
    adapters = layers * rank * ((d + q) + 2 * (d + kv) + (q + d) + 3 * (d + intermediate))
    lora = model_sizes(ModelConfig(lora=LoraConfig(rank=rank)))
    assert (lora.adapter_parameters, lora.trained_parameters, lora.num_adapters) == (adapters, adapters, 28)


def test_teachers_heads_are_copied_for_signals_over_the_vocabulary() -> None:
    """Three branches around a hub all teach; the head is 384 x 64, tied and trained, or frozen under LoRA."""
    full = {"distillation": {"signal": "full"}, "model": {"dtype": "bfloat16"}}
    plan = plan_mode(run_config(3, **full), GPU)
    assert item(plan, "training", "teachers' heads").num_bytes == 3 * 384 * 64 * 2
    ring = plan_mode(run_config(3, schedule={"topology": [["text", "image"]]}, **full), GPU)
    assert item(ring, "training", "teachers' heads").num_bytes == 384 * 64 * 2
    plain = plan_mode(run_config(3, model={"dtype": "bfloat16"}), GPU)
    assert plan.peaks["training"] - plain.peaks["training"] == 3 * 384 * 64 * 2
    lora = plan_mode(run_config(3, distillation={"signal": "full"}, model={"lora": {}}), GPU)
    for without in (plain, lora, plan_mode(run_config(3, method="expert", **full), GPU)):
        assert "teachers' heads" not in sizes(without, "training")


def test_states_of_teachers_wait_in_host_memory() -> None:
    """Cross batches of all students at once: prompts x group x longest response x hidden size x bytes."""
    full: dict[str, Any] = {"distillation": {"signal": "full"}, "model": {"dtype": "bfloat16"}}
    full["rollout"] = {"prompts_per_step": 5, "group_size": 3}
    of_a_prompt = 3 * 60 * 64 * 2

    def states(num_branches: int = 3, **changes: Any) -> int:
        return plan_mode(run_config(num_branches, **full | changes), GPU).teacher_state_bytes

    assert states() == 3 * 5 * of_a_prompt
    assert states(schedule={"cross_ratio": 2, "topology": [["text", "image"]]}) == 10 * of_a_prompt
    adaptive = {"adaptive": {"threshold": 0.8, "recover": 0.9}}
    assert states(2, schedule=adaptive, distillation={"signal": "sampled_cv"}) == 2 * 5 * of_a_prompt
    assert states(method="mopd") == 5 * of_a_prompt
    assert states(method="expert") == states(distillation={"signal": "sampled"}) == 0
    text = plan_text(run_config(3, **full), 1, 80)
    line = next(line for line in text.splitlines() if line.startswith("teachers' states, in host memory"))
    assert line.count("~0.000346") == 2
    assert line.endswith("at most, of all students at once; distillation.signal=full")
    assert not any("teachers' states" in line for line in plan_text(run_config(3), 1, 80).splitlines())


def test_full_parameter_plan_of_the_testbed_by_hand() -> None:
    """bf16, two experts, everything trained."""
    n = TEXT + VISION
    plan = plan_mode(run_config(model={"dtype": "bfloat16"}), GPU)
    assert sizes(plan, "resident") == {
        "base model": 2 * n,
        "experts' weights": 2 * 2 * n,
        "fp32 masters": 2 * 4 * n,
        "AdamW moments": 2 * (8 * n + 4 * 85),
    }
    assert item(plan, "training", "gradient sums").num_bytes == 4 * n
    assert item(plan, "rollout", "engine's weights").num_bytes == 2 * n
    assert item(plan, "end", "merged model").num_bytes == 2 * n
    assert all(found.exact for found in plan.resident)
    assert not item(plan, "training", "activations").exact
    # 2 (keys, values) x 4 layers x 2 heads x 16 x 2 bytes
    assert plan.kv_bytes_per_token == 512
    assert plan.longest_tokens == 160
    # the largest gradient is that of a merger's layer, 256 x 256
    assert item(plan, "training", "a gradient on its way").num_bytes == 2 * 256 * 256


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [None, LoraConfig(rank=3)])
@pytest.mark.parametrize("freeze_vision", [False, True])
def test_bytes_of_real_experts_after_a_step(dtype: str, lora: LoraConfig | None, freeze_vision: bool) -> None:
    model = ModelConfig.model_validate({"dtype": dtype, "lora": lora, "freeze_vision": freeze_vision})
    base, encoder = load_model(model)
    experts = [Branch(n, base.clone(), encoder, OptimConfig(), ObjectiveConfig(), 1.0) for n in ("text", "image")]
    for expert in experts:
        for master in expert.masters.tensors.values():
            master.grad = torch.ones_like(master)
        expert.optimizer.step()
    modules = [base.module, *(expert.policy.module for expert in experts)]
    weights = {p.data_ptr(): p.nbytes for module in modules for p in module.parameters()}
    pairs = [(master, expert.parameters[name]) for expert in experts for name, master in expert.masters.tensors.items()]
    states = [s for expert in experts for state in expert.optimizer.state.values() for s in state.values()]
    plan = plan_mode(run_config(model=model.model_dump()), GPU)
    held = sizes(plan, "resident")
    assert held["base model"] + held["experts' weights"] == sum(weights.values())
    assert held["base model"] == sum(p.nbytes for p in base.module.parameters())
    assert held["fp32 masters"] == sum(master.nbytes for master, parameter in pairs if master is not parameter)
    assert held["AdamW moments"] == sum(state.nbytes for state in states)
    gradients = [master.grad for master in experts[0].masters.tensors.values()]
    assert item(plan, "training", "gradient sums").num_bytes == sum(g.nbytes for g in gradients if g is not None)
    assert plan.moves.swap_bytes == sum(p.nbytes for p in experts[0].parameters.values())
    if dtype == "float32":
        assert plan.moves.offload_host_bytes == 2 * sum(state.nbytes for state in states)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_of_a_real_cache(dtype: str) -> None:
    policy, encoder = load_model(ModelConfig.model_validate({"dtype": dtype}))
    assert isinstance(encoder, Qwen3VLPromptEncoder)
    engine = EmbeddedEngine({"text": policy}, encoder, max_cached_tokens=2048)
    engine.generate("text", [RolloutRequest(prompts_of_all_domains(encoder, 1)[0], 0, 0)], Sampling(1.0, 5))
    pool = engine._pool
    per_token = plan_mode(run_config(model={"dtype": dtype}), GPU).kv_bytes_per_token
    assert pool.page_bytes * len(pool.layers) == PAGE * per_token
    assert pool.bytes % (PAGE * per_token) == 0 < pool.bytes


def saved_bytes(model: ModelConfig) -> tuple[int, int]:
    """Bytes that a forward keeps for backward, parameters left out, and its tokens."""
    policy, encoder = load_model(model)
    assert isinstance(encoder, Qwen3VLPromptEncoder)
    prompts = prompts_of_all_domains(encoder, 2)[::3]
    responses = [torch.arange(20, 260) % 300 for _ in prompts]
    batch = pack(prompts, responses, encoder.visual_token_ids, encoder.spatial_merge_size, group_ids=[0, 1])
    own = {p.untyped_storage().data_ptr() for p in policy.module.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = policy.hidden_states(batch)
    assert hidden.requires_grad
    return sum(storage.nbytes() for storage in kept.values()), batch.num_tokens


@pytest.mark.parametrize(
    ("model", "tolerance"),
    [
        (ModelConfig(), 0.05),
        (ModelConfig(dtype="bfloat16"), 0.05),
        (ModelConfig(lora=LoraConfig()), 0.2),
        (ModelConfig(dtype="bfloat16", lora=LoraConfig()), 0.2),
    ],
)
def test_estimate_of_activations_against_what_autograd_keeps(model: ModelConfig, tolerance: float) -> None:
    """Text alone, all kept."""
    measured, num_tokens = saved_bytes(model)
    itemsize = 4 if model.dtype == "float32" else 2
    estimate = activation_bytes(model_sizes(model), itemsize, num_tokens, 0, recompute=False)
    print(f"{model.dtype}, LoRA {model.lora is not None}: {estimate / measured:.3f} of what is kept")
    assert estimate == pytest.approx(measured, rel=tolerance)


def test_a_model_of_four_billion_parameters_by_hand(tmp_path: Path) -> None:
    folder = qwen_folder(tmp_path / "qwen")
    layer = 2560 * (4096 + 2 * 1024) + 4096 * 2560 + 3 * 2560 * 9728 + 2 * 2560 + 2 * 128
    text = 151_936 * 2560 + 36 * layer + 2560
    patch = 3 * 2 * 16 * 16 * 1024 + 1024 + 2304 * 1024
    block = 4 * 1024 + (1024 * 3072 + 3072) + (1024 * 1024 + 1024) + 2 * 1024 * 4096 + 4096 + 1024
    merger = (4096 * 4096 + 4096) + (4096 * 2560 + 2560)
    vision = patch + 24 * block + (2 * 1024 + merger) + 3 * (2 * 4096 + merger)
    n = text + vision
    assert n == 4_437_815_808
    config = run_config(
        3,
        model={"path": str(folder), "dtype": "bfloat16", "gradient_checkpointing": True},
        rollout={"max_prompt_tokens": 16_384, "max_new_tokens": 16_384},
        optim={"max_tokens_per_micro_batch": 32_768},
    )
    full, lora = plan_run(config, GPU).values()
    assert full.sizes.num_parameters == n
    assert full.sizes.vision_parameters == vision
    assert full.kv_bytes_per_token == 2 * 36 * 8 * 128 * 2 == 147_456
    held = sizes(full, "resident")
    assert (held["base model"], held["experts' weights"], held["fp32 masters"]) == (2 * n, 6 * n, 12 * n)
    assert 24 * n < held["AdamW moments"] < 24 * n + 3 * 4 * 1000
    rank = 36 * 16 * ((2560 + 4096) + 2 * (2560 + 1024) + (4096 + 2560) + 3 * (2560 + 9728))
    assert lora.sizes.adapter_parameters == rank == 33_030_144
    assert sizes(lora, "resident")["base model"] == 2 * n + 4 * rank
    assert sizes(lora, "resident")["experts' weights"] == 3 * 4 * rank
    assert lora.host_bytes_asleep == 2 * n
    assert full.host_bytes_asleep == 0
    # activations, checkpointed: a D-wide bf16 input per layer, one layer whole, the ends, and the tower likewise
    per_layer = 2 * 2560 * 8 + 40 * 128 * 6 + (96 + 16) * 128 * 2 + 4 * 9728 * 2 + 4 * (2 + 64 + 8)
    decoder = 36 * 2560 * 2 + per_layer + 2560 * 8 + 2 * 2560 * 2
    tower = 4 * (24 * 1024 * 2 + (8 * 1024 + 2 * 4096) * 2)
    assert item(full, "training", "activations").num_bytes == 32_768 * decoder + 16_384 * tower
    assert item(lora, "training", "activations").num_bytes == pytest.approx(
        32_768 * (decoder + 4 * lora.sizes.adapter_inputs / 36)
    )
    # logits of 4096 rows of 2 bytes, their hidden gradient, and that of the head in fp32 and bf16
    head = 8192 * 151_936 + 4 * 4096 * 2560 + 151_936 * 2560 * 6
    assert item(full, "training", "lm_head kernels").num_bytes == head


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [None, LoraConfig(rank=3)])
def test_bytes_of_real_experts_with_offload(dtype: str, lora: LoraConfig | None) -> None:
    """What leaves the GPU is in the real experts' host memory; the base goes with the masters, if there are any."""
    model = ModelConfig.model_validate({"dtype": dtype, "lora": lora, "freeze_vision": True})
    base, encoder = load_model(model)
    optim = OptimConfig(offload=True)
    experts = [Branch(n, base.clone(), encoder, optim, ObjectiveConfig(), 1.0) for n in ("text", "image")]
    for expert in experts:
        assert expert.host_states is not None
        with expert.host_states.on_device():
            for master in expert.masters.tensors.values():
                master.grad = torch.ones_like(master)
            expert.optimizer.step()
    homes = [home for expert in experts if expert.host_states for home in expert.host_states._homes.values()]
    settings = {"model": model.model_dump(), "rollout": {"kv_cache_tokens": 1600}}
    offloaded = {**settings, "optim": {"offload": True}}
    plan, without = plan_mode(run_config(**offloaded), GPU), plan_mode(run_config(**settings), GPU)
    of_base = sizes(without, "resident")["base model"] - sizes(plan, "resident")["base model"]
    has_masters = dtype == "bfloat16" and lora is None
    assert of_base == has_masters * sum(p.nbytes for p in base.named_parameters().values())
    assert plan.offloaded_bytes == sum(home.nbytes for home in homes) + of_base
    assert sizes(plan, "resident")["fp32 masters"] == sizes(plan, "resident")["AdamW moments"] == 0
    assert 2 * item(plan, "training", UPDATED).num_bytes == sum(home.nbytes for home in homes)
    saved = without.peaks["training"] - plan.peaks["training"]
    assert saved == plan.moves.offload_saved_bytes + of_base
    assert plan.moves.offload_host_bytes == 2 * sum(home.nbytes for home in homes)
    # Then the base is back: the branches are compared with it.
    assert without.peaks["rollout"] - plan.peaks["rollout"] == sum(home.nbytes for home in homes)
    kept = plan_mode(run_config(**offloaded, objective={"kl": {"weight": 0.1}}), GPU)
    assert sizes(kept, "resident")["base model"] == sizes(without, "resident")["base model"]


def test_room_of_the_rollout_engine_by_hand() -> None:
    gpu = 3 * 10**9
    rollout = {"memory_fraction": 0.5, "max_running": 10**6}
    plan = plan_mode(run_config(model={"dtype": "bfloat16"}, rollout=rollout), gpu)
    held = sizes(plan, "resident")
    # when it starts there are weights and masters, but no moments yet
    at_start = gpu - 2 * CONTEXT_BYTES - held["base model"] - held["experts' weights"] - held["fp32 masters"]
    cache = int(0.5 * at_start) - plan.sizes.weight_bytes
    assert plan.room.num_tokens == cache // 512
    assert plan.room.num_sequences == cache // 512 // 160
    assert item(plan, "rollout", "keys and values").num_bytes == cache
    # awake it has what training leaves
    copies = sizes(plan, "rollout")["engine's weights"] + sizes(plan, "rollout")["weights on their way"]
    assert plan.room_without_sleep.num_bytes == min(cache, gpu - plan.peaks["training"] - copies)
    limited = plan_mode(run_config(rollout={"kv_cache_tokens": 1600, "max_running": 7}), GPU)
    assert (limited.room.num_tokens, limited.room.num_sequences) == (1600, 7)
    embedded = plan_mode(run_config(rollout={"engine": "embedded", "max_cached_tokens": 1999}), GPU)
    # pages of 16: 100 prompt tokens take 7, the 59 that are fed back take 4
    assert embedded.longest_tokens == 16 * (7 + 4)
    assert (embedded.room.num_tokens, embedded.room.num_sequences) == (1984, 1984 // 176)
    assert sizes(embedded, "rollout")["engine's weights"] == 0
    assert sizes(embedded, "rollout")["CUDA, fragmentation"] == CONTEXT_BYTES + int(FRAGMENTATION * GPU)


@pytest.mark.parametrize(
    ("changes", "experts", "phases"),
    [
        ({}, 2, {"rl", "opd"}),
        ({"schedule": {"opd_steps": 0}}, 2, {"rl"}),
        ({"method": "mixed"}, 1, {"rl"}),
        ({"method": "expert"}, 2, {"rl"}),
    ],
)
def test_each_expert_is_swapped_in_once_per_step(changes: dict[str, Any], experts: int, phases: set[str]) -> None:
    plan = plan_mode(run_config(**changes), GPU)
    assert plan.moves.num_swaps == dict.fromkeys(phases, experts)
    assert plan.moves.step_bytes == dict.fromkeys(phases, experts * 4 * (TEXT + VISION))
    embedded = plan_mode(run_config(rollout={"engine": "embedded"}, **changes), GPU)
    assert set(embedded.moves.step_bytes.values()) == {0}
    frozen = plan_mode(run_config(model={"freeze_vision": True}, **changes), GPU)
    assert frozen.moves.swap_bytes == 4 * TEXT
    assert frozen.moves.host_bytes == 2 * 4 * (TEXT + VISION)


def test_a_row_holds_the_longest_sample() -> None:
    assert plan_mode(run_config(optim={"max_tokens_per_micro_batch": 100}), GPU).num_tokens == 160
    limited = {"max_tokens_per_micro_batch": 100, "max_length": 130, "pad_to_multiple_of": 64}
    assert plan_mode(run_config(optim=limited), GPU).num_tokens == 192


def test_several_gpus() -> None:
    config = run_config()
    plan = plan_mode(config, GPU)
    split = plan.peaks["training"] - plan.sharded_bytes(4)
    held = sum(sizes(plan, "resident").values()) + sizes(plan, "training")["gradient sums"]
    assert split == pytest.approx(held * 3 / 4, abs=10)
    text = plan_text(config, 4, 80)
    assert "GPU of 80.00 GB x 4, of which the trainer uses one: it does not shard" in text
    assert "sharded evenly over 4 GPUs, which the code cannot do" in text
    with pytest.raises(UserError, match=r"rollout\.tensor_parallel = 2: the plan is for 1 GPU$"):
        plan_run(run_config(rollout={"tensor_parallel": 2}), GPU)
    halved = plan_run(run_config(rollout={"tensor_parallel": 2}), GPU, 2)["full"]
    assert halved.kv_bytes_per_token == 512
    assert sizes(halved, "rollout")["engine's weights"] == 2 * (TEXT + VISION)


def test_logits_are_those_of_the_gpu_driver() -> None:
    driver = pytest.importorskip("copd_kernels.gpu.driver")
    from copd_engine.plan_estimates import LOGIT_BYTES_PER_ENTRY, LOGIT_TOKENS

    assert LOGIT_TOKENS == driver.CHUNK_TOKENS
    assert LOGIT_BYTES_PER_ENTRY == 2 * driver.CHUNK_TOKENS


def test_a_config_json_that_is_no_model(tmp_path: Path) -> None:
    folder = qwen_folder(tmp_path / "qwen")
    text = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**text, "model_type": "bert"}))
    with pytest.raises(UserError, match="models of type 'bert' are not supported"):
        model_sizes(ModelConfig(path=str(folder)))
    wrong = {"model_type": "qwen3_vl_text", "hidden_size": "wide"}
    (folder / "config.json").write_text(json.dumps({**text, "text_config": wrong}))
    with pytest.raises(UserError, match=r"config\.json does not describe a model"):
        model_sizes(ModelConfig(path=str(folder)))
