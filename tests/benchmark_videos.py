"""The same as in ``benchmark_cases`` of the video benchmarks."""

from __future__ import annotations

from pathlib import Path

from tests.benchmark_cases import LETTER, Case
from tests.benchmark_files import dump, parquet, video

CASES: dict[str, Case] = {}


def video_holmes(folder: Path) -> Path:
    video(folder / "videos/abc.mp4")
    row = {
        "video ID": "abc",
        "Question Type": "SR",
        "Question": "Who?",
        "Options": {letter: f"person {letter}" for letter in "ABCDEF"},
        "Answer": "F",
        "Explanation": "",
    }
    return dump(folder / "test_Video-Holmes.json", [{**row, "Question ID": 1}, {**row, "Question ID": 2}])


CASES["video_holmes"] = Case(
    video_holmes,
    "Who?\nOptions:\n" + "\n".join(f"{letter}. person {letter}" for letter in "ABCDEF") + LETTER,
    "F",
    "multiple_choice",
    "abc/1",
    (r"\boxed{F}", "<think>A or B</think> <answer>F</answer>"),
    (r"\boxed{E}",),
    ("Answer: (F)", "Answer: (A)"),
    num_videos=1,
    choices={letter: f"person {letter}" for letter in "ABCDEF"},
    group="SR",
)


def mvbench(folder: Path) -> Path:
    video(folder / "video/star/Charades_v1_480/Z.mp4")
    row = {"video": "Z.mp4", "question": "What next?", "candidates": ["the door.", "the bag."], "answer": "the bag."}
    rows = [{**row, "start": 0.5, "end": 1.5}, {**row, "start": 0.0, "end": 1.0, "answer": "the door."}]
    return dump(folder / "json/action_sequence.json", rows)


CASES["mvbench"] = Case(
    mvbench,
    "What next?\nOptions:\nA. the door.\nB. the bag." + LETTER,
    "B",
    "multiple_choice",
    "action_sequence.json:1",
    (r"\boxed{B}", "Answer: (B) the bag."),
    (r"\boxed{A}",),
    (r"\boxed{A}", r"\boxed{B}"),
    num_videos=1,
    choices={"A": "the door.", "B": "the bag."},
    group="action_sequence",
)


def mmvu(folder: Path) -> Path:
    video(folder / "videos/Art/0.mp4")
    row = {"question": "Which style?", "answer": "C", "question_type": "multiple-choice"}
    choices = {"A": "one", "B": "two", "C": "three", "D": "four", "E": "five"}
    address = "https://huggingface.co/datasets/yale-nlp/MMVU/resolve/main/videos/Art/0.mp4"
    return dump(
        folder / "validation.json",
        [
            {**row, "id": "validation_Art_0", "video": address, "choices": choices},
            {**row, "id": "validation_Art_1", "video": address, "choices": None, "question_type": "open-ended"},
            {**row, "id": "validation_Art_2", "video": "videos/Art/0.mp4", "choices": choices, "answer": "E"},
        ],
    )


CASES["mmvu"] = Case(
    mmvu,
    "Which style?\nOptions:\nA. one\nB. two\nC. three\nD. four\nE. five" + LETTER,
    "C",
    "multiple_choice",
    "validation_Art_0",
    (r"\boxed{C}", "Therefore, the final answer is: C"),
    (r"\boxed{D}",),
    (r"\boxed{E}", r"\boxed{C}"),
    num_videos=1,
    choices={"A": "one", "B": "two", "C": "three", "D": "four", "E": "five"},
)


def video_math_qa(folder: Path) -> Path:
    video(folder / "videos/v1.mp4")
    row = {"videoID": "v1", "category": "Chart", "question": "How many?", "steps": "", "length": "short"}
    return parquet(
        folder / "mcq/test-00000-of-00001.parquet",
        [
            {**row, "question_id": 1, "options": [f"{letter}. {i}" for i, letter in enumerate("ABCDE")], "answer": "D"},
            {**row, "question_id": 2, "options": ["A. 2.5", "B. 25"], "answer": "A"},
        ],
    )


CASES["videomathqa"] = Case(
    video_math_qa,
    "How many?\nOptions:\nA. 0\nB. 1\nC. 2\nD. 3\nE. 4" + LETTER,
    "D",
    "multiple_choice",
    "1",
    (r"\boxed{D}", r"\boxed{3}"),
    (r"\boxed{A}",),
    (r"\boxed{A}", r"\boxed{B}"),
    num_videos=1,
    choices={"A": "0", "B": "1", "C": "2", "D": "3", "E": "4"},
    group="Chart",
)


def video_math_qa_pairs(folder: Path) -> Path:
    """Question 1 as two pairs, its answer beside another option each; question 2 as one."""
    video(folder / "videos/v1.mp4")
    row = {"videoID": "v1", "category": "Chart", "question": "How many?", "steps": "", "length": "short"}
    return parquet(
        folder / "multi_binary/test-00000-of-00001.parquet",
        [
            {**row, "question_id": 1, "options": ["A. 3", "B. 4"], "answer": "A"},
            {**row, "question_id": 1, "options": ["A. 5", "B. 3"], "answer": "B"},
            {**row, "question_id": 2, "options": ["A. 2.5", "B. 25"], "answer": "A"},
        ],
    )


CASES["videomathqa_mbin"] = Case(
    video_math_qa_pairs,
    "How many?\nOptions:\nA. 3\nB. 4" + LETTER,
    "A",
    "multiple_choice",
    "test-00000-of-00001.parquet:1",
    (r"\boxed{A}", r"\boxed{3}"),
    (r"\boxed{B}",),
    (r"\boxed{B}", r"\boxed{A}"),
    num_videos=1,
    choices={"A": "3", "B": "4"},
    group="Chart",
    together="1",
)
