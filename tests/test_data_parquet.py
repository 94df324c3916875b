"""Parquet: images inside the file and beside it, row groups, shards, damaged files; the schemas of ``docs/data.md``."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from copd_engine.config import DataConfig
from copd_engine.data import files, load_examples
from copd_engine.media import open_image
from copd_engine.types import UserError

DOCS = (Path(__file__).parents[1] / "docs" / "data.md").read_text()


def png(value: int = 7) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (value, value, value)).save(file, "PNG")
    return file.getvalue()


def parquet(path: Path, rows: list[dict[str, Any]], row_group_size: int = 4) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group_size)
    return path


def config(path: Path, **options: Any) -> DataConfig:
    return DataConfig(source="parquet", path=path, **{"eval_size": 1, **options})


def test_images_inside_the_file_and_beside_it(tmp_path: Path) -> None:
    (tmp_path / "b.png").write_bytes(png(9))
    rows = [
        {"prompt": "<image>?", "answer": "1", "images": [{"bytes": png(), "path": "a.png"}]},
        {"prompt": "<image>?", "answer": "2", "images": [{"bytes": None, "path": "b.png"}]},
        {"prompt": "?", "answer": "3", "images": None},
    ]
    one, two = load_examples(config(parquet(tmp_path / "d.parquet", rows)), "train")
    assert one.images == (png(),)
    assert two.images == (tmp_path / "b.png",)
    assert [open_image(e.images[0], e.where).getpixel((0, 0))[0] for e in (one, two)] == [7, 9]
    assert one.where == f"{tmp_path / 'd.parquet'}:1"
    assert load_examples(config(tmp_path / "d.parquet"), "eval")[0].images == ()


def test_rows_of_every_group_and_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "CACHE_BYTES", 1)  # one row group at a time
    for shard in range(3):
        parquet(tmp_path / f"s-{shard}.parquet", [{"prompt": f"q{10 * shard + i}", "answer": i} for i in range(10)], 4)
    examples = load_examples(config(tmp_path), "train")
    order = np.random.default_rng(0).permutation(29)
    assert [examples[int(i)].prompt for i in order] == [f"q{i}" for i in order]
    assert examples[13].where == f"{tmp_path / 's-1.parquet'}:4"
    assert len({e.uid for e in examples}) == 29


def test_only_the_row_groups_used_last_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": "x" * 1000, "answer": i} for i in range(100)]
    read = []
    monkeypatch.setattr(files, "CACHE_BYTES", 25_000)
    data = files.ParquetRows(parquet(tmp_path / "d.parquet", rows, 10), "FILE")
    group = pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda self, i, **k: read.append(i) or group(self, i, **k))
    for index in (0, 5, 11, 3, 25, 12, 2):
        assert data.row(index)["answer"] == index
    assert read == [0, 1, 2, 1, 0]  # two groups of 10 kB fit; with the third the one used longest ago goes


def test_only_mapped_columns_are_read(tmp_path: Path) -> None:
    rows = [{"q": f"q{i}", "a": {"b": {"c": i}}, "large": "x" * 1000} for i in range(4)]
    path = parquet(tmp_path / "d.parquet", rows)
    examples = load_examples(config(path, columns={"prompt": "q", "answer": "a.b.c"}), "train")
    assert [e.answer for e in examples] == ["0", "1", "2"]
    data = files.ParquetRows(path, "FILE", ["q", "a.b.c"])
    assert data.row(2) == {"q": "q2", "a": {"b": {"c": 2}}}
    with pytest.raises(UserError, match=r"data\.path: .*d\.parquet has no column 'qq' \(did you mean 'q'\?\)"):
        load_examples(config(path, columns={"prompt": "qq", "answer": "a.b.c"}), "train")
    with pytest.raises(UserError, match=r"d\.parquet:1: unknown field 'q'.*the config's 'columns'"):
        load_examples(config(path), "train")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "bad.parquet").write_text("no parquet")
    (tmp_path / "none").mkdir()
    parquet(tmp_path / "empty.parquet", [{"prompt": "q", "answer": "1"}][:0] or [])
    good = parquet(tmp_path / "good.parquet", [{"prompt": "x" * 5000 + str(i), "answer": "1"} for i in range(40)], 10)
    data = bytearray(good.read_bytes())
    data[4:200] = bytes(196)
    (tmp_path / "torn.parquet").write_bytes(data)
    for name, message in {
        "gone.parquet": r"data\.path: .*gone\.parquet does not exist",
        "bad.parquet": r"data\.path: .*bad\.parquet cannot be read as Parquet",
        "none": r"none holds no \*\.parquet",
        "empty.parquet": r"empty\.parquet is empty",
        "torn.parquet": r"torn\.parquet:1: cannot be read from Parquet",
    }.items():
        with pytest.raises(UserError, match=message):
            load_examples(config(tmp_path / name), "train")


# The schemas of docs/data.md


def section(name: str, path: Path) -> DataConfig:
    block = re.search(rf"<!-- schema: {name} -->\n```yaml\n(.*?)```", DOCS, re.DOTALL)
    assert block
    return DataConfig.model_validate(yaml.safe_load(block[1]) | {"path": path, "eval_size": 1})


def test_easyr1(tmp_path: Path) -> None:
    row = {"images": [{"bytes": png(), "path": None}], "problem": "<image>Find x.", "answer": "3"}
    (example,) = load_examples(section("easyr1", parquet(tmp_path / "d.parquet", [row, row])), "train")
    assert (example.prompt, example.answer, example.verifier) == ("<image>Find x.", "3", "math")
    assert example.images == (png(),)


def test_verl(tmp_path: Path) -> None:
    row = {
        "data_source": "openai/gsm8k",
        "prompt": [{"role": "system", "content": "Think."}, {"role": "user", "content": "2 + 3?"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "5"},
        "extra_info": {"split": "train", "index": 0},
    }
    (example,) = load_examples(section("verl", parquet(tmp_path / "d.parquet", [row, row])), "train")
    assert (example.prompt, example.answer) == ("2 + 3?", "5")
    assert example.messages == ({"role": "system", "content": "Think."}, {"role": "user", "content": "2 + 3?"})
    assert example.metadata == {"split": "train", "index": 0}


def test_polaris(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    rows = [{"problem": f"p{i}", "answer": str(i), "difficulty": f"{i}/8"} for i in range(9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [e.answer for e in load_examples(section("polaris", path), "train")] == list("123456")
    assert [e.answer for e in load_examples(section("polaris", path), "eval")] == ["7"]


def test_mmfinereason(tmp_path: Path) -> None:
    rows = [
        {
            "source": "Euclid30K",
            "id": i,
            "question": "<image>How long is AB?",
            "answer": str(i),
            "original_answer": str(i),
            "image": {"bytes": png(i), "path": None},
            "qwen3vl_235b_thinking_response": "<think>...</think>",
            "pass_rate": rate,
            "is_consistent": True,
        }
        for i, rate in enumerate([0.0, 0.5, 1.0, 0.25])
    ]
    parquet(tmp_path / "train-00000-of-00002.parquet", rows[:2])
    parquet(tmp_path / "train-00001-of-00002.parquet", rows[2:])
    examples = load_examples(section("mmfinereason", tmp_path), "train")
    assert [e.answer for e in examples] == ["0", "1"]
    assert examples[1].images == (png(1),)
    assert [e.answer for e in load_examples(section("mmfinereason", tmp_path), "eval")] == ["3"]


VIDEO_ROWS = {
    "video-r1": {
        "problem_id": 2,
        "problem": "What is shown?",
        "data_type": "video",
        "problem_type": "multiple choice",
        "options": ["A. A cat", "B. A dog"],
        "solution": "<answer>B</answer>",
        "path": "./clips/a.mp4",
        "data_source": "LLaVA-Video-178K",
    },
    "onethinker": {
        "problem": "What is shown?",
        "data_type": "video",
        "problem_type": "multiple choice",
        "options": ["A. A cat", "B. A dog"],
        "answer": "<answer>B</answer>",
        "videos": ["clips/a.mp4"],
    },
    "videochat-r1": {
        "video": "clips/a.mp4",
        "question": "What is shown?",
        "options": ["A. A cat", "B. A dog"],
        "answer": "B",
        "duration": 12.0,
    },
}


@pytest.mark.parametrize("kind", VIDEO_ROWS)
def test_video_sets_by_the_script_of_the_docs(kind: str, tmp_path: Path) -> None:
    script = re.search(r"<!-- script: videos -->\n```python\n(.*?)```", DOCS, re.DOTALL)
    assert script
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.mp4").write_text("x")
    row = VIDEO_ROWS[kind]
    rates = (0.5, 0.0, 0.25)
    (tmp_path / "in.json").write_text(json.dumps([row | {"pass_rate": rate} for rate in rates]))
    subprocess.run([sys.executable, "-c", script[1], tmp_path / "in.json", tmp_path / "out.jsonl"], check=True)
    (example,) = load_examples(section("videos", tmp_path / "out.jsonl"), "train")
    assert example.prompt == "What is shown?\nOptions:\nA. A cat\nB. A dog\nAnswer with the letter of the option."
    assert (example.answer, example.verifier) == ("B", "multiple_choice")
    assert example.videos == (tmp_path / "clips" / "a.mp4",)
