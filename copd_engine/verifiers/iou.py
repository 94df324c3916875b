"""Intersection over union: boxes in an image, spans in a video."""

from __future__ import annotations

import math
import re

from copd_engine.types import Example, UserError
from copd_engine.verifiers.extract import Answer, ascii_signs, find_answer, first_sentence

#: Digits that belong to a name ("x1", "bbox_2d") are no coordinates.
_COORDINATE = r"(?:(?<![\w.)\]])-)?(?<![\w.])\d+(?:\.\d+)?(?:e[-+]?\d+)?"
_TIME = r"(?<![\w.:])(?:\d+:)?(?:\d+:\d+(?:\.\d+)?)(?![\w:])|(?<![\w.:])\d+(?:\.\d+)?(?![\d:])"
_BRACKETS = re.compile(r"[\[(][^\[\]()]*[\])]")
_PAIR = re.compile(rf"(?P<start>{_TIME})\s*(?:s|sec|secs|seconds)?\s*(?:-|,|to|and|until)\s*(?P<end>{_TIME})")


def iou_box(response: str, example: Example) -> float:
    """IoU of the answer's box ``x1, y1, x2, y2`` with the gold's, 0 to 1; 0 for an answer without a proper box.

    With ``metadata.iou_threshold`` in (0, 1] it is 1 from there on and else 0. The answer must be in the gold's
    coordinates: nothing is scaled. The box is the answer's four numbers, however written, or, where there are more, the
    last four in one pair of brackets.
    """
    gold, threshold = _gold_box(example), _threshold(example, "iou_box")
    box = _box(find_answer(response).text)
    return 0.0 if box is None else _score(_box_iou(box, gold), threshold)


def iou_span(response: str, example: Example) -> float:
    """IoU of the answer's time span with the gold's, as :func:`iou_box`.

    Times are seconds, ``mm:ss`` or ``hh:mm:ss``, each with decimals or without: "[3.5, 10]", "00:03 to 00:10", "from
    3 to 10 seconds". Of an unmarked response the last pair counts.
    """
    gold, threshold = _gold_span(example), _threshold(example, "iou_span")
    span = _span(find_answer(response))
    if span is None:
        return 0.0
    overlap = max(0.0, min(span[1], gold[1]) - max(span[0], gold[0]))
    return _score(overlap / ((span[1] - span[0]) + (gold[1] - gold[0]) - overlap), threshold)


def check_box(example: Example) -> None:
    """Raises UserError for a gold that is no box, or a threshold out of range."""
    _gold_box(example)
    _threshold(example, "iou_box")


def check_span(example: Example) -> None:
    """Raises UserError for a gold that is no span, or a threshold out of range."""
    _gold_span(example)
    _threshold(example, "iou_span")


def _box(text: str) -> tuple[float, ...] | None:
    values = _coordinates(text)
    if len(values) != 4:
        inside = [_coordinates(group) for group in _BRACKETS.findall(text)]
        values = next((group for group in reversed(inside) if len(group) == 4), [])
    return tuple(values) if len(values) == 4 and _is_box(values) else None


def _coordinates(text: str) -> list[float]:
    return [float(number) for number in re.findall(_COORDINATE, ascii_signs(text), re.IGNORECASE)]


def _is_box(values: list[float]) -> bool:
    x1, y1, x2, y2 = values
    return x1 < x2 and y1 < y2 and math.isfinite((x2 - x1) * (y2 - y1))


def _box_iou(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    both = width * height
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def _span(answer: Answer) -> tuple[float, float] | None:
    """Start and end in seconds."""
    text = ascii_signs(answer.text if answer.source == "whole" else first_sentence(answer.text))
    times = re.findall(_TIME, text)
    if len(times) != 2:
        pairs = [(match["start"], match["end"]) for match in _PAIR.finditer(text)]
        if not pairs:
            return None
        times = list(pairs[-1])
    start, end = (_seconds(time) for time in times)
    return (start, end) if start < end and math.isfinite(end) else None


def _seconds(time: str) -> float:
    total = 0.0
    for part in time.split(":"):
        total = total * 60.0 + float(part)
    return total


def _score(iou: float, threshold: float | None) -> float:
    iou = min(iou, 1.0)  # rounding
    return iou if threshold is None else float(iou >= threshold)


def _gold_box(example: Example) -> tuple[float, ...]:
    box = _box(example.answer) if len(_coordinates(example.answer)) == 4 else None
    if box is None:
        raise UserError(
            f"{example.name}: verifier 'iou_box': answer = {example.answer!r}: "
            "must be a box [x1, y1, x2, y2] with x1 < x2 and y1 < y2"
        )
    return box


def _gold_span(example: Example) -> tuple[float, float]:
    span = _span(Answer(example.answer, "tag")) if len(re.findall(_TIME, example.answer)) == 2 else None
    if span is None:
        raise UserError(
            f"{example.name}: verifier 'iou_span': answer = {example.answer!r}: "
            "must be a span [start, end] in seconds or mm:ss with start < end"
        )
    return span


def _threshold(example: Example, verifier: str) -> float | None:
    value = example.metadata.get("iou_threshold")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise UserError(
            f"{example.name}: verifier {verifier!r}: metadata.iou_threshold = {value!r}: must be above 0 and at most 1"
        )
    return float(value)
