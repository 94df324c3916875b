"""Two rows or more of each text and image benchmark, what they become, and responses to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmark_files import dump_lines, mmmu_row, parquet, png

REASON = "\nPlease reason step by step, and put "
FREE_FORM = REASON + r"your final answer within \boxed{}."
LETTER = REASON + r"the letter of the correct option within \boxed{}."


@dataclass
class Case:
    """What the first row becomes, responses to it that are right and wrong, and one each to the second."""

    make: Callable[[Path], Path]
    prompt: str
    answer: str
    verifier: str
    uid: str
    right: tuple[str, ...]
    wrong: tuple[str, ...]
    second: tuple[str, str]
    num_images: int = 0
    num_videos: int = 0
    choices: dict[str, str] | None = None
    group: str | None = None
    together: str | None = None


CASES: dict[str, Case] = {}

CASES["mmmu"] = Case(
    lambda folder: parquet(
        folder / "Math/validation-00000-of-00001.parquet",
        [mmmu_row(1), mmmu_row(2, question_type="open", options="[]", question="How many? <image 1>", answer="3.14")],
    ),
    "What is <image>?\nOptions:\nA. a cat\nB. a dog's tail" + LETTER,
    "B",
    "multiple_choice",
    "validation_Math_1",
    (r"So it is \boxed{B}", "Answer: (B)", "The answer is B. a dog's tail"),
    (r"\boxed{A}", "Answer: (A)", "I do not know"),
    (r"\boxed{3.144}", r"\boxed{3.2}"),
    num_images=1,
    choices={"A": "a cat", "B": "a dog's tail"},
    group="Animals",
)
CASES["mmmu_pro"] = Case(
    lambda folder: parquet(
        folder / "standard (10 options)/test-00000-of-00002.parquet",
        [
            {
                "id": f"test_Art_{i}",
                "question": "Which? <image 1>",
                "options": str([f"text {j}" for j in range(10)]),
                **{f"image_{j}": png(i) if j == 1 else None for j in range(1, 8)},
                "answer": "J",
                "subject": "Art",
            }
            for i in range(2)
        ],
    ),
    "Which? <image>\nOptions:\n" + "\n".join(f"{'ABCDEFGHIJ'[j]}. text {j}" for j in range(10)) + LETTER,
    "J",
    "multiple_choice",
    "test_Art_0",
    (r"\boxed{J}", "Answer: text 9"),
    (r"\boxed{I}",),
    (r"\boxed{\text{J}}", r"\boxed{A}"),
    num_images=1,
    choices={"ABCDEFGHIJ"[j]: f"text {j}" for j in range(10)},
    group="Art",
)


def math_vista(folder: Path) -> Path:
    row = {
        "question": "How long is it?",
        "image": "images/1.jpg",
        "decoded_image": png(1),
        "unit": "cm",
        "precision": 1.0,
        "choices": None,
    }
    return parquet(
        folder / "testmini-00000-of-00001.parquet",
        [
            {**row, "pid": "1", "answer": "1.2", "question_type": "free_form", "answer_type": "float"},
            {
                **row,
                "pid": "2",
                "choices": ["B", "3"],
                "answer": "B",
                "question_type": "multi_choice",
                "answer_type": "text",
                "unit": None,
            },
            {**row, "pid": "3", "answer": "7", "question_type": "free_form", "answer_type": "integer", "unit": None},
            {**row, "pid": "4", "answer": "[0, 2]", "question_type": "free_form", "answer_type": "list", "unit": None},
        ],
    )


CASES["mathvista"] = Case(
    math_vista,
    "How long is it? (Unit: cm)\nThe answer is a number with 1 decimal place." + FREE_FORM,
    "1.2",
    "numeric",
    "1",
    (r"\boxed{1.2}", r"\boxed{1.24 \text{ cm}}", "The answer is 1.2 cm."),
    (r"\boxed{1.3}", r"\boxed{12}"),
    (r"\boxed{A}", r"\boxed{B}"),
    num_images=1,
    group="float",
)
CASES["mathvision"] = Case(
    lambda folder: parquet(
        folder / "test.parquet",
        [
            {
                "id": "1",
                "question": "Which of <image1> and <image2>?",
                "options": ["A", "B"],
                "image": "images/1.jpg",
                "decoded_image": png(1),
                "answer": "B",
                "level": 2,
                "subject": "algebra",
            },
            {
                "id": "2",
                "question": "How much?\n<image1>",
                "options": [],
                "image": "images/2.jpg",
                "decoded_image": png(2),
                "answer": r"\frac{1}{2}",
                "level": 2,
                "subject": "algebra",
            },
        ],
    ),
    "Which of <image> and image 2?\nOptions:\nA. A\nB. B" + LETTER,
    "B",
    "multiple_choice",
    "1",
    (r"\boxed{B}", "Answer: (B)"),
    (r"\boxed{A}",),
    (r"\boxed{0.5}", r"\boxed{2}"),
    num_images=1,
    choices={"A": "A", "B": "B"},
    group="algebra",
)
CASES["zerobench"] = Case(
    lambda folder: parquet(
        folder / "zerobench_subquestions-00000-of-00001.parquet",
        [
            {
                "question_id": "1_1",
                "question_text": "How many?",
                "question_images_decoded": [png(1), png(2)],
                "question_images": ["images/1.png", "images/2.png"],
                "question_answer": "11",
                "image_attribution": "Own",
            },
            {
                "question_id": "1_2",
                "question_text": "Which colour?",
                "question_images_decoded": [png(3)],
                "question_images": ["images/3.png"],
                "question_answer": "Dark Red",
                "image_attribution": "Own",
            },
        ],
    ),
    "How many?" + FREE_FORM,
    "11",
    "numeric",
    "1_1",
    (r"\boxed{11}", "Final answer: 11"),
    (r"\boxed{12}",),
    (r"\boxed{dark red}", r"\boxed{red}"),
    num_images=2,
)
CASES["wemath"] = Case(
    lambda folder: parquet(
        folder / "testmini.parquet",
        [
            {
                "ID": "3steps_165",
                "split": "testmini",
                "knowledge concept": "Circles",
                "question": "What is the area?",
                "option": "A. 200.96;B. 3215.36;C. 6280;D. 32; E. No correct answer",
                "answer": "B",
                "image_path": png(1),
                "key": key,
                "question number": 1,
                "knowledge concept description": "",
            }
            for key in ("3steps_1", "3steps_multi")
        ],
    ),
    "What is the area?\nOptions:\nA. 200.96\nB. 3215.36\nC. 6280\nD. 32\nE. No correct answer" + LETTER,
    "B",
    "multiple_choice",
    "3steps_165/3steps_1",
    (r"\boxed{B}", "Answer: B. 3215.36"),
    (r"\boxed{E}",),
    ("Answer: (B)", "Answer: (A)"),
    num_images=1,
    choices={"A": "200.96", "B": "3215.36", "C": "6280", "D": "32", "E": "No correct answer"},
    group="3steps_1",
)


def math_verse(folder: Path) -> Path:
    def row(number: int, version: str, question: str, image: Any, answer: str, kind: str) -> dict[str, Any]:
        return {
            "sample_index": str(number),
            "problem_index": "1",
            "problem_version": version,
            "question": question,
            "image": image,
            "answer": answer,
            "question_type": kind,
            "query_wo": "",
            "query_cot": "",
            "question_for_eval": "Find angle 1.\nChoices:\nA:30°\nB:60°",
        }

    return parquet(
        folder / "testmini.parquet",
        [
            row(1, "Text Dominant", "Find angle 1.\nChoices:\nA:30°\nB:60°", png(1), "B", "multi-choice"),
            row(2, "Vision Only", "", png(2), "A", "multi-choice"),
            row(3, "Text Lite", "Find x.", png(3), r"2\sqrt{3}", "free-form"),
        ],
    )


CASES["mathverse"] = Case(
    math_verse,
    "Find angle 1.\nChoices:\nA:30°\nB:60°" + LETTER,
    "B",
    "multiple_choice",
    "1",
    (r"\boxed{B}", "Answer: (B)", r"\boxed{60°}"),
    (r"\boxed{A}",),
    (r"\boxed{A}", r"\boxed{60°}"),
    num_images=1,
    choices={"A": "30°", "B": "60°"},
    group="Text Dominant",
)


def problems(folder: Path, **names: str) -> Path:
    problem, answer = names.get("problem", "problem"), names.get("answer", "answer")
    own = {"id": "id"} if "id" not in names else {"id": names["id"]}
    rows = [{problem: "What?", answer: "073", own["id"]: "60"}, {problem: "Why?", answer: "204", own["id"]: "61"}]
    return parquet(folder / "train-00000-of-00001.parquet", rows)


AIME: dict[str, Any] = {
    "prompt": "What?" + FREE_FORM,
    "answer": "73",
    "verifier": "math",
    "uid": "60",
    "right": (r"\boxed{73}", "The answer is 73."),
    "wrong": (r"\boxed{74}", r"\boxed{70 + 3}"),
    "second": (r"\boxed{204}", r"\boxed{73}"),
}
CASES["aime_2024"] = Case(lambda folder: problems(folder), **AIME)
CASES["aime_2025"] = Case(lambda folder: problems(folder, id="problem_idx"), **AIME)
CASES["hmmt_2025"] = Case(
    lambda folder: parquet(
        folder / "train-00000-of-00001.parquet",
        [
            {"problem_idx": 1, "problem": "What?", "answer": r"1-\frac{2}{\pi}", "problem_type": ["Algebra"]},
            {"problem_idx": 2, "problem": "Why?", "answer": "103", "problem_type": ["Geometry"]},
        ],
    ),
    "What?" + FREE_FORM,
    r"1-\frac{2}{\pi}",
    "math",
    "1",
    (r"\boxed{1 - \frac{2}{\pi}}", r"\boxed{\frac{\pi - 2}{\pi}}"),
    (r"\boxed{\frac{2}{\pi}}",),
    (r"\boxed{103}", r"\boxed{13}"),
)
CASES["math_500"] = Case(
    lambda folder: dump_lines(
        folder / "test.jsonl",
        [
            {
                "problem": "Convert.",
                "solution": "so",
                "answer": r"\left( 3, \frac{\pi}{2} \right)",
                "subject": "Precalculus",
                "level": 2,
                "unique_id": "test/precalculus/807.json",
            },
            {
                "problem": "What?",
                "solution": "so",
                "answer": "p - q",
                "subject": "Algebra",
                "level": 1,
                "unique_id": "x",
            },
        ],
    ),
    "Convert." + FREE_FORM,
    r"\left( 3, \frac{\pi}{2} \right)",
    "math",
    "test/precalculus/807.json",
    (r"\boxed{(3, \frac{\pi}{2})}",),
    (r"\boxed{(3, \pi)}",),
    (r"\boxed{p-q}", r"\boxed{q-p}"),
    group="Precalculus",
)
CASES["minerva"] = Case(
    lambda folder: dump_lines(
        folder / "test.jsonl", [{"question": "Speed?", "answer": "4.5e33"}, {"question": "Mass?", "answer": "2.7778"}]
    ),
    "Speed?" + FREE_FORM,
    "4.5e33",
    "math",
    "test.jsonl:1",
    (r"\boxed{4.5 \times 10^{33}}",),
    (r"\boxed{4.5}",),
    (r"\boxed{2.7778}", r"\boxed{2.8}"),
)
