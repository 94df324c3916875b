"""The run folder: whose it is, and samples with their pictures that survive a kill."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from copd_engine import run_folder
from copd_engine.config import RunConfig, build_config, load_config
from copd_engine.types import EncodedPrompt, Example, Rollout, RolloutRequest, UserError
from tests.small_run import contents
from tests.video_files import write_video


def config_of(**changes: Any) -> RunConfig:
    branches = [{"name": name, "data": {"domain": name}} for name in ("text", "image")]
    return build_config({"branches": branches, **changes})


def test_samples_of_media_in_files(tmp_path: Path) -> None:
    """A picture from its bytes made small enough for the report, a film as every second of its sampled frames."""
    large = io.BytesIO()
    Image.new("RGB", (4096, 8), (9, 9, 9)).save(large, "PNG")
    write_video(tmp_path / "a.mp4", 90, rate=30)  # 6 frames at 2 a second
    run_folder.save_sample(tmp_path, 1, "a", "a", rollout_of("a", (large.getvalue(),), (tmp_path / "a.mp4",)), 0.0)
    picture, strip = (np.asarray(Image.open(tmp_path / name)) for name in samples(tmp_path)[0]["media"])
    assert picture.shape == (4, 2048, 3)
    assert strip.shape == (48, 3 * 64, 3)
    assert [round(strip[:, 64 * i : 64 * i + 64].mean() / 4) for i in range(3)] == [0, 30, 60]


def test_claim_writes_the_config_and_accepts_its_own_run_again(tmp_path: Path) -> None:
    config = config_of(optim={"lr": 1e-6}, schedule={"topology": [["text", "image"]]})
    run_dir = tmp_path / "a" / "b"
    run_folder.claim(run_dir, config)
    assert load_config(run_dir / "config.yaml") == config
    assert [path.name for path in run_dir.iterdir()] == ["config.yaml"]
    (run_dir / "metrics.jsonl").write_text("x")
    before = contents(run_dir)
    run_folder.claim(run_dir, config)
    assert contents(run_dir) == before


def test_a_run_may_be_moved_and_watched_by_tensorboard(tmp_path: Path) -> None:
    run_folder.claim(tmp_path / "run", config_of())
    run_folder.check(tmp_path / "run", config_of(name="other", output_dir="elsewhere", tensorboard=True))


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"seed": 1}, "seed was 0, is 1"),
        ({"optim": {"lr": 1e-3}}, "optim.lr was 1e-06, is 0.001"),
        ({"schedule": {"topology": [["text", "image"]]}}, "schedule.topology was 'hub', is [['text', 'image']]"),
        ({"branches": [{"name": "text", "data": {"domain": "text"}}]}, "branches was ["),
        (
            {"branches": [{"name": n, "data": {"domain": d}} for n, d in (("text", "text"), ("image", "video"))]},
            "branches.1.data.domain was 'image', is 'video'",
        ),
    ],
)
def test_a_folder_with_another_config_is_refused_and_left_alone(
    tmp_path: Path, changes: dict[str, Any], difference: str
) -> None:
    run_folder.claim(tmp_path / "run", config_of())
    before = contents(tmp_path)
    for refuse in (run_folder.claim, run_folder.check):
        with pytest.raises(UserError, match="holds a run with another config") as caught:
            refuse(tmp_path / "run", config_of(**changes))
        assert difference in str(caught.value)
    assert contents(tmp_path) == before


def test_a_folder_that_is_no_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"exists and is not a run folder \(no config.yaml\)"):
        run_folder.claim(tmp_path, config_of())
    with pytest.raises(UserError, match="exists and is not a run folder"):
        run_folder.claim(tmp_path / "thesis.txt", config_of())
    assert contents(tmp_path) == {"thesis.txt": b"years of work"}


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot create the run folder .*file/run: Not a directory"):
        run_folder.claim(tmp_path / "file" / "run", config_of())


def test_check_writes_nothing(tmp_path: Path) -> None:
    run_folder.check(tmp_path / "run", config_of())
    (tmp_path / "empty").mkdir()
    run_folder.check(tmp_path / "empty", config_of())
    assert not (tmp_path / "run").exists()
    assert not list((tmp_path / "empty").iterdir())


def test_a_claim_that_was_killed_can_be_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(Killed):
            run_folder.claim(tmp_path / "run", config_of())
    assert not (tmp_path / "run" / "config.yaml").exists()
    run_folder.claim(tmp_path / "run", config_of(seed=3))
    assert load_config(tmp_path / "run" / "config.yaml").seed == 3


def test_a_damaged_config_is_an_error_of_the_user(tmp_path: Path) -> None:
    run_folder.claim(tmp_path / "run", config_of())
    (tmp_path / "run" / "config.yaml").write_text("seed: [")
    with pytest.raises(UserError, match="not valid YAML"):
        run_folder.claim(tmp_path / "run", config_of())


# Samples


def rollout_of(uid: str = "a", images: tuple[Any, ...] = (), videos: tuple[Any, ...] = ()) -> Rollout:
    example = Example(uid, "<image>How } many?", "2", "exact", images, videos)
    ids = torch.zeros(1, dtype=torch.int64)
    prompt = EncodedPrompt(example, ids, ids.expand(3, -1), 1)
    return Rollout(RolloutRequest(prompt, 0, 0), ids, torch.zeros(1), "stop", 0, text="zwei\u2028{}")


def samples(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]


def grey(value: int, size: tuple[int, int] = (3, 2)) -> Image.Image:
    return Image.new("RGB", size, (value, value, value))


def test_a_sample_with_its_pictures(tmp_path: Path) -> None:
    video = np.stack([np.full((2, 3, 3), 10 * frame, dtype=np.uint8) for frame in range(5)])
    run_folder.save_sample(tmp_path, 20, "image", "text", rollout_of("a", (grey(7),), (video,)), 0.5)
    (row,) = samples(tmp_path)
    picture, strip = (np.asarray(Image.open(tmp_path / name)) for name in row.pop("media"))
    assert row == {
        "step": 20,
        "branch": "image",
        "domain": "text",
        "prompt": "<image>How } many?",
        "response": "zwei\u2028{}",
        "answer": "2",
        "reward": 0.5,
    }
    assert (picture == 7).all()
    assert picture.shape == (2, 3, 3)
    assert strip[0, :, 0].tolist() == [0, 0, 0, 20, 20, 20, 40, 40, 40]


def test_equal_uids_of_two_data_files_keep_their_own_pictures(tmp_path: Path) -> None:
    for value in (1, 2, 1):
        run_folder.save_sample(tmp_path, 1, "a", "a", rollout_of("train.jsonl:1", (grey(value),)), 0.0)
    for size in ((6, 1), (1, 6)):
        run_folder.save_sample(tmp_path, 1, "a", "a", rollout_of("train.jsonl:1", (grey(1, size),)), 0.0)
    pictures = [Image.open(tmp_path / row["media"][0]) for row in samples(tmp_path)]
    assert [(p.getpixel((0, 0))[0], p.size) for p in pictures] == [
        (1, (3, 2)),
        (2, (3, 2)),
        (1, (3, 2)),
        (1, (6, 1)),
        (1, (1, 6)),
    ]
    assert len(list((tmp_path / "media").iterdir())) == 4


def test_a_picture_torn_by_a_kill_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    def killed(self: Image.Image, file: Any) -> None:
        Path(file).write_bytes(b"half a picture")
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", killed)
        with pytest.raises(Killed):
            run_folder.save_sample(tmp_path, 1, "a", "a", rollout_of(images=(grey(9),)), 0.0)
    run_folder.save_sample(tmp_path, 1, "a", "a", rollout_of(images=(grey(9),)), 0.0)
    assert (np.asarray(Image.open(tmp_path / samples(tmp_path)[0]["media"][0])) == 9).all()


def test_resuming_forgets_what_is_drawn_again(tmp_path: Path) -> None:
    for step, model in [(2, "text"), (2, "image"), (4, "text"), (4, "merged"), (6, "text")]:
        run_folder.save_sample(tmp_path, step, model, "text", rollout_of(), 1.0)
    run_folder.drop_later_samples(tmp_path, 4, {"text": 0, "image": 0})
    assert [(row["step"], row["branch"]) for row in samples(tmp_path)] == [(2, "text"), (2, "image"), (4, "text")]
    run_folder.drop_later_samples(tmp_path, 1, ["text", "image"])
    assert samples(tmp_path) == []


@pytest.mark.parametrize("cut", [1, 9, 40, 66, 67, 68, 69, 70, 90])
def test_a_line_torn_by_a_kill_is_dropped(tmp_path: Path, cut: int) -> None:
    """Also one torn right behind a brace in its own text."""
    run_folder.save_sample(tmp_path, 1, "text", "text", rollout_of(), 1.0)
    whole = (tmp_path / "samples.jsonl").read_bytes()
    assert whole[66:71].count(b"}") == 1
    (tmp_path / "samples.jsonl").write_bytes(whole + whole[:cut])
    run_folder.drop_later_samples(tmp_path, 1, ["text"])
    assert (tmp_path / "samples.jsonl").read_bytes() == whole


def test_no_samples_are_fine(tmp_path: Path) -> None:
    run_folder.drop_later_samples(tmp_path, 1, [])
    assert not list(tmp_path.iterdir())


def test_json_is_replaced_as_a_whole(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    run_folder.write_json(file, {"a": 1})
    with pytest.raises(TypeError):
        run_folder.write_json(file, {"a": object()})
    assert json.loads(file.read_text()) == {"a": 1}


def test_the_saved_config_is_plain_yaml(tmp_path: Path) -> None:
    run_folder.claim(tmp_path / "run", config_of(output_dir="x"))
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["output_dir"] == "x"
