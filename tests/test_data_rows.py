"""Rows: fields, mapped columns, conversations, media, answers, and every error line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from copd_engine.data import load_examples, with_instruction
from copd_engine.types import Example, UserError
from tests.data_files import GOOD, jsonl, rows, write


def first(path: Path, row: Any, **options: Any) -> Example:
    return load_examples(jsonl(write(path / "d.jsonl", row, GOOD | {"prompt": "z"}), eval_size=1, **options), "train")[
        0
    ]


def mapped(path: Path, row: dict[str, Any], **columns: str) -> Example:
    file = write(path / "d.jsonl", row, row)
    return load_examples(jsonl(file, eval_size=1, columns=columns), "train")[0]


def test_a_row_with_everything(tmp_path: Path) -> None:
    (tmp_path / "media").mkdir()
    for name in ("grey.png", "clip.mp4"):
        (tmp_path / "media" / name).write_text("not looked into at load")
    row = {
        "prompt": "<image><video>What?",
        "answer": 7,
        "images": ["media/grey.png"],
        "videos": ["media/clip.mp4"],
        "verifier": "answer_after_hash",
        "uid": "seven",
        "fps": 4,
        "metadata": {"level": 2},
        "pass_rate": 0.5,
    }
    path = write(tmp_path / "data.jsonl", row, "", {"prompt": "Why?", "answer": " so "}, {"prompt": "x", "answer": 1.5})
    one, two = load_examples(jsonl(path, eval_size=1), "train")
    assert one == Example(
        uid="seven",
        prompt="<image><video>What?",
        answer="7",
        verifier="answer_after_hash",
        images=(tmp_path / "media" / "grey.png",),
        videos=(tmp_path / "media" / "clip.mp4",),
        fps=4.0,
        metadata={"level": 2},
        where=f"{path}:1",
    )
    assert (two.uid, two.answer, two.verifier, two.fps, two.images) == ("data.jsonl:3", "so", "exact", 2.0, ())
    assert one.name == f"prompt 'seven' ({path}:1)"
    (held_out,) = load_examples(jsonl(path, eval_size=1), "eval")
    assert (held_out.answer, held_out.where) == ("1.5", f"{path}:4")


def test_config_verifier_overrides_and_instruction_is_applied(tmp_path: Path) -> None:
    row = {"prompt": "q", "answer": "1", "verifier": "exact"}
    example = first(tmp_path, row, verifier="answer_after_hash", instruction="Be short.")
    assert example.verifier == "answer_after_hash"
    assert example.prompt == "q\nBe short."
    assert with_instruction("q?", "1+1=2\n{question} =") == "1+1=2\nq? ="
    assert with_instruction("q?", "") == "q?"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("<answer> B </answer>", "B"),
        (" 3 ", "3"),
        (3, "3"),
        (2.5, "2.5"),
        ([10, 20.5], "[10, 20.5]"),
        ([[1, 2], [3, 4]], "[[1, 2], [3, 4]]"),
        ({"name": "é"}, '{"name": "é"}'),
        ("a <answer>B</answer>", "a <answer>B</answer>"),
    ],
)
def test_answers(answer: Any, expected: str, tmp_path: Path) -> None:
    assert first(tmp_path, {"prompt": "q", "answer": answer}).answer == expected


# Conversations


def test_a_conversation(tmp_path: Path) -> None:
    for name in "abcd":
        (tmp_path / f"{name}.png").write_text("x")
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "First? "}]},
        {"role": "assistant", "content": "Yes."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "And <image> or "},
                {"type": "image", "image": "b.png"},
                {"type": "image_url", "image_url": {"url": "c.png"}},
                {"type": "video", "video": ["a.png", "d.png"]},
            ],
        },
    ]
    example = first(tmp_path, {"messages": messages, "answer": "1", "images": ["a.png", "d.png"]}, instruction="Short!")
    assert [turn["content"] for turn in example.messages] == [
        "Be kind.",
        "<image>First? ",
        "Yes.",
        "And <image> or <image><image><video>\nShort!",
    ]
    assert example.prompt == example.messages[-1]["content"] == example.turns[-1]["content"]
    assert [image.name for image in example.images] == ["a.png", "d.png", "b.png", "c.png"]  # in the order of markers
    assert example.videos == ((tmp_path / "a.png", tmp_path / "d.png"),)


def test_a_single_user_turn_is_a_prompt(tmp_path: Path) -> None:
    example = first(tmp_path, {"messages": [{"role": "user", "content": "q"}], "answer": "1"})
    assert (example.prompt, example.messages) == ("q", ())
    assert example.turns == ({"role": "user", "content": "q"},)


USER = {"role": "user", "content": "q"}
BAD_MESSAGES = [
    ([], r"messages = \[\]: must be a list of turns"),
    ("q", r"messages = 'q': must be a list of turns"),
    ([{"role": "user"}], r"messages\[0\] = .*: must be {role, content}"),
    ([{"role": "human", "content": "q"}], r"messages\[0\]\.role = 'human': must be one of system, user"),
    ([USER, {"role": "assistant", "content": "a"}], r"messages end with a turn of 'assistant'"),
    ([{"role": "user", "content": " "}], r"messages: the last turn is empty"),
    ([{"role": "user", "content": 3}], r"messages\[0\]\.content = 3: must be text or a list of parts"),
    (
        [{"role": "user", "content": [{"type": "audio"}]}],
        r"messages\[0\]\.content: part .* must be of type text, image or video",
    ),
    ([{"role": "user", "content": [{"type": "image"}]}], r"the prompt has 1 <image> markers, 'images' has 0 files"),
    (
        [{"role": "user", "content": [{"type": "image", "image": "https://x.org/a.png"}]}],
        r"messages\[0\]\.content: image = 'https://x\.org/a\.png': must be a path: URLs are not fetched",
    ),
    ([{"role": "user", "content": [{"type": "image", "image": "gone.png"}]}], r"images: .*gone\.png does not exist"),
]


@pytest.mark.parametrize(("messages", "message"), BAD_MESSAGES)
def test_bad_conversations(messages: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"d\.jsonl:1: {message}"):
        first(tmp_path, {"messages": messages, "answer": "1"})


# Mapped columns


def test_mapped_columns(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("x")
    row = {"q": "Why?", "truth": {"value": 4}, "a.b": "six", "image": "a.png", "answer": "not this", "other": [1]}
    row["uid"] = "u1"
    file = write(tmp_path / "d.jsonl", row, row | {"uid": "u2"})
    columns = {"prompt": "q", "answer": "truth.value", "uid": "uid", "images": "image", "metadata": "truth"}
    example = load_examples(jsonl(file, eval_size=1, columns=columns), "train")[0]
    assert (example.prompt, example.answer, example.uid) == ("Why?", "4", "u1")
    assert example.images == (tmp_path / "a.png",)  # one value instead of a list
    assert example.metadata == {"value": 4}
    dotted = load_examples(jsonl(file, eval_size=1, columns={"prompt": "q", "answer": "a.b"}), "train")[0]
    assert dotted.answer == "six"
    assert dotted.images == ()


def test_mapped_columns_that_are_missing(tmp_path: Path) -> None:
    row = {"q": "Why?", "truth": {"value": 4}}
    with pytest.raises(UserError, match=r"d\.jsonl:1: field 'answer' \(column 'truth\.valeu'\) is missing"):
        mapped(tmp_path, row, prompt="q", answer="truth.valeu")
    with pytest.raises(UserError, match=r"d\.jsonl:1: field 'answer' \(name its column in 'columns'\) is missing"):
        mapped(tmp_path, row, prompt="q")
    with pytest.raises(UserError, match=r"columns\.images: no row has 'picture'"):
        mapped(tmp_path, row, prompt="q", answer="truth.value", images="picture")
    with pytest.raises(UserError, match=r"prompt is a list of turns: map that column to 'messages'"):
        mapped(tmp_path, {"p": [USER], "a": 1}, prompt="p", answer="a")
    with pytest.raises(UserError, match=r"'prompt' and 'messages' exclude each other"):
        mapped(tmp_path, {"p": "q", "m": [USER], "a": 1}, prompt="p", messages="m", answer="a")


@pytest.mark.parametrize(
    ("rates", "kept"),
    [
        ([0.0, 0.25, 0.5, 1.0], [1, 2]),
        (["0/8", "2/8", "4/8", "8/8"], [1, 2]),
        ([0, "1/3", 0.1, 1], [1, 2]),
    ],
)
def test_pass_rate(rates: list[Any], kept: list[int], tmp_path: Path) -> None:
    data = [{"prompt": f"q{i}", "answer": i, "pass_rate": rate} for i, rate in enumerate(rates)]
    config = jsonl(
        write(tmp_path / "d.jsonl", *data), eval_path=write(tmp_path / "e.jsonl", *data), pass_rate=(0.1, 0.5)
    )
    examples = load_examples(config, "train")
    assert [example.answer for example in examples] == [str(i) for i in kept]
    assert examples.num_filtered == 2  # type: ignore[attr-defined]


def test_bad_pass_rates(tmp_path: Path) -> None:
    for value, message in {
        None: "'pass_rate' is missing",
        "often": r"= 'often': must be a number from 0 to 1",
        2: "= 2: must",
    }.items():
        with pytest.raises(UserError, match=rf"d\.jsonl:1: (field )?.*{message}"):
            first(tmp_path, GOOD | {"pass_rate": value}, pass_rate=(0, 1))
    data = [row | {"pass_rate": 1} for row in rows(3)]
    with pytest.raises(UserError, match=r"no row of .*d\.jsonl is left of 3: 3 are outside of pass_rate"):
        load_examples(jsonl(write(tmp_path / "d.jsonl", *data), pass_rate=(0, 0.5)), "train")


# Errors

BAD_ROWS = [
    ("{oops", r"not JSON: "),
    ('{"prompt": "q", "answer": NaN}', r"not JSON: NaN is no JSON number"),
    ("[1]", r"a row must be a JSON object, it is list"),
    ({"prompt": "q"}, r"field 'answer' is missing"),
    ({"prompt": "q", "answer": None}, r"field 'answer' is missing"),
    ({"answer": "1"}, r"field 'prompt' is missing"),
    ({"prompt": "q", "anwser": "1"}, r"unknown field 'anwser' \(did you mean 'answer'\?\)"),
    ({**GOOD, "zzzz": 1}, r"unknown field 'zzzz' \(known: answer, fps, .*'metadata', other names"),
    ({**GOOD, "prompt": "  "}, r"prompt = '  ': must be text that is not empty"),
    ({**GOOD, "prompt": 3}, r"prompt = 3: must be text"),
    ({**GOOD, "answer": True}, r"answer = True: must be text or a number"),
    ({**GOOD, "answer": ""}, r"answer = '': must be text or a number"),
    ({**GOOD, "answer": " "}, r"answer = ' ': must not be blank"),
    ({**GOOD, "answer": "<answer> </answer>"}, r"must not be blank"),
    ({**GOOD, "answer": ["1"]}, r"answer = \['1'\]: must be text or a number; a list may hold numbers alone"),
    ({**GOOD, "answer": []}, r"answer = \[\]: must be text or a number"),
    ('{"prompt": "q", "answer": 1e999}', r"answer = inf: must be a finite number"),
    ({**GOOD, "fps": 0}, r"fps = 0: must be a number above 0"),
    ({**GOOD, "fps": "2"}, r"fps = '2': must be a number"),
    ({**GOOD, "metadata": 1}, r"metadata = 1: must be a mapping"),
    ({**GOOD, "uid": ""}, r"uid = '': must be text or a whole number"),
    ({**GOOD, "verifier": "exakt"}, r"verifier: unknown verifier 'exakt' \(did you mean 'exact'\?\)"),
    ({**GOOD, "verifier": 1}, r"verifier = 1: must be a name"),
    ({**GOOD, "verifier": "reasoning_gym"}, r"needs metadata\.reasoning_gym with 'task' and 'entry'"),
    ({**GOOD, "verifier": "iou_box", "answer": "left"}, r"verifier: .*'left'"),
    ({**GOOD, "images": "a.png"}, r"images = 'a.png': must be a list of paths"),
    ({**GOOD, "images": [""]}, r"images = \[''\]: must be a list of paths"),
    ({**GOOD, "images": ["a\0.png"]}, r"images = .*: must be a list of paths"),
    ({**GOOD, "images": ["https://x.org/a.png"]}, r"images = .*: must be a list of paths: URLs are not fetched"),
    ({**GOOD, "images": ["gone.png"]}, r"images: .*gone\.png does not exist"),
    ({**GOOD, "prompt": "<image><image>?", "images": ["ok.png"]}, r"2 <image> markers, 'images' has 1 files"),
    ({**GOOD, "prompt": "<video>?"}, r"1 <video> markers, 'videos' has 0 files"),
    ({**GOOD, "videos": ["gone.gif"]}, r"videos: .*gone\.gif does not exist"),
    ({**GOOD, "videos": ["empty"]}, r"empty holds no frames"),
    ({**GOOD, "videos": [["ok.png", "gone.png"]]}, r"videos: .*gone\.png does not exist"),
]


@pytest.fixture
def media(tmp_path: Path) -> Path:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)).save(tmp_path / "ok.png")
    (tmp_path / "empty").mkdir()
    return tmp_path


@pytest.mark.parametrize(("row", "message"), BAD_ROWS)
def test_bad_row_names_file_line_and_field(row: Any, message: str, media: Path) -> None:
    path = write(media / "data.jsonl", GOOD, row, GOOD)
    with pytest.raises(UserError, match=rf"data\.jsonl:2: .*{message}") as caught:
        load_examples(jsonl(path, eval_size=1), "train")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_uid_twice(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", {**GOOD, "uid": "a"}, {**GOOD, "uid": "b"}, {**GOOD, "uid": "a"}, GOOD)
    with pytest.raises(UserError, match=r"d\.jsonl:3: uid 'a' is already that of line 1"):
        load_examples(jsonl(path, eval_size=1), "train")
    path = write(tmp_path / "d.jsonl", {**GOOD, "uid": "d.jsonl:2"}, GOOD, GOOD)
    with pytest.raises(UserError, match=r"d\.jsonl:2: uid 'd\.jsonl:2' is already that of line 1"):
        load_examples(jsonl(path, eval_size=1), "train")


# on_error: skip


def many(num_good: int, num_bad: int) -> list[Any]:
    bad = ["{oops", {**GOOD, "images": ["gone.png"]}, {**GOOD, "uid": "q0"}]
    good = [{"prompt": f"q{i}", "answer": i, "uid": f"q{i}"} for i in range(num_good)]
    return [*good[:50], *[bad[i % 3] for i in range(num_bad)], *good[50:]]


def test_skipped_rows_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "d.jsonl", *many(297, 3))
    examples = load_examples(jsonl(path, eval_size=7, on_error="skip"), "train")
    held_out = load_examples(jsonl(path, eval_size=7, on_error="skip"), "eval")
    assert [e.prompt for e in [*examples, *held_out]] == [f"q{i}" for i in range(297)]
    assert len(examples.problems) == 3  # type: ignore[attr-defined]
    assert "3 of 300 rows left out, the first: " in caplog.text
    with pytest.raises(UserError, match=r"d\.jsonl:51: not JSON"):
        load_examples(jsonl(path, eval_size=7), "train")


def test_more_than_one_percent_of_bad_rows_stop(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", *many(296, 4))
    message = (
        r"d\.jsonl: 4 of 300 rows cannot be read, more than 1 %: .*d\.jsonl:51: not JSON.*; "
        r".*d\.jsonl:52: images: .*gone\.png does not exist; .*d\.jsonl:54: not JSON"
    )
    with pytest.raises(UserError, match=message):
        load_examples(jsonl(path, on_error="skip"), "train")


def test_a_row_is_read_again_when_asked_for(tmp_path: Path) -> None:
    """Nothing of a row stays in memory: what is changed in place in the file shows."""
    path = write(tmp_path / "d.jsonl", *rows(9))
    examples = load_examples(jsonl(path, eval_size=1), "train")
    with path.open("r+b") as file:
        file.seek(path.read_bytes().index(b"q3"))
        file.write(b"z3")
    assert [e.prompt for e in examples[2:5]] == ["q2", "z3", "q4"]
    assert json.dumps([e.prompt for e in examples]) == json.dumps([f"{'z' if i == 3 else 'q'}{i}" for i in range(8)])
