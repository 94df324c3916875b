"""Options however they are stored, and what is odd in single benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from copd_engine.config import MediaConfig
from copd_engine.data.benchmarks.questions import labelled, options_of
from copd_engine.media import check_video, open_image, open_video
from copd_engine.types import Clip, Example, UserError
from copd_engine.verifiers import verify_all
from tests.benchmark_cases import math_verse, math_vista
from tests.benchmark_files import dump, error_of, mmmu_row, parquet, png, read, video
from tests.video_files import numbers


def values(example: Example) -> list[int]:
    return [open_image(image, "image").getpixel((0, 0))[0] for image in example.images]  # type: ignore[index]


# Options


@pytest.mark.parametrize(
    "value",
    [
        ["x", "y"],
        "['x', 'y']",
        "A. x; B. y",
        "A. x\nB. y",
        "(A) x\n(B) y",
        {"A": "x", "B": "y", "C": "", "D": None},
        ["A. x", "B. y"],
        ["A: x", "B: y"],
    ],
)
def test_options_however_they_are_stored(value: Any):
    assert options_of(value) == {"A": "x", "B": "y"}


@pytest.mark.parametrize("value", [None, "", [], "[]", {}, "no options in here"])
def test_no_options(value: Any):
    assert options_of(value) == {}


def test_options_that_only_look_labelled():
    assert options_of(["A. Einstein", "N. Bohr"]) == {"A": "A. Einstein", "B": "N. Bohr"}
    assert options_of(["B", "A"]) == {"A": "B", "B": "A"}
    assert labelled("Let A. be, then\nB. too") == ("Let A. be, then\nB. too", {})


@given(st.lists(st.text("xyz1 ", min_size=1).filter(str.strip), min_size=2, max_size=10))
def test_every_way_to_store_options_gives_the_same(texts: list[str]):
    expected = {"ABCDEFGHIJ"[i]: text.strip() for i, text in enumerate(texts)}
    assert options_of(texts) == options_of(str(texts)) == options_of(expected) == expected
    assert options_of("\n".join(f"{letter}. {text}" for letter, text in expected.items())) == expected


def test_more_options_than_letters(tmp_path: Path):
    path = parquet(tmp_path / "a.parquet", [mmmu_row(1, options=str([str(i) for i in range(11)]))])
    assert error_of("mmmu", path) == f"{path}:1: 11 options: at most 10 have letters"


# MMMU


def test_images_stand_where_they_are_first_named(tmp_path: Path):
    row = mmmu_row(
        1,
        question="<image 2> is left of <image 1>. Which is <image 2>?",
        options="['<image 3>', '<image 1>']",
        image_2=png(2),
        image_3=png(3),
        image_4=png(4),
    )
    (example,) = read("mmmu", parquet(tmp_path / "a.parquet", [row]))
    assert example.prompt.startswith(
        "<image><image> is left of <image>. Which is image 2?\nOptions:\nA. <image>\nB. image 1\n"
    )
    assert values(example) == [4, 2, 1, 3]  # one that is not named stands in front
    assert example.prompt.count("<image>") == len(example.images)


def test_open_questions_with_several_golds(tmp_path: Path):
    row = mmmu_row(1, question_type="open", options="[]", answer="['24/7', '3.429', 'two weeks']")
    (example,) = read("mmmu", parquet(tmp_path / "a.parquet", [row]))
    responses = [r"\boxed{24/7}", r"\boxed{3.43}", r"\boxed{Two weeks.}", r"\boxed{3.5}", "no idea"]
    assert verify_all([(response, example) for response in responses]) == [1.0, 1.0, 1.0, 0.0, 0.0]
    assert example.prompt == "What is <image>?\nPlease reason step by step, and put your final answer within \\boxed{}."


@pytest.mark.parametrize(
    ("gold", "right", "wrong"),
    [
        ("$6,000", r"\boxed{6000}", r"\boxed{600}"),
        ("no effect", r"\boxed{No effect}", r"\boxed{an effect}"),
        (r"-\sqrt{3}", r"\boxed{-3^{1/2}}", r"\boxed{\sqrt{3}}"),
        (r"$-\sqrt{3}$", r"\boxed{-\sqrt{3}}", r"\boxed{\sqrt{3}}"),
        ("(0, 1]", r"\boxed{(0,1]}", r"\boxed{[0, 1)}"),
        ("-2x + 1", r"\boxed{1 - 2x}", r"\boxed{2x + 1}"),
        (r"\text{No effect}", r"\boxed{no effect}", r"\boxed{effect}"),
        ("A+", r"\boxed{a+}", r"\boxed{A-}"),
        ("post-war (Berlin)", r"\boxed{Post-war, Berlin}", r"\boxed{war, Berlin}"),
        (r"\sqrt{3", r"The answer is \sqrt{3", r"\boxed{3}"),
        ("10-20", r"\boxed{10-20}", r"\boxed{-10}"),
        ("3-1", r"\boxed{3-1}", r"\boxed{2}"),
        ("2021-05-03", r"\boxed{2021-05-03}", r"\boxed{2013}"),
        ("12/25/2020", r"\boxed{12/25/2020}", r"\boxed{24/50/2020}"),
        ("3/4", r"\boxed{0.75}", r"\boxed{4/3}"),
        ("1.5/2", r"\boxed{0.75}", r"\boxed{4/3}"),
        ("x-1", r"\boxed{-1 + x}", r"\boxed{x}"),
        ("C", r"\boxed{(C)}", r"\boxed{B}"),
        ("C", "The answer is C. It is the largest.", r"\boxed{c d}"),
        ("[0, 1]", r"\boxed{[0,1]}", r"\boxed{0}"),
        ("[a b]", r"\boxed{[a b]}", r"\boxed{a}"),
        ("['C', 'carbon']", r"\boxed{(C)}", r"\boxed{H}"),
    ],
)
def test_open_questions(tmp_path: Path, gold: str, right: str, wrong: str):
    (example,) = read("mmmu", parquet(tmp_path / "a.parquet", [mmmu_row(1, question_type="open", answer=gold)]))
    assert verify_all([(right, example), (wrong, example)]) == [1.0, 0.0]


def test_vision_rows_of_mmmu_pro_show_no_options(tmp_path: Path):
    row = {"id": "test_Art_0", "image": png(9), "options": "['one', 'two']", "answer": "B", "subject": "Art"}
    (example,) = read("mmmu_pro", parquet(tmp_path / "vision.parquet", [row]))
    assert example.prompt.startswith("Answer the question in the image.\nPlease reason")
    assert (example.uid, values(example)) == ("vision/test_Art_0", [9])
    assert verify_all([(r"\boxed{B}", example), ("Answer: two", example), ("one", example)]) == [1.0, 1.0, 0.0]


# The others


def test_golds_of_mathvista(tmp_path: Path):
    _, choice, whole, several = read("mathvista", math_vista(tmp_path))
    assert choice.answer == "A"  # the option whose text is B, not the option that is called B
    assert whole.prompt.startswith("How long is it?\nThe answer is an integer.")
    assert verify_all([(r"\boxed{7}", whole), (r"\boxed{7.4}", whole)]) == [1.0, 0.0]
    assert verify_all([(r"\boxed{[0, 2]}", several), (r"\boxed{[2, 0]}", several)]) == [1.0, 0.0]


def test_mathvista_s_json_with_images_beside_it(tmp_path: Path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images/1.jpg")
    row = {"question": "?", "image": "images/1.jpg", "choices": None, "unit": None, "precision": None, "answer": "7"}
    row |= {"question_type": "free_form", "answer_type": "integer", "pid": "1"}
    (example,) = read("mathvista", dump(tmp_path / "annot_testmini.json", {"1": row}))
    assert example.images == (tmp_path / "images/1.jpg",)


def test_versions_of_mathverse(tmp_path: Path):
    path = math_verse(tmp_path)
    (vision,) = read("mathverse", path, "vision_only")
    assert vision.prompt.startswith("Answer the question in the image.\nPlease reason")
    assert vision.metadata["choices"] == {"A": "30°", "B": "60°"}
    assert read("mathverse", path, "Text Lite")[0].verifier == "math"
    assert error_of("mathverse", path, "visual_only").startswith(
        f"mathverse:visual_only: no row of {path} is in it (did you mean 'vision_only'?)"
    )


def test_text_only_of_mathverse_has_no_image(tmp_path: Path):
    row = {"sample_index": 1, "problem_version": "Text Only", "question": "What?", "image": " ", "answer": "3"}
    (example,) = read("mathverse", dump(tmp_path / "testmini_text_only.json", [row | {"question_type": "free-form"}]))
    assert example.images == ()


def test_images_of_mathverse_in_their_folder(tmp_path: Path):
    (tmp_path / "images/images_version_5").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "images/images_version_5/image_1.png")
    row = {"sample_index": 1, "problem_version": "Vision Only", "question": "", "answer": "3"}
    row |= {"image": "images_version_5/image_1.png", "question_type": "free-form"}
    (example,) = read("mathverse", dump(tmp_path / "testmini.json", [row]))
    assert example.images == (tmp_path / "images/images_version_5/image_1.png",)


def test_options_of_wemath_that_cannot_be_taken_apart(tmp_path: Path):
    row = {"ID": "2steps_1", "key": "2steps_1", "question": "?", "option": "one or two", "answer": "B"}
    (example,) = read("wemath", parquet(tmp_path / "a.parquet", [row | {"image_path": png(1)}]))
    assert example.prompt.startswith("?\none or two\nPlease reason")
    assert verify_all([(r"\boxed{B}", example), (r"\boxed{A}", example)]) == [1.0, 0.0]


# MVBench's videos


def mvbench(folder: Path, task: str, **row: Any) -> Path:
    fields = {"question": "?", "candidates": ["x", "y"], "answer": "y", **row}
    return dump(folder / f"json/{task}.json", [fields])


def test_bounds_in_a_folder_of_frames(tmp_path: Path):
    frames = tmp_path / "video/tvqa/frames_fps3_hq/clip"
    frames.mkdir(parents=True)
    for number in range(1, 13):
        Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(frames / f"{number:05d}.png")
    path = mvbench(tmp_path, "episodic_reasoning", video="clip", start=1.0, end=3.0)
    (example,) = read("mvbench", path)
    (shown,) = example.videos
    frames_seen = open_video(shown, example.fps, MediaConfig(), "video")
    assert frames_seen.frames[:, 0, 0, 0].tolist() == [3, 4, 5, 6, 7, 8, 9]
    assert frames_seen.times[1] == pytest.approx(1 / 3)
    assert "has no frames from 9 to 10 s" in error_of(
        "mvbench", mvbench(tmp_path / "b", "episodic_reasoning", video=str(frames), start=9, end=10)
    )


def test_parts_that_are_cut_already_are_not_cut_again(tmp_path: Path):
    cut = video(tmp_path / "video/star/Charades_segment/Z.mp4")
    path = mvbench(tmp_path, "action_prediction", video="Z.mp4", start=10.0, end=20.0)
    assert read("mvbench", path)[0].videos == (cut,)


def test_only_the_video_s_own_folder_says_that_it_is_cut(tmp_path: Path):
    root = tmp_path / "my_segment"
    whole = video(root / "video/star/Charades_v1_480/Z.mp4")
    path = mvbench(root, "action_prediction", video="Z.mp4", start=0.5, end=1.5)
    assert read("mvbench", path)[0].videos == (Clip(whole, 0.5, 1.5),)


def test_tasks_without_bounds_take_the_whole_video(tmp_path: Path):
    whole = video(tmp_path / "perception/videos/v.mp4")
    path = mvbench(tmp_path, "state_change", video="v.mp4", start=0.1, end=0.2)
    assert read("mvbench", path)[0].videos == (whole,)
    assert read("mvbench", path)[0].metadata["group"] == "state_change"


def test_mvbench_as_one_tsv(tmp_path: Path):
    """As VLMEvalKit writes it: the task in a column, options as Python text."""
    video(tmp_path / "video/star/Charades_v1_480/Z.mp4")
    lines = [
        "task_type\tprefix\tdata_type\tbound\tstart\tend\tvideo\tquestion\tanswer\tcandidates\tindex",
        "Action Sequence\tvideo/star\tvideo\tTrue\t0.5\t1.0\tZ.mp4\tWhat?\ty\t\"['x', 'y']\"\t0",
    ]
    (tmp_path / "MVBench.tsv").write_text("\n".join(lines))
    (example,) = read("mvbench", tmp_path / "MVBench.tsv")
    assert example.videos == (Clip(tmp_path / "video/star/Charades_v1_480/Z.mp4", 0.5, 1.0),)
    assert (example.answer, example.metadata["group"]) == ("B", "action_sequence")


def test_frames_of_a_part(tmp_path: Path):
    """30 frames a second, frame i of brightness 4 i; at 10 a second from 0.5 to 1.0 s: 15, 18, ..., 27."""
    path = video(tmp_path / "v.mp4")
    media = MediaConfig(video_fps=10.0)
    part = open_video(Clip(path, 0.5, 1.0), 2.0, media, "video")
    assert numbers(part.frames) == [15, 18, 21, 24, 27]
    assert part.times == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    whole = open_video(Clip(path, 0.0, 99.0), 2.0, media, "video")
    assert numbers(whole.frames) == numbers(open_video(path, 2.0, media, "video").frames)
    for start, end in ((1.0, 1.0), (5.0, 6.0)):
        with pytest.raises(UserError, match=rf"v.mp4: no part from {start:g} to {end:g} s in a video of 2.0 s"):
            open_video(Clip(path, start, end), 2.0, media, "video")
    with pytest.raises(UserError, match=r"no\.mp4 does not exist"):
        check_video(Clip(tmp_path / "no.mp4", 0.0, 1.0), "row")
