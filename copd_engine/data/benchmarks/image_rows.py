"""Rows of the image benchmarks to questions."""

from __future__ import annotations

import ast
import contextlib
from dataclasses import replace
from typing import Any

from copd_engine.data.benchmarks.questions import (
    Media,
    Question,
    Row,
    choice,
    free_gold,
    labelled,
    options_of,
    with_images,
)
from copd_engine.types import UserError
from copd_engine.verifiers.alternatives import ALTERNATIVES
from copd_engine.verifiers.choice import LETTERS

IN_THE_IMAGE = "Answer the question in the image."
#: MMMU's own evaluation rounds numbers to two decimals before it compares them.
MMMU_TOLERANCE = 0.005


def mmmu(row: Row, media: Media) -> Question:
    """Options are a list written as Python text; ``<image 1>`` of text and options is column ``image_1``. Open
    questions have one gold or a list of them; one that is a letter names what the image calls so."""
    question = _numbered(row, media)
    if row["question_type"] == "multiple-choice":
        return choice(question, row["answer"])
    question, golds = replace(question, options={}), _golds(str(row["answer"]).strip())
    ways = [_letter(question, x) if x in tuple(LETTERS) else free_gold(question, x, MMMU_TOLERANCE) for x in golds]
    if len(ways) == 1:
        return ways[0]
    listed = [{"answer": way.answer, "verifier": way.verifier} for way in ways]
    metadata = {"alternatives": listed, "abs_tol": MMMU_TOLERANCE}
    return replace(question, answer=" or ".join(golds), verifier=ALTERNATIVES, metadata=metadata)


def _golds(gold: str) -> list[str]:
    """The texts of a Python list of texts; else ``gold`` alone, which may be an interval."""
    if gold.startswith("[") and gold.endswith("]"):
        with contextlib.suppress(ValueError, SyntaxError):
            listed = ast.literal_eval(gold)
            if listed and all(isinstance(item, str) and item.strip() for item in listed):
                return [item.strip() for item in listed]
    return [gold]


def mmmu_pro(row: Row, media: Media) -> Question:
    """Standard rows are MMMU's with up to ten options; of vision rows the question and the options are in the image."""
    if "question" in row:
        return choice(_numbered(row, media), row["answer"])
    if row.get("image") is None:
        raise UserError("columns 'question' and 'image' are both empty")
    question = Question(IN_THE_IMAGE, "", options=options_of(row["options"]), shown=False, kind="vision")
    return choice(replace(question, images=(media.image(row["image"]),)), row["answer"])


def _numbered(row: Row, media: Media) -> Question:
    images = {number: row[f"image_{number}"] for number in range(1, 8) if row.get(f"image_{number}") is not None}
    return with_images(Question(str(row["question"]), "", options=options_of(row["options"])), images, media)


def math_vista(row: Row, media: Media) -> Question:
    """The gold of multiple choice is an option's text; a free gold is a whole number, a number of ``precision``
    decimals, or a list."""
    unit = f" (Unit: {row['unit']})" if row.get("unit") else ""
    image = row["decoded_image"] if row.get("decoded_image") is not None else row["image"]
    question = Question(f"{row['question']}{unit}", "", images=(media.image(image),))
    if row["question_type"] == "multi_choice":
        return choice(replace(question, options=options_of(row["choices"])), row["answer"], text_first=True)
    hint = {"integer": "The answer is an integer.", "list": "The answer is a list such as [1, 2]."}
    places = int(row.get("precision") or 0)
    hint["float"] = f"The answer is a number with {places} decimal place{'s' if places != 1 else ''}."
    question = replace(question, text=f"{question.text}\n{hint[row['answer_type']]}")
    if row["answer_type"] == "list":
        return free_gold(question, row["answer"])
    tolerance = 0.5 * 10.0**-places if row["answer_type"] == "float" else 0.0
    return free_gold(question, row["answer"], tolerance)


def math_vision(row: Row, media: Media) -> Question:
    """One image, even where the text speaks of several (``<image1>``); options may be the letters themselves."""
    image = row["decoded_image"] if row.get("decoded_image") is not None else row["image"]
    question = Question(str(row["question"]), str(row["answer"]), options=options_of(row["options"]))
    question = with_images(question, {1: image}, media)
    return choice(question, row["answer"]) if question.options else question


def zero_bench(row: Row, media: Media) -> Question:
    """Questions and sub-questions alike: any number of images, a number or a few words as gold."""
    images: Any = row.get("question_images_decoded") or row.get("question_images") or ()
    question = Question(str(row["question_text"]), "", images=tuple(media.image(image) for image in images))
    return free_gold(question, row["question_answer"])


def we_math(row: Row, media: Media) -> Question:
    """Options in one text, "A. 1; B. 2"; one that cannot be taken apart is shown as it is."""
    question = Question(str(row["question"]), "", options=options_of(str(row["option"])))
    question = replace(question, images=(media.image(row["image_path"]),))
    if not question.options:
        return _letter(replace(question, text=f"{question.text}\n{row['option']}"), row["answer"])
    return choice(question, row["answer"])


def math_verse(row: Row, media: Media) -> Question:
    """Options stand in the text ("Choices:", then "A:1"). Of "Vision Only" the text is in the image alone, and
    ``question_for_eval`` names the options; "Text Only" has no image."""
    text = str(row["question"]).strip()
    options = labelled(text)[1] or labelled(str(row.get("question_for_eval") or ""))[1]
    question = Question(text or IN_THE_IMAGE, str(row["answer"]), options=options, shown=False)
    image = row.get("image")
    if isinstance(image, str) and not image.strip():
        image = None
    if image is not None:
        question = replace(question, images=(media.image(image),))
    if row["question_type"] != "multi-choice":
        return replace(question, options={})
    return choice(question, row["answer"]) if options else _letter(question, row["answer"])


def _letter(question: Question, gold: Any) -> Question:
    """The gold is a letter, but nothing says what the letters stand for."""
    return replace(question, answer=str(gold).strip(), verifier="multiple_choice")
