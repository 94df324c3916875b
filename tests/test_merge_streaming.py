"""Merging folders: the in-memory merge's numbers, models that plain transformers loads, a bounded memory."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from copd_engine.config import MergeConfig
from copd_engine.merge import command, merge
from copd_engine.merge.command import MergeModels
from copd_engine.merge.streaming import INDEX, WEIGHTS, merge_folders, stored_tensors, weight_folder
from copd_engine.models.base import Policy, PromptEncoder
from copd_engine.models.folder import find_folder
from copd_engine.types import UserError
from tests.families import build

TESTBED = find_folder("testbed")
RECIPES = {
    "mean": MergeConfig(),
    "weighted": MergeConfig(method="weighted", weights={"one": 3, "two": 1}),
    "task_arithmetic": MergeConfig(method="task_arithmetic", scale=0.4),
    "ties": MergeConfig(method="ties", density=0.3),
    "dare": MergeConfig(method="dare", density=0.4, seed=5),
    "dare_ties": MergeConfig(method="dare_ties", density=0.4),
}


def moved(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The testbed's weights after a random change."""
    generator = torch.Generator().manual_seed(seed)
    base = load_file(TESTBED / WEIGHTS)
    return {name: (w + 0.02 * torch.randn(w.shape, generator=generator)).to(dtype) for name, w in base.items()}


def write(folder: Path, tensors: dict[str, torch.Tensor], num_shards: int = 1) -> Path:
    """A copy of the testbed's folder with these weights."""
    shutil.copytree(TESTBED, folder)
    if num_shards == 1:
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})
        return folder
    (folder / WEIGHTS).unlink()
    names, weight_map = list(tensors), {}
    for number in range(num_shards):
        file = f"part-{number}.safetensors"
        part = {name: tensors[name] for name in names[number::num_shards]}
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture(scope="module")
def branches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One in a file, one in shards."""
    root = tmp_path_factory.mktemp("branches")
    return {"one": write(root / "one", moved(1)), "two": write(root / "two", moved(2), num_shards=3)}


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("method", RECIPES)
def test_transformers_loads_what_the_in_memory_merge_gives(tmp_path, branches, method, sharded):
    out = tmp_path / "deep/out"
    merge_folders(TESTBED, branches, out, RECIPES[method], 300_000 if sharded else 10**9)
    expected = merge(load_file(TESTBED / WEIGHTS), {"one": moved(1), "two": moved(2)}, RECIPES[method])
    model, report = AutoModelForImageTextToText.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not any(report.values())
    loaded = dict(model.named_parameters())
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight  # tied
    AutoProcessor.from_pretrained(out)
    files = sorted(file.name for file in out.glob("*.safetensors"))
    if not sharded:
        assert files == [WEIGHTS]
        return
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((out / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in expected.values())
    for file in files:
        tensors = load_file(out / file)
        assert len(tensors) == 1 or sum(t.numel() * 4 for t in tensors.values()) <= 300_000
        assert all(index["weight_map"][name] == file for name in tensors)


def test_a_file_is_as_safetensors_writes_it(tmp_path, branches):
    merge_folders(TESTBED, branches, tmp_path / "out", MergeConfig())
    save_file(load_file(tmp_path / "out" / WEIGHTS), tmp_path / "theirs.safetensors", {"format": "pt"})
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    others = {file.name: file.read_bytes() for file in TESTBED.iterdir() if file.name != WEIGHTS}
    assert {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir() if f.name != WEIGHTS} == others


def test_a_tied_head_may_stand_in_any_of_the_folders(tmp_path, branches):
    head = {"lm_head.weight": moved(1)["model.language_model.embed_tokens.weight"]}
    with_head = write(tmp_path / "head", moved(1) | head)
    merge_folders(TESTBED, {"one": with_head, "two": branches["two"]}, tmp_path / "out", MergeConfig())
    merge_folders(TESTBED, branches, tmp_path / "plain", MergeConfig())
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "plain" / WEIGHTS).read_bytes()


def test_a_stored_head_that_is_not_the_tied_embedding_is_an_error(tmp_path, branches):
    """Trained apart under a base that ties the two, it would be lost. One entry of the last block differs."""
    embedding = moved(1)["model.language_model.embed_tokens.weight"]
    head = embedding.clone()
    head[-1, -1] += 1
    other = write(tmp_path / "other", moved(1) | {"lm_head.weight": head})
    message = "other: lm_head.weight is not its embedding, but the base's config.json has tie_word_embeddings"
    for base, ends in ((TESTBED, {"one": other, "two": branches["two"]}), (other, branches)):
        with pytest.raises(UserError, match=message):
            merge_folders(base, ends, tmp_path / "out", MergeConfig())
    assert not (tmp_path / "out").exists()


def test_an_untied_head_is_merged_and_must_not_lack(tmp_path):
    folders = {name: tmp_path / name for name in ("base", "one")}
    for seed, folder in enumerate(folders.values()):
        build("qwen3_vl", tied=False, seed=seed).save(folder)
    merge_folders(folders["base"], {"one": folders["one"]}, tmp_path / "out", MergeConfig())
    head = "lm_head.weight"
    assert torch.equal(load_file(tmp_path / "out" / WEIGHTS)[head], load_file(folders["one"] / WEIGHTS)[head])
    tensors = load_file(folders["one"] / WEIGHTS)
    del tensors[head]
    save_file(tensors, folders["one"] / WEIGHTS)
    with pytest.raises(UserError, match=r"'one' is not the same model as the base: lm_head.weight is only in one"):
        merge_folders(folders["base"], {"one": folders["one"]}, tmp_path / "new", MergeConfig())
    assert not list(tmp_path.glob("*new*"))


def test_kinds_of_numbers_stay_the_bases(tmp_path, branches):
    def tensors(seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return moved(seed, dtype) | {"steps": torch.arange(5), "flag": torch.tensor(True), "none": torch.empty(0, 2)}

    base = write(tmp_path / "base", tensors(0, torch.bfloat16))
    one, two = (
        write(tmp_path / "one", tensors(1, torch.float32)),
        write(tmp_path / "two", tensors(2, torch.bfloat16), 2),
    )
    merge_folders(base, {"one": one, "two": two}, tmp_path / "out", MergeConfig(method="ties"))
    expected = merge(
        tensors(0, torch.bfloat16),
        {"one": tensors(1, torch.float32), "two": tensors(2, torch.bfloat16)},
        MergeConfig(method="ties"),
    )
    found = load_file(tmp_path / "out" / WEIGHTS)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def _no_index(folder: Path) -> None:
    (folder / INDEX).write_text("{}")


def _no_shard(folder: Path) -> None:
    (folder / "part-1.safetensors").unlink()


def _cut_shard(folder: Path) -> None:
    file = folder / "part-1.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def _eight_bits(folder: Path) -> None:
    save_file({"w": torch.ones(2).to(torch.float8_e4m3fn)}, folder / "part-1.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_no_index, "'weight_map' is missing"),
        (_no_shard, "part-1.safetensors cannot be read"),
        (_cut_shard, "part-1.safetensors cannot be read"),
        (_eight_bits, r"part-1.safetensors: w is F8_E4M3; F64, F32, .* can be merged"),
    ],
)
def test_folders_that_cannot_be_read(tmp_path, damage: Callable[[Path], None], message):
    folder = write(tmp_path / "two", moved(2), num_shards=2)
    damage(folder)
    with pytest.raises(UserError, match=message):
        merge_folders(TESTBED, {"two": folder}, tmp_path / "out", MergeConfig())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["two"]


def test_a_merge_that_was_killed_leaves_no_model_and_the_next_one_succeeds(tmp_path, branches, monkeypatch):
    killed = """
import os, sys
from pathlib import Path
from copd_engine.config import MergeConfig
from copd_engine.merge import streaming
blocks, count = streaming.merged_blocks, 0
def dying(*arguments):
    global count
    count += 1
    if count == 20:
        os._exit(9)
    yield from blocks(*arguments)
streaming.merged_blocks = dying
base, one, two, out = map(Path, sys.argv[1:])
streaming.merge_folders(base, {"one": one, "two": two}, out, MergeConfig())
"""
    paths = [str(path) for path in (TESTBED, *branches.values(), tmp_path / "out")]
    assert subprocess.run([sys.executable, "-c", killed, *paths], check=False).returncode == 9
    assert [path.name for path in tmp_path.iterdir()] == [".out.writing"]
    merge_folders(TESTBED, branches, tmp_path / "out", MergeConfig())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert stored_tensors(tmp_path / "out").keys() == stored_tensors(TESTBED).keys()


def test_which_models_are_folders_of_safetensors(tmp_path):
    assert weight_folder("testbed") == TESTBED
    assert weight_folder(str(TESTBED)) == TESTBED
    assert weight_folder("smollm2") is None
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert weight_folder(str(tmp_path)) is None
    with pytest.raises(UserError, match="no such folder"):
        weight_folder(str(tmp_path / "missing"))


MEASURE = """
import sys, re, resource
from pathlib import Path
import torch
from copd_engine.config import MergeConfig
from copd_engine.merge.streaming import merge_folders

def status(key):
    return int(re.search(key + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

torch.set_num_threads(1)
base, warm, one, two, out = map(Path, sys.argv[1:6])
merge_folders(warm, {"one": warm}, out / "warm", MergeConfig(method="ties"))  # whatever is loaded on first use
before = status("VmRSS")
merge_folders(base, {"one": one, "two": two}, out / "ties", MergeConfig(method="ties"))
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from Linux's /proc")
def test_memory_does_not_grow_with_the_model_or_its_tensors(tmp_path):
    """Three models of 120 MB with tensors of 24 MB: less than one such tensor above what a tiny merge takes."""
    for seed, name in enumerate(("base", "one", "two")):
        generator = torch.Generator().manual_seed(seed)
        tensors = {f"w{i}": torch.randn(6_000, 1000, generator=generator) for i in range(4)}
        tensors |= {f"small{i}": torch.randn(6_000, 100, generator=generator) for i in range(10)}
        write(tmp_path / name, tensors)
    write(tmp_path / "warm", {"w": torch.zeros(1000)})
    paths = [str(tmp_path / name) for name in ("base", "warm", "one", "two", "out")]
    ended = subprocess.run([sys.executable, "-c", MEASURE, *paths], check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    growth = int(re.findall(r"-?\d+", ended.stdout)[-1])
    assert 0 < growth < 24_000_000, growth
    first, last = (load_file(tmp_path / "out/ties" / WEIGHTS)[name] for name in ("w0", "w3"))
    assert first.isfinite().all()
    assert not torch.equal(first, last)


# In memory


@pytest.fixture
def loaded(tmp_path: Path, branches: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> MergeModels:
    """A base in bf16 but for one fp32 weight; its branches are taken for models that cannot be streamed."""
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(TESTBED / WEIGHTS).items()}
    wide = next(name for name in tensors if name.endswith("norm.weight"))
    base = write(tmp_path / "base", tensors | {wide: tensors[wide].float()})
    monkeypatch.setattr(command, "weight_folder", lambda path: base if path == str(base) else None)
    models = MergeModels.open(str(base), [str(folder) for folder in branches.values()])
    assert not models.streamed
    return models


def test_in_memory_keeps_the_base_s_dtypes(tmp_path: Path, branches: dict[str, Path], loaded: MergeModels):
    loaded.write(RECIPES["ties"], tmp_path / "loaded")
    merge_folders(tmp_path / "base", branches, tmp_path / "streamed", RECIPES["ties"])
    one, two, base = (load_file(tmp_path / name / WEIGHTS) for name in ("loaded", "streamed", "base"))
    assert {name: tensor.dtype for name, tensor in one.items()} == {name: tensor.dtype for name, tensor in base.items()}
    assert {tensor.dtype for tensor in one.values()} == {torch.bfloat16, torch.float32}
    assert all(torch.equal(one[name], two[name]) for name in two)
    assert not all(torch.equal(one[name], base[name]) for name in base)
    assert json.loads((tmp_path / "loaded/config.json").read_text())["dtype"] == "bfloat16"


def test_in_memory_leaves_no_half_model(tmp_path: Path, loaded: MergeModels, monkeypatch: pytest.MonkeyPatch):
    before = sorted(tmp_path.iterdir())

    def stops(policy: Policy, encoder: PromptEncoder, folder: Path) -> None:
        policy.save(folder)
        assert (folder / WEIGHTS).is_file()
        assert not (tmp_path / "out").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "save_model", stops)
    with pytest.raises(KeyboardInterrupt):
        loaded.write(MergeConfig(), tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before
    monkeypatch.undo()
    (tmp_path / ".out.writing").mkdir()  # of a merge that was killed
    loaded.write(MergeConfig(), tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "out"])
