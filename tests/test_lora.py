"""LoRA: it starts as the base, learns in the adapters alone, and leaves as a plain model."""

from __future__ import annotations

import builtins

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from copd_engine.config import LoraConfig
from copd_engine.merge import merge
from copd_engine.models.lora import add_adapters
from copd_engine.packing import pack
from copd_engine.types import UserError
from tests.families import FAMILIES, IMAGE, MERGE, VIDEO, VISION_FAMILIES, build, prompts_of, response
from tests.plain import plain_logp, plain_model

CONFIG = LoraConfig(rank=3, alpha=12)  # the update is 4 B A


def batch_of(policy):
    prompts = prompts_of(policy)
    ids = (IMAGE, VIDEO) if policy.visual is not None else ()
    return pack(prompts, [response(seed, 3) for seed in range(len(prompts))], ids, MERGE)


def with_lora(family, config=CONFIG, tied=False, dtype=torch.float32):
    policy = build(family, tied)
    policy.module.to(dtype)
    add_adapters(policy.module, policy.backbone, config)
    return policy


def train(policy, seed, scale=0.05):
    """Stand-in for training: B away from 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.named_parameters().items():
            if "lora_B" in name:
                parameter.normal_(0, scale, generator=generator)
    return policy


def log_softmax(policy, batch):
    with torch.no_grad():
        return torch.log_softmax((policy.hidden_states(batch) @ policy.lm_head_weight.T).double(), -1)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_starts_as_the_base_bit_by_bit(family):
    base, policy = build(family), with_lora(family)
    batch = batch_of(base)
    with torch.no_grad():
        assert torch.equal(policy.hidden_states(batch), base.hidden_states(batch))


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_sit_on_the_decoders_linear_layers_alone(family):
    policy = with_lora(family)
    owners = {name.split(".lora_")[0] for name in policy.named_parameters()}
    linears = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    if "moe" not in family:  # experts are stacked tensors
        linears += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    prefix = "model.language_model.layers" if family in VISION_FAMILIES else "model.layers"
    assert owners == {f"{prefix}.{layer}.{linear}" for layer in range(3) for linear in linears}
    assert {p.shape[0 if "lora_A" in n else 1] for n, p in policy.named_parameters().items()} == {3}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_adapter_gets_a_gradient_and_the_base_none(family):
    policy = train(with_lora(family), 0)
    policy.hidden_states(batch_of(policy)).square().sum().backward()
    for name, parameter in policy.module.named_parameters():
        if ".lora_" in name:
            assert float(parameter.grad.abs().sum()) > 0, name
        else:
            assert parameter.grad is None, name


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_folded_weights_give_the_same_log_probs(family, tied, tmp_path):
    base, policy = build(family, tied), train(with_lora(family, tied=tied), 0)
    full, plain_weights = policy.full_parameters(), dict(base.module.named_parameters())
    assert full.keys() == plain_weights.keys()
    name = next(name for name in full if name.endswith("1.self_attn.v_proj.weight"))
    adapter = dict(policy.named_parameters())
    a, b = (adapter[name.replace("weight", f"lora_{x}.default.weight")] for x in "AB")
    torch.testing.assert_close(full[name], plain_weights[name] + 4 * b @ a)
    assert not any(tensor.requires_grad for tensor in full.values())
    batch = batch_of(policy)
    own = log_softmax(policy, batch)
    assert float((own - log_softmax(base, batch)).abs().max()) > 0.1
    torch.testing.assert_close(log_softmax(policy.with_full_parameters(full), batch), own, atol=1e-5, rtol=1e-5)
    policy.save(tmp_path)
    assert not list(tmp_path.glob("adapter*"))
    auto = AutoModelForImageTextToText if family in VISION_FAMILIES else AutoModelForCausalLM
    plain, report = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        alone = [plain_logp(plain.eval(), prompt, response(seed, 3)) for seed, prompt in enumerate(prompts_of(policy))]
    torch.testing.assert_close(own, torch.cat(alone), atol=1e-5, rtol=1e-5)
    # Saving leaves the adapters where they are.
    assert torch.equal(log_softmax(policy, batch), own)


def test_clones_share_the_base_and_have_their_own_adapters():
    base = with_lora("qwen3_vl")
    one, two = train(base.clone(), 1), train(base.clone(), 2)
    assert one.named_parameters().keys() == two.named_parameters().keys() == base.named_parameters().keys()
    pointers = [{n: p.data_ptr() for n, p in policy.module.named_parameters()} for policy in (base, one, two)]
    for name in pointers[0]:
        assert len({p[name] for p in pointers}) == (3 if ".lora_" in name else 1), name
    batch = batch_of(base)
    assert not torch.equal(log_softmax(one, batch), log_softmax(two, batch))
    assert torch.equal(log_softmax(base, batch), log_softmax(build("qwen3_vl"), batch))


def test_the_merge_of_lora_experts_is_the_mean_of_their_updates():
    base = with_lora("qwen3")
    experts = {str(seed): train(base.clone(), seed) for seed in range(3)}
    weights = {name: expert.full_parameters() for name, expert in experts.items()}
    merged = base.with_full_parameters(merge(base.full_parameters(), weights))
    plain = build("qwen3")
    with torch.no_grad():
        for name, parameter in plain.module.named_parameters():
            mean = torch.stack([w[name] for w in weights.values()]).mean(0)
            parameter.copy_(mean)
    batch = batch_of(base)
    torch.testing.assert_close(log_softmax(merged, batch), log_softmax(plain, batch), atol=1e-5, rtol=1e-5)
    assert merged.module.state_dict().keys() == plain.module.state_dict().keys()


def test_a_bf16_base_computes_with_fp32_adapters():
    policy = train(with_lora("qwen3_vl", dtype=torch.bfloat16), 0)
    assert {p.dtype for p in policy.named_parameters().values()} == {torch.float32}
    assert {p.dtype for n, p in policy.module.named_parameters() if ".lora_" not in n} == {torch.bfloat16}
    hidden_ND = policy.hidden_states(batch_of(policy))
    assert hidden_ND.dtype == torch.bfloat16
    hidden_ND.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in policy.named_parameters().values())
    # Folded in bf16, or in fp32 for a merge that rounds once.
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    rounded, exact = policy.full_parameters()[name], policy.full_parameters(torch.float32)[name]
    assert (rounded.dtype, exact.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(exact.bfloat16(), rounded)
    assert not torch.equal(exact, rounded.float())
    assert {p.dtype for p in plain_model(policy).parameters()} == {torch.bfloat16}


def test_targets_by_name():
    policy = with_lora("qwen3_vl", LoraConfig(rank=2, target_modules=("q_proj", "1.mlp.down_proj")))
    owners = {name.split(".lora_")[0] for name in policy.named_parameters()}
    prefix = "model.language_model.layers"
    assert owners == {f"{prefix}.{layer}.self_attn.q_proj" for layer in range(3)} | {f"{prefix}.1.mlp.down_proj"}
    with pytest.raises(UserError, match=r"target_modules: no linear layer .* 'qproj' \(did you mean 'q_proj'\?\)"):
        with_lora("qwen3_vl", LoraConfig(target_modules=("qproj",)))
    with pytest.raises(UserError, match="no linear layer of the language model is called 'qkv'"):
        with_lora("qwen3_vl", LoraConfig(target_modules=("qkv",)))  # the tower's


def test_adapters_do_not_depend_on_the_global_generator():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    one = with_lora("qwen3").named_parameters()
    torch.manual_seed(4)
    two = with_lora("qwen3").named_parameters()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert len({float(p.detach().sum()) for n, p in one.items() if "lora_A" in n}) == 21
    torch.manual_seed(3)
    with_lora("qwen3")
    assert torch.equal(torch.get_rng_state(), state)


def test_without_peft_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def no_peft(name, *args, **kwargs):
        if name == "peft":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_peft)
    with pytest.raises(UserError, match="needs the package peft: install the extra 'lora'"):
        with_lora("llama")
