"""Whole runs in bf16, with LoRA, a frozen vision tower, gradient checkpointing: what is merged, saved and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from copd_engine.config import build_config
from copd_engine.runs import run_with_baselines
from copd_engine.trainer import Trainer
from tests.small_run import numbers, small_config, train, write_base, write_data


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("material")
    return write_base(folder / "base"), write_data(folder / "data")


def config_of(material: tuple[Path, Path], output_dir: Path, **model: Any) -> dict[str, Any]:
    config = small_config(*material, output_dir, model=model)
    return config | {"schedule": {"cycles": 1, "rl_steps": 2, "opd_steps": 1}}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


MODES: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"rank": 2}},
    "lora in bf16": {"lora": {"rank": 2}, "dtype": "bfloat16"},
    "bf16": {"dtype": "bfloat16"},
    "frozen vision": {"freeze_vision": True},
}


@pytest.fixture(scope="module", params=list(MODES))
def run(request: pytest.FixtureRequest, material: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("run")
    return request.param, train(config_of(material, folder, **MODES[request.param]))


def test_the_merged_model_is_the_mean_of_the_saved_branches(run: Any, material: tuple[Path, Path]) -> None:
    """In plain weights: for LoRA the mean of the products B A, not the product of the means."""
    mode, folder = run
    base = weights(material[0])
    branches = [weights(folder / f"models/branch-{name}") for name in ("text", "image", "video")]
    merged = weights(folder / "models/merged")
    assert set(merged) == set(base)
    dtype = torch.bfloat16 if "bf16" in mode else torch.float32
    # The branches of a bf16 run are rounded when they are saved, the merge is made of what training has.
    rounding = 2.0**-7 if dtype is torch.bfloat16 else 2.0**-20
    for name, value in merged.items():
        assert value.dtype == dtype
        stacked = torch.stack([branch[name].double() for branch in branches])
        error = (value.double() - stacked.mean(0)).abs()
        assert bool((error <= rounding * stacked.abs().amax(0) + 1e-8).all()), name


def test_what_is_frozen_stays_and_the_rest_moves(run: Any, material: tuple[Path, Path]) -> None:
    mode, folder = run
    base = weights(material[0])
    for name in ("text", "image", "video"):
        branch = weights(folder / f"models/branch-{name}")
        moved = {key for key, value in branch.items() if not torch.equal(value, base[key].to(value.dtype))}
        assert moved
        if mode == "frozen vision" or "lora" in mode:
            assert not any(".visual." in key for key in moved)
        elif name != "text":
            assert any(".visual." in key for key in moved)
        if "lora" in mode:
            assert not any("norm" in key or "embed" in key for key in moved)


def test_a_saved_model_is_a_plain_one(run: Any) -> None:
    _, folder = run
    plain = AutoModelForImageTextToText.from_pretrained(folder / "models/merged")
    assert not any("lora" in name for name, _ in plain.named_parameters())


def test_a_killed_run_goes_on_to_the_same_weights(run: Any, material: tuple[Path, Path], tmp_path: Path) -> None:
    """Killed after the checkpoint of step 2: the masters and the adapters are in it."""
    mode, folder = run
    config = build_config(config_of(material, tmp_path, **MODES[mode]))
    trainer = Trainer(config, tmp_path / "small")
    step = trainer.step
    trainer.step = lambda plan: step(plan) if plan.step < 3 else (_ for _ in ()).throw(KeyboardInterrupt)  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    run_with_baselines(config, tmp_path / "small")
    assert numbers(tmp_path / "small") == numbers(folder)
    for model in ("merged", "branch-text", "branch-video"):
        one, two = (weights(path / "models" / model) for path in (folder, tmp_path / "small"))
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_lora_branches_share_one_base(material: tuple[Path, Path], tmp_path: Path) -> None:
    trainer = Trainer(build_config(config_of(material, tmp_path, **MODES["lora"])), tmp_path / "run")
    modules = [branch.policy.module for branch in trainer.branches.values()]
    for name, parameter in modules[0].named_parameters():
        same = [dict(m.named_parameters())[name].data_ptr() == parameter.data_ptr() for m in modules[1:]]
        assert all(same) if ".lora_" not in name else not any(same)


def test_gradient_checkpointing_changes_no_number(material: tuple[Path, Path], tmp_path: Path) -> None:
    runs = [
        train(config_of(material, tmp_path / str(on), gradient_checkpointing=on) | {"name": "small"})
        for on in (False, True)
    ]
    one, two = (weights(run / "models/merged") for run in runs)
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=1e-4)


def test_bf16_branches_are_merged_from_their_masters(material: tuple[Path, Path], tmp_path: Path) -> None:
    """1 + .45 u, 1 + .45 u and 1 + .9 u, u the spacing of bf16 above 1: the mean is 1 + u when it is rounded, and 1
    when the branches are rounded first."""
    trainer = Trainer(build_config(config_of(material, tmp_path, dtype="bfloat16")), tmp_path / "run")
    name = "model.language_model.norm.weight"
    for branch, share in zip(trainer.branches.values(), (0.45, 0.45, 0.9), strict=True):
        with torch.no_grad():
            branch.masters.tensors[name].fill_(1 + share * 2.0**-7)
        branch.masters.round_into_model()
    assert sorted({float(b.parameters[name][0]) for b in trainer.branches.values()}) == [1.0, 1 + 2.0**-7]
    merged = trainer.rows.merged_parameters()[name]
    assert merged.dtype == torch.bfloat16
    assert set(merged.tolist()) == {1 + 2.0**-7}
