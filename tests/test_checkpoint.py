"""Checkpoints: what is saved is loaded, damage is found wherever it is, and a kill never leaves less than one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from copd_engine import checkpoint
from copd_engine.branch import Branch
from copd_engine.checkpoint import MANIFEST, load_checkpoint, newest_checkpoint, save_checkpoint
from copd_engine.config import ObjectiveConfig, OptimConfig
from copd_engine.types import UserError
from tests.helpers import tiny_model

STATE = {"streams": {"text/text": {"epoch": 2, "cursor": 7}}, "elapsed_s": 0.1 + 0.2}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


def branches_of(model: Any, *names: str) -> dict[str, Branch]:
    policy, encoder = model
    return {n: Branch(n, policy.clone(), encoder, OptimConfig(lr=1e-2), ObjectiveConfig(), 1.0) for n in names}


def step(branch: Branch, seed: int) -> None:
    """An optimizer step on random gradients; the vision tower gets none, as in a branch of text."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in branch.parameters.items():
        if "visual" not in name:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
    branch.optimizer.step()
    branch.optimizer.zero_grad(set_to_none=True)
    branch.version += 1


@pytest.fixture
def trained(model: Any) -> dict[str, Branch]:
    branches = branches_of(model, "text", "image")
    for seed, branch in enumerate(branches.values()):
        step(branch, seed)
        step(branch, seed + 10)
    branches["image"].num_skipped, branches["image"].num_skipped_in_a_row = 5, 3
    return branches


def assert_equal(a: Branch, b: Branch) -> None:
    for name in a.parameters:
        assert torch.equal(a.parameters[name], b.parameters[name]), name
        one, two = (x.optimizer.state.get(x.parameters[name], {}) for x in (a, b))
        assert set(one) == set(two)
        assert all(torch.equal(one[key], two[key]) and one[key].dtype == two[key].dtype for key in one), name


def test_a_loaded_branch_continues_bitwise(model: Any, trained: dict[str, Branch], tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 4, trained, STATE, keep=2)
    loaded = branches_of(model, "image", "text")
    step(loaded["text"], 99)  # what stood there before must not shine through
    for parameter in loaded["text"].parameters.values():
        loaded["text"].optimizer.state[parameter] = {"step": torch.tensor(9.0)}
    assert load_checkpoint(path, loaded) == (4, STATE)
    assert (loaded["image"].version, loaded["image"].num_skipped, loaded["image"].num_skipped_in_a_row) == (2, 5, 3)
    assert (loaded["text"].version, loaded["text"].num_skipped, loaded["text"].num_skipped_in_a_row) == (2, 0, 0)
    for name, branch in trained.items():
        assert_equal(branch, loaded[name])
        step(branch, 7)
        step(loaded[name], 7)
        assert_equal(branch, loaded[name])
    assert not torch.equal(*(b.parameters["model.language_model.norm.weight"] for b in trained.values()))


def test_a_branch_that_was_never_updated(model: Any, tmp_path: Path) -> None:
    branches = branches_of(model, "text")
    path = save_checkpoint(tmp_path, 1, branches, {}, keep=1)
    loaded = branches_of(model, "text")
    step(loaded["text"], 0)
    load_checkpoint(path, loaded)
    assert_equal(branches["text"], loaded["text"])
    assert not loaded["text"].optimizer.state


def test_nothing_is_pickled(trained: dict[str, Branch], tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 4, trained, STATE, keep=2)
    assert sorted(file.name for file in path.iterdir()) == [
        "manifest.json",
        "model-image.safetensors",
        "model-text.safetensors",
        "optim-image.safetensors",
        "optim-text.safetensors",
    ]


def test_the_newest_are_kept_and_leftovers_of_a_kill_go(trained: dict[str, Branch], tmp_path: Path) -> None:
    for number in (2, 4, 6):
        save_checkpoint(tmp_path, number, trained, STATE, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000004", "step-000006"]
    (tmp_path / ".writing-000007").mkdir()
    (tmp_path / ".writing-000007" / "model-text.safetensors").write_bytes(b"half")
    (tmp_path / "step-000004" / MANIFEST).unlink()  # killed while it was removed
    save_checkpoint(tmp_path, 8, trained, STATE, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000006", "step-000008"]


def test_a_half_written_checkpoint_of_the_same_step_is_replaced(
    model: Any, trained: dict[str, Branch], tmp_path: Path
) -> None:
    (tmp_path / ".writing-000004").mkdir(parents=True)
    (tmp_path / ".writing-000004" / "junk").write_bytes(b"half")
    save_checkpoint(tmp_path, 4, branches_of(model, "text", "image"), {}, keep=2)
    path = save_checkpoint(tmp_path, 4, trained, STATE, keep=2)
    loaded = branches_of(model, "text", "image")
    load_checkpoint(path, loaded)
    assert_equal(trained["text"], loaded["text"])
    assert not (path / "junk").exists()


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the code under test catches it."""


@pytest.mark.parametrize("call", ["save_file", "_sync", "replace", "rmtree"])
def test_a_kill_at_any_point_leaves_a_whole_checkpoint(
    model: Any, trained: dict[str, Branch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Stopped before each call that touches the disk in turn, the folder holds the old checkpoint or the new one."""
    place = {"replace": checkpoint.os, "rmtree": checkpoint.shutil}.get(call, checkpoint)
    real = getattr(place, call)
    seen = set()
    for number in range(20):
        folder = tmp_path / f"{number}"
        save_checkpoint(folder, 2, branches_of(model, "text", "image"), {}, keep=1)
        countdown = [number]

        def killed_at(*args: Any, countdown: list[int] = countdown, **kwargs: Any) -> Any:
            countdown[0] -= 1
            if countdown[0] < 0:
                raise Killed
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(place, call, killed_at)
            try:
                save_checkpoint(folder, 4, trained, STATE, keep=1)
            except Killed:
                pass
            else:
                break
        newest = newest_checkpoint(folder)
        assert newest is not None
        seen.add(load_checkpoint(newest, branches_of(model, "text", "image"))[0])
    else:
        pytest.fail(f"{call} is called more than 20 times")
    assert number, f"{call} is never called"
    assert 2 in seen or call == "rmtree"
    assert newest_checkpoint(folder) == folder / "step-000004"


def flip_byte(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 0x04
    file.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a weight": lambda path: flip_byte(path / "model-text.safetensors", -5),
    "a moment": lambda path: flip_byte(path / "optim-image.safetensors", -5),
    "a header": lambda path: flip_byte(path / "model-image.safetensors", 20),
    "a short file": lambda path: (path / "model-text.safetensors").write_bytes(b""),
    "a missing file": lambda path: (path / "optim-text.safetensors").unlink(),
    "an empty manifest": lambda path: (path / MANIFEST).write_text(""),
    "a manifest of something else": lambda path: (path / MANIFEST).write_text("[1]"),
    "a manifest without a hash": lambda path: (path / MANIFEST).write_text('{"format": 1}'),
    "binary in the manifest": lambda path: (path / MANIFEST).write_bytes(b"\xff" * 100),
    "a cursor in the manifest": lambda path: (path / MANIFEST).write_text(
        (path / MANIFEST).read_text().replace('"cursor": 7', '"cursor": 3')
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(
    model: Any, trained: dict[str, Branch], tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    for number in (2, 4):
        save_checkpoint(tmp_path, number, trained, STATE, keep=2)
    DAMAGE[kind](tmp_path / "step-000004")
    with pytest.raises(UserError, match="step-000004"):
        load_checkpoint(tmp_path / "step-000004", branches_of(model, "text", "image"))
    assert newest_checkpoint(tmp_path) == tmp_path / "step-000002"
    assert "step-000004" in caplog.text
    DAMAGE[kind](tmp_path / "step-000002")
    with pytest.raises(UserError, match=r"step-000004.*no other checkpoint is whole"):
        newest_checkpoint(tmp_path)


def test_every_byte_of_the_manifest_counts(trained: dict[str, Branch], tmp_path: Path) -> None:
    """A flipped bit gives an error or, where it is in white space, the same content."""
    path = save_checkpoint(tmp_path, 4, {"text": trained["text"]}, STATE, keep=2)
    whole = (path / MANIFEST).read_bytes()
    content = json.loads(whole)
    for at in range(0, len(whole), 7):
        for bit in (0x01, 0x04, 0x80):
            (path / MANIFEST).write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
            try:
                assert checkpoint.read_manifest(path) == content
            except UserError:
                continue


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "nothing") is None
    (tmp_path / ".writing-000002").mkdir()
    assert newest_checkpoint(tmp_path) is None
    with pytest.raises(UserError, match="does not exist or has no manifest"):
        load_checkpoint(tmp_path / "step-000002", {})


def test_other_branches_and_other_models_are_refused(model: Any, trained: dict[str, Branch], tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 4, trained, STATE, keep=2)
    with pytest.raises(UserError, match=r"has branches \['image', 'text'\], the run \['text', 'video'\]"):
        load_checkpoint(path, branches_of(model, "text", "video"))
    other = tiny_model()[0]
    other.module.resize_token_embeddings(390)
    branches = branches_of((other, model[1]), "text", "image")
    with pytest.raises(UserError, match=r"embed_tokens.weight has shape \(384, 32\), the model \(390, 32\)"):
        load_checkpoint(path, branches)
