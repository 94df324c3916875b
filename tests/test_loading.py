"""``model.path`` and the options of the model section: folders, hub ids through a local cache, and what is refused."""

from __future__ import annotations

import http.server
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Gemma2Config, Gemma2ForCausalLM, Qwen2Config, Qwen2ForCausalLM

from copd_engine.config import LoraConfig, ModelConfig
from copd_engine.models.causal_lm import CausalLMPolicy
from copd_engine.models.loading import FAMILIES, load_model
from copd_engine.models.qwen2_5_vl import Qwen2_5_VLPolicy
from copd_engine.models.qwen3_vl import Qwen3VLPolicy
from copd_engine.testbed.model import build_tokenizer, untrained
from copd_engine.types import UserError
from tests import families
from tests.families import build

ROOT = Path(__file__).resolve().parent.parent


def save(folder: Path, family: str = "llama", tied: bool = False) -> Path:
    """A model folder as a user has it: weights, tokenizer, processor."""
    build(family, tied).save(folder)
    if "_vl" in family:
        untrained(0, hidden_size=32, num_layers=1)[1].save(folder)
    else:
        build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def llama(tmp_path):
    return save(tmp_path / "llama")


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_comes_back_from_a_folder(family, tmp_path):
    assert set(families.FAMILIES) == set(FAMILIES)
    policy, encoder = load_model(ModelConfig(path=str(save(tmp_path, family))))
    kinds = {"qwen3_vl": Qwen3VLPolicy, "qwen3_vl_moe": Qwen3VLPolicy, "qwen2_5_vl": Qwen2_5_VLPolicy}
    assert type(policy) is kinds.get(family, CausalLMPolicy)
    expected = build(family).named_parameters()
    assert policy.named_parameters().keys() == expected.keys()
    assert all(torch.equal(p, expected[name]) for name, p in policy.named_parameters().items())
    assert encoder.visual_token_ids == ((5, 6) if "_vl" in family else ())
    assert not policy.module.training


@pytest.mark.parametrize("family", families.FAMILIES)
def test_bf16(family, tmp_path):
    policy, _ = load_model(ModelConfig(path=str(save(tmp_path, family)), dtype="bfloat16"))
    assert {p.dtype for p in policy.named_parameters().values()} == {torch.bfloat16}
    again = tmp_path / "again"
    policy.save(again)
    assert {tensor.dtype for tensor in load_file(again / "model.safetensors").values()} == {torch.bfloat16}


def test_sharded_weights(tmp_path):
    build("qwen3_vl").module.save_pretrained(tmp_path, max_shard_size="100KB")
    untrained(0, hidden_size=32, num_layers=1)[1].save(tmp_path)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    policy, _ = load_model(ModelConfig(path=str(tmp_path)))
    expected = build("qwen3_vl").named_parameters()
    assert all(torch.equal(p, expected[name]) for name, p in policy.named_parameters().items())
    shard = sorted(tmp_path.glob("model-*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(UserError, match="the model cannot be read"):
        load_model(ModelConfig(path=str(tmp_path)))


def test_options_reach_the_policy(tmp_path, caplog):
    folder = str(save(tmp_path, "qwen3_vl"))
    options = {"freeze_vision": True, "gradient_checkpointing": True, "lora": LoraConfig(rank=2)}
    with caplog.at_level(logging.INFO, "copd_engine"):
        policy, _ = load_model(ModelConfig(path=folder, **options))
    assert all(".lora_" in name for name in policy.named_parameters())
    assert policy.module.is_gradient_checkpointing
    lines = [record.message for record in caplog.records]
    assert lines == [f"model {folder} on cpu: attention sdpa; transformers' RMSNorm, SwiGLU, RoPE"]
    policy, _ = load_model(ModelConfig(path=folder, freeze_vision=True))
    assert policy.named_parameters()
    assert not any(".visual." in name for name in policy.named_parameters())
    assert not policy.module.is_gradient_checkpointing


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "flash"}, r"model\.attention = 'flash': flash-attn runs on CUDA, the model is on cpu"),
        ({"liger": True}, r"model\.liger = true: its kernels run on CUDA, the device is 'cpu'"),
    ],
)
def test_options_that_a_cpu_cannot_give(options, message):
    with pytest.raises(UserError, match=message):
        load_model(ModelConfig(**options))


def test_pickled_weights_are_never_read(llama):
    tensors = load_file(llama / "model.safetensors")
    torch.save(tensors, llama / "pytorch_model.bin")
    load_model(ModelConfig(path=str(llama)))  # beside safetensors they are left alone
    (llama / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"the weights are pickles \(pytorch_model\.bin\), which can run code"):
        load_model(ModelConfig(path=str(llama)))
    (llama / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match="the model cannot be read"):
        load_model(ModelConfig(path=str(llama)))


def edit_config(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_other_types_of_models(llama):
    edit_config(llama, model_type="gpt2")
    with pytest.raises(UserError, match=r"models of type 'gpt2' are not supported; those of type qwen3_vl, .* are"):
        load_model(ModelConfig(path=str(llama)))
    edit_config(llama, model_type=None)
    with pytest.raises(UserError, match="models of type None are not supported"):
        load_model(ModelConfig(path=str(llama)))
    (llama / "config.json").write_text("[1]")
    with pytest.raises(UserError, match=r"config\.json is no mapping"):
        load_model(ModelConfig(path=str(llama)))


def test_quantised_weights(llama):
    edit_config(llama, quantization_config={"quant_method": "fp8"})
    with pytest.raises(UserError, match="the weights are quantised; training needs the dense model"):
        load_model(ModelConfig(path=str(llama)))


def test_weights_that_lack_a_tensor(llama):
    from safetensors.torch import save_file

    tensors = load_file(llama / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, llama / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"the weights lack model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(ModelConfig(path=str(llama)))


@pytest.mark.parametrize("family", ["llama", "qwen3_vl"])
def test_a_tokenizer_with_more_tokens_than_the_embedding_has_rows(family, tmp_path):
    folder = save(tmp_path, family)
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<|one more|>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match=r"model\.path = .*<\|one more\|>.* 384"):
        load_model(ModelConfig(path=str(folder)))


def test_local_and_capped_attention_is_refused_when_loaded(tmp_path):
    sliding = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    Qwen2ForCausalLM(Qwen2Config(**families.SIZES, **sliding)).save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"model\.path = .*Qwen2ForCausalLM has sliding attention layers; packed rows"):
        load_model(ModelConfig(path=str(tmp_path)))
    # The same config whose layers all lie below the first sliding one.
    Qwen2ForCausalLM(Qwen2Config(**families.SIZES, **sliding | {"max_window_layers": 3})).save_pretrained(tmp_path)
    load_model(ModelConfig(path=str(tmp_path)))
    build("mistral").save(tmp_path)
    edit_config(tmp_path, sliding_window=4096)
    with pytest.raises(UserError, match="MistralForCausalLM has a sliding window of 4096 tokens"):
        load_model(ModelConfig(path=str(tmp_path)))
    layer_types = ["full_attention"] * 3
    with pytest.raises(UserError, match="Gemma2ForCausalLM has soft-capped attention"):
        CausalLMPolicy(Gemma2ForCausalLM(Gemma2Config(**families.SIZES, layer_types=layer_types)))


# Hub ids


def hub_cache(cache: Path, name: str, folder: Path) -> None:
    """Lay a folder out as huggingface_hub keeps a downloaded model."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "blobs").mkdir()
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for index, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, repository / "blobs" / f"{index:040x}")
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / f"{index:040x}")


def load_in_a_process(cache: Path, paths: list[str], **settings: str) -> list[str]:
    """What a new process makes of each hub id: the sum of its embedding, or the error."""
    code = (
        "import sys\n"
        "from copd_engine.config import ModelConfig\n"
        "from copd_engine.models.loading import load_model\n"
        "from copd_engine.types import UserError\n"
        "for path in sys.argv[1:]:\n"
        "    try:\n"
        "        policy, encoder = load_model(ModelConfig(path=path))\n"
        "        print(float(policy.lm_head_weight.sum().detach()), type(encoder).__name__)\n"
        "    except UserError as error:\n"
        "        print(error)\n"
    )
    environment = os.environ | {"HF_HUB_CACHE": str(cache), "OMP_NUM_THREADS": "1"} | settings
    command = [sys.executable, "-c", code, *paths]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_offline_a_hub_id_is_read_from_the_hubs_own_cache(tmp_path):
    cache = tmp_path / "cache"
    hub_cache(cache, "tiny-lab/Qwen3-VL.tiny", save(tmp_path / "model", "qwen3_vl"))
    old = save(tmp_path / "old")
    (old / "model.safetensors").rename(old / "pytorch_model.bin")
    hub_cache(cache, "tiny-lab/old", old)
    found, pickles, none = load_in_a_process(
        cache, ["tiny-lab/Qwen3-VL.tiny", "tiny-lab/old", "tiny-lab/none"], HF_HUB_OFFLINE="1"
    )
    expected = float(build("qwen3_vl").lm_head_weight.sum().detach())
    assert found == f"{expected} Qwen3VLPromptEncoder"
    assert pickles.startswith("model.path = 'tiny-lab/old': the weights are pickles (pytorch_model.bin)")
    assert none == (
        "model.path = 'tiny-lab/none': no such folder, and HF_HUB_OFFLINE is set and the cache "
        f"{cache} has no copy: run `hf download tiny-lab/none` where there is a network, or give a local folder"
    )


ANSWERS = {"missing": (404, "RepoNotFound"), "gated": (403, "GatedRepo"), "down": (500, "")}


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers as the hub does for a model that is missing, or gated, or while it is down."""

    def do_GET(self):
        code, error = next(answer for name, answer in ANSWERS.items() if name in self.path)
        self.send_response(code)
        self.send_header("X-Error-Code", error)
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


def test_what_the_hub_answers(tmp_path):
    names = [f"tiny-lab/{name}" for name in ANSWERS]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        missing, gated, down = load_in_a_process(tmp_path, names, HF_HUB_OFFLINE="0", HF_ENDPOINT=endpoint)
        server.shutdown()
    assert "no such folder, and the hub has no model of this name that you may read" in missing
    assert "no such folder, and this hub model asks for consent: accept its terms on its page" in gated
    assert "no such folder, and the hub cannot be reached (Server error '500 Internal Server Error'" in down
    assert "run `hf download tiny-lab/down` where there is a network" in down


@pytest.mark.parametrize("path", ["bass", "./base/model", "a/b/c", "/nowhere/model", "two words/model"])
def test_paths_that_are_no_hub_ids(path):
    with pytest.raises(UserError, match=r"no such folder \(a Hugging Face folder, a hub id, 'testbed' or 'smollm2'\)"):
        load_model(ModelConfig(path=path))
