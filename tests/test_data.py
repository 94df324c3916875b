"""Loading examples: fields, media, splits and every error line; the stream resumes at the exact next example."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from copd_engine.config import DataConfig
from copd_engine.data import DataStream, load_examples, with_instruction
from copd_engine.types import Example, UserError
from copd_engine.verifiers import get_verifier


def jsonl(path: Path, **options: Any) -> DataConfig:
    return DataConfig(source="jsonl", path=path, **options)


def write(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def rows(n: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"prompt": f"q{i}", "answer": i} for i in range(start, start + n)]


# Rows


def test_a_row_with_everything(tmp_path: Path) -> None:
    (tmp_path / "media").mkdir()
    Image.new("L", (4, 3), 200).save(tmp_path / "media" / "grey.png")
    video = np.arange(2 * 3 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 3)
    np.save(tmp_path / "media" / "clip.npy", video)
    row = {
        "prompt": "<image><video>What?",
        "answer": 7,
        "images": ["media/grey.png"],
        "videos": ["media/clip.npy"],
        "verifier": "answer_after_hash",
        "uid": "seven",
        "fps": 4,
        "metadata": {"level": 2},
    }
    path = write(tmp_path / "data.jsonl", row, "", {"prompt": "Why?", "answer": " so "}, {"prompt": "x", "answer": 1.5})
    first, second = load_examples(jsonl(path, eval_size=1), "train")
    assert (first.uid, first.prompt, first.answer, first.verifier) == (
        "seven",
        "<image><video>What?",
        "7",
        "answer_after_hash",
    )
    assert first.fps == 4.0
    assert first.metadata == {"level": 2}
    assert first.images[0].mode == "RGB"
    assert first.images[0].size == (4, 3)
    assert first.images[0].getpixel((0, 0)) == (200, 200, 200)
    assert np.array_equal(first.videos[0], video)
    assert (second.uid, second.answer, second.verifier, second.fps) == ("data.jsonl:3", "so", "exact", 2.0)
    assert second.images == ()
    (held_out,) = load_examples(jsonl(path, eval_size=1), "eval")
    assert held_out.answer == "1.5"


def test_videos_from_frames_and_gif(tmp_path: Path) -> None:
    folder = tmp_path / "frames"
    folder.mkdir()
    for i in (0, 2, 10):  # 10 sorts before 2 as text
        Image.new("RGB", (4, 3), (i, 0, 0)).save(folder / f"frame{i}.png")
    (folder / "notes.txt").write_text("no frame")
    frames = [Image.new("RGB", (4, 3), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    path = write(tmp_path / "d.jsonl", {"prompt": "?", "answer": "1", "videos": ["frames", "moving.gif"]}, *rows(1))
    from_folder, from_gif = load_examples(jsonl(path, eval_size=1), "train")[0].videos
    assert from_folder.dtype == np.uint8
    assert from_folder.shape == (3, 3, 4, 3)
    assert from_folder[:, 0, 0, 0].tolist() == [0, 2, 10]
    assert from_gif.dtype == np.uint8
    assert from_gif[:, 0, 0].tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]


def test_config_verifier_overrides_and_instruction_is_applied(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", {"prompt": "q", "answer": "1", "verifier": "exact"}, *rows(1))
    (example,) = load_examples(jsonl(path, verifier="answer_after_hash", instruction="Be short.", eval_size=1), "train")
    assert example.verifier == "answer_after_hash"
    assert example.prompt == "q\nBe short."
    assert with_instruction("q?", "1+1=2\n{question} =") == "1+1=2\nq? ="
    assert with_instruction("q?", "") == "q?"


GOOD = {"prompt": "q", "answer": "1"}
BAD_ROWS = [
    ("{oops", r"not JSON: "),
    ('{"prompt": "q", "answer": NaN}', r"not JSON: NaN is no JSON number"),
    ("[1]", r"a row must be a JSON object, it is list"),
    ({"prompt": "q"}, r"field 'answer' is missing"),
    ({"prompt": "q", "answer": None}, r"field 'answer' is missing"),
    ({"answer": "1"}, r"field 'prompt' is missing"),
    ({"prompt": "q", "anwser": "1"}, r"unknown field 'anwser' \(did you mean 'answer'\?\)"),
    ({**GOOD, "zzzz": 1}, r"unknown field 'zzzz' \(known: answer, fps, .*'metadata'"),
    ({**GOOD, "prompt": "  "}, r"prompt = '  ': must be text that is not empty"),
    ({**GOOD, "prompt": 3}, r"prompt = 3: must be text"),
    ({**GOOD, "answer": True}, r"answer = True: must be text or a number"),
    ({**GOOD, "answer": ""}, r"answer = '': must be text or a number"),
    ({**GOOD, "answer": " "}, r"answer = ' ': must not be blank"),
    ({**GOOD, "answer": ["1"]}, r"answer = \['1'\]: must be text or a number"),
    ('{"prompt": "q", "answer": 1e999}', r"answer = inf: must be a finite number"),
    ({**GOOD, "fps": 0}, r"fps = 0: must be a number above 0"),
    ({**GOOD, "fps": "2"}, r"fps = '2': must be a number"),
    ({**GOOD, "metadata": 1}, r"metadata = 1: must be a mapping"),
    ({**GOOD, "uid": ""}, r"uid = '': must be text or a whole number"),
    ({**GOOD, "verifier": "exakt"}, r"verifier: unknown verifier 'exakt' \(did you mean 'exact'\?\)"),
    ({**GOOD, "verifier": 1}, r"verifier = 1: must be a name"),
    ({**GOOD, "verifier": "reasoning_gym"}, r"needs metadata\.reasoning_gym with 'task' and 'entry'"),
    ({**GOOD, "images": "a.png"}, r"images = 'a.png': must be a list of paths"),
    ({**GOOD, "images": [""]}, r"images = \[''\]: must be a list of paths"),
    ({**GOOD, "images": ["gone.png"]}, r"images: .*gone\.png does not exist"),
    ({**GOOD, "images": ["text.png"]}, r"images: .*text\.png cannot be read as an image"),
    ({**GOOD, "images": ["cut.png"]}, r"images: .*cut\.png cannot be read as an image"),
    ({**GOOD, "prompt": "<image><image>?", "images": ["ok.png"]}, r"2 <image> markers, 'images' has 1 files"),
    ({**GOOD, "prompt": "<video>?"}, r"1 <video> markers, 'videos' has 0 files"),
    ({**GOOD, "videos": ["gone.gif"]}, r"videos: .*gone\.gif does not exist"),
    (
        {**GOOD, "videos": ["clip.mp4"]},
        r"clip\.mp4 has no readable video format: a folder of frames, an animated \.gif",
    ),
    ({**GOOD, "videos": ["bad.gif"]}, r"bad\.gif cannot be read as a GIF"),
    ({**GOOD, "videos": ["bad.npy"]}, r"bad\.npy cannot be read as a \.npy array"),
    ({**GOOD, "videos": ["pickled.npy"]}, r"pickled\.npy cannot be read as a \.npy array"),
    ({**GOOD, "videos": ["float.npy"]}, r"is float64 \[2, 3, 4, 3\], it must be uint8"),
    ({**GOOD, "videos": ["empty"]}, r"empty holds no frames"),
    ({**GOOD, "videos": ["uneven"]}, r"uneven differ in size"),
]


@pytest.fixture
def media(tmp_path: Path) -> Path:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)).save(tmp_path / "ok.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "ok.png").read_bytes()[:700])
    for name in ("text.png", "bad.gif", "bad.npy", "clip.mp4"):
        (tmp_path / name).write_text("no media")
    np.save(tmp_path / "float.npy", np.zeros((2, 3, 4, 3)))
    np.save(tmp_path / "pickled.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "uneven").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "uneven" / "1.png")
    Image.new("RGB", (5, 4)).save(tmp_path / "uneven" / "2.png")
    return tmp_path


@pytest.mark.parametrize(("row", "message"), BAD_ROWS)
def test_bad_row_names_file_line_and_field(row: Any, message: str, media: Path) -> None:
    path = write(media / "data.jsonl", GOOD, row, GOOD)
    with pytest.raises(UserError, match=rf"data\.jsonl:2: .*{message}") as caught:
        load_examples(jsonl(path, eval_size=1), "train")
    assert "\n" not in str(caught.value)


def test_uid_twice(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", {**GOOD, "uid": "a"}, {**GOOD, "uid": "a"}, GOOD)
    with pytest.raises(UserError, match=r"d\.jsonl:2: uid 'a' is already that of line 1"):
        load_examples(jsonl(path, eval_size=1), "train")


# Files and splits


@pytest.mark.parametrize("split", ["train", "eval"])
def test_bad_files(split: Any, tmp_path: Path) -> None:
    def fails(config: DataConfig, message: str) -> None:
        with pytest.raises(UserError, match=message):
            load_examples(config, split, where="branches.1.data")

    fails(jsonl(tmp_path / "gone.jsonl"), r"branches\.1\.data\.path: .*gone\.jsonl does not exist")
    fails(jsonl(tmp_path), r"branches\.1\.data\.path: .* does not exist")
    fails(jsonl(write(tmp_path / "empty.jsonl", "", "  ")), r"branches\.1\.data\.path: .*empty\.jsonl is empty")
    fails(jsonl(write(tmp_path / "one.jsonl", GOOD)), r"one\.jsonl has 1 row")
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é", "answer": 1}'.encode("latin-1"))
    fails(jsonl(tmp_path / "latin.jsonl"), r"latin\.jsonl is not UTF-8 text")
    good = write(tmp_path / "good.jsonl", *rows(3))
    fails(jsonl(good, eval_path=good), r"branches\.1\.data\.eval_path: .*good\.jsonl is the training file")
    fails(jsonl(good, verifier="exakt"), r"branches\.1\.data\.verifier: unknown verifier 'exakt'")


def test_bad_eval_path(tmp_path: Path) -> None:
    good = write(tmp_path / "good.jsonl", *rows(1))
    config = jsonl(good, eval_path=tmp_path / "gone.jsonl")
    assert len(load_examples(config, "train")) == 1
    with pytest.raises(UserError, match=r"data\.eval_path: .*gone\.jsonl does not exist"):
        load_examples(config, "eval")


@given(num_rows=st.integers(2, 30), eval_size=st.integers(1, 40))
def test_held_out_rows(num_rows: int, eval_size: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = write(tmp_path_factory.mktemp("held") / "d.jsonl", *rows(num_rows))
    train = [example.prompt for example in load_examples(jsonl(path, eval_size=eval_size), "train")]
    held_out = [example.prompt for example in load_examples(jsonl(path, eval_size=eval_size), "eval")]
    assert train + held_out == [f"q{i}" for i in range(num_rows)]
    assert len(held_out) == (eval_size if eval_size < num_rows else num_rows // 2)


def test_eval_path_leaves_all_rows_to_train(tmp_path: Path) -> None:
    config = jsonl(
        write(tmp_path / "a.jsonl", *rows(5)), eval_path=write(tmp_path / "b.jsonl", *rows(2, start=5)), eval_size=1
    )
    assert [example.answer for example in load_examples(config, "train")] == list("01234")
    assert [example.answer for example in load_examples(config, "eval")] == list("56")


# reasoning-gym


def gym(task: str, **options: Any) -> DataConfig:
    pytest.importorskip("reasoning_gym")
    return DataConfig(source="reasoning_gym", task=task, **options)


@pytest.mark.parametrize(
    ("task", "task_config"), [("chain_sum", {"max_terms": 3}), ("letter_counting", {"max_words": 6}), ("gcd", {})]
)
def test_reasoning_gym_task(task: str, task_config: dict[str, Any]) -> None:
    config = gym(task, task_config=task_config, size=60, eval_size=30, instruction="Reply with the number only.")
    train, held_out = load_examples(config, "train"), load_examples(config, "eval")
    assert len(train) == 60
    assert len(held_out) == 30
    assert not {e.prompt for e in train} & {e.prompt for e in held_out}
    assert len({e.uid for e in [*train, *held_out]}) == 90
    assert load_examples(config, "train") == train
    assert load_examples(config, "eval") == held_out
    for example in [*train[:10], *held_out[:10]]:
        assert example.prompt.endswith("\nReply with the number only.")
        verify = get_verifier(example.verifier)
        assert verify(example.answer, example) == 1.0
        assert verify(f"{example.answer}1", example) == 0.0


def test_reasoning_gym_seeds_differ_and_do_not_shift() -> None:
    first, second = (load_examples(gym("gcd", size=40, seed=seed), "train") for seed in (0, 10**6))
    assert not {e.prompt for e in first} & {e.prompt for e in second}


def test_reasoning_gym_small_task_keeps_the_splits_apart() -> None:
    tiny = {"min_terms": 2, "max_terms": 2, "max_digits": 1}  # some 200 different questions
    config = gym("chain_sum", task_config=tiny, size=100, eval_size=400)
    train, held_out = load_examples(config, "train"), load_examples(config, "eval")
    prompts = [e.prompt for e in held_out]
    assert 0 < len(prompts) < 200
    assert max(Counter(prompts).values()) == 1
    assert not {e.prompt for e in train} & set(prompts)
    with pytest.raises(UserError, match=r"branches\.0\.data: none of 40 held-out questions of task 'chain_sum'"):
        load_examples(gym("chain_sum", task_config=tiny, size=5000, eval_size=10), "eval")


def test_reasoning_gym_config_verifier() -> None:
    (example,) = load_examples(gym("chain_sum", size=1, verifier="math"), "train")
    assert example.verifier == "math"
    assert get_verifier("math")(f"The final answer is {example.answer}.", example) == 1.0


@pytest.mark.parametrize(
    ("task", "task_config", "message"),
    [
        ("chain_sm", {}, r"data\.task: reasoning-gym has no task 'chain_sm' \(did you mean 'chain_sum'\?\)"),
        ("chain_sum", {"max_term": 3}, r"data\.task_config: .*no option 'max_term' \(did you mean 'max_terms'\?\)"),
        ("chain_sum", {"seed": 3}, r"data\.task_config: .*no option 'seed'"),
        ("chain_sum", {"min_terms": 9}, r"data\.task_config: task 'chain_sum' refuses it: max_terms must be"),
        ("chain_sum", {"min_terms": "a"}, r"data\.task_config: task 'chain_sum' refuses it: "),
    ],
)
def test_reasoning_gym_errors(task: str, task_config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_examples(gym(task, task_config=task_config, size=5), "train")


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    with pytest.raises(UserError, match=r"data\.source: 'reasoning_gym' needs .* install the extra 'llm'"):
        load_examples(DataConfig(source="reasoning_gym", task="gcd"), "train")


# Testbed


def test_testbed_source() -> None:
    config = DataConfig(domain="text", size=20, eval_size=10)
    train, held_out = load_examples(config, "train"), load_examples(config, "eval")
    assert (len(train), len(held_out)) == (20, 10)
    assert not {e.prompt for e in train} & {e.prompt for e in held_out}
    assert {e.verifier for e in train} == {"answer_after_hash"}
    assert load_examples(DataConfig(domain="text", size=1, verifier="exact"), "train")[0].verifier == "exact"
    with pytest.raises(UserError, match=r"branches\.2\.data\.domain: .*'txt'"):
        load_examples(DataConfig(domain="txt"), "train", where="branches.2.data")


# Stream


def numbered(n: int) -> list[Example]:
    return [Example(uid=str(i), prompt="q", answer="1", verifier="exact") for i in range(n)]


def uids(examples: list[Example]) -> list[str]:
    return [example.uid for example in examples]


@given(
    n=st.integers(1, 12),
    seed=st.integers(0, 2**32),
    before=st.lists(st.integers(0, 30), max_size=5),
    after=st.integers(0, 40),
)
def test_a_resumed_stream_equals_the_undisturbed_one(n: int, seed: int, before: list[int], after: int) -> None:
    undisturbed, stopped = DataStream(numbered(n), seed), DataStream(numbered(n), seed)
    expected = uids(undisturbed.take(sum(before) + after))
    for size in before:
        stopped.take(size)
    state = json.loads(json.dumps(stopped.state_dict()))  # the checkpoint's manifest is JSON
    resumed = DataStream(numbered(n), seed)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == stopped.state_dict()
    assert uids(resumed.take(after)) == expected[sum(before) :] == uids(stopped.take(after))


@given(n=st.integers(1, 12), epochs=st.integers(1, 4), seed=st.integers(0, 100))
def test_every_epoch_holds_every_example_once(n: int, epochs: int, seed: int) -> None:
    taken = uids(DataStream(numbered(n), seed).take(n * epochs))
    for epoch in range(epochs):
        assert sorted(taken[epoch * n : (epoch + 1) * n], key=int) == [str(i) for i in range(n)]


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    taken = uids(DataStream(numbered(50), 0).take(100))
    assert taken[:50] != taken[50:]
    assert taken[:50] != uids(DataStream(numbered(50), 1).take(50))
    assert taken[:50] == uids(DataStream(numbered(50), 0).take(50))


def test_stream_errors() -> None:
    with pytest.raises(UserError, match="at least one example"):
        DataStream([], 0)
    stream = DataStream(numbered(3), 0)
    with pytest.raises(ValueError, match="n = -1"):
        stream.take(-1)
    for state in ({"epoch": 0, "cursor": 4}, {"epoch": -1, "cursor": 0}, {"epoch": 0, "cursor": -1}):
        with pytest.raises(UserError, match="does not fit 3 examples"):
            stream.load_state_dict(state)
