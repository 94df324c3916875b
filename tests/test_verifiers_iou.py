"""Overlap of boxes and of time spans."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from copd_engine.types import Example, UserError
from copd_engine.verifiers import check_example, get_verifier


def score(verifier: str, response: str, answer: str, **metadata: Any) -> float:
    return get_verifier(verifier)(response, Example("row-1", "?", answer, verifier, metadata=metadata))


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("[0, 0, 10, 10]", 1.0),
        ("(0, 0, 10, 10)", 1.0),
        ("0 0 10 10", 1.0),
        ("(0,0),(10,10)", 1.0),
        ("[0.0, 0.0, 10.0, 1e1]", 1.0),
        (r"\boxed{[0, 0, 10, 10]}", 1.0),
        ("<answer>[0, 0, 10, 10]</answer>", 1.0),
        ("The answer is [0, 0, 10, 10].", 1.0),
        ('```json\n[{"bbox_2d": [0, 0, 10, 10], "label": "cat"}]\n```', 1.0),
        ("x1=0, y1=0, x2=10, y2=10", 1.0),
        ("<think>[5, 5, 6, 6]</think>[0, 0, 10, 10]", 1.0),
        ("Of the 3 cats, the left one: [0, 0, 10, 10]", 1.0),
        ("not [1, 1, 2, 2] but [0, 0, 10, 10]", 1.0),
        ("[0, 0, 10, 5]", 0.5),
        ("[5, 5, 15, 15]", 25 / 175),
        ("[-10, -10, 10, 10]", 100 / 400),
        ("[2, 2, 4, 4]", 0.04),
        ("[20, 20, 30, 30]", 0.0),
        ("[10, 0, 20, 10]", 0.0),
        ("[10, 10, 0, 0]", 0.0),
        ("[0, 0, 0, 10]", 0.0),
        ("[0, 0, 10]", 0.0),
        ("[0, 0, 10, 10, 20]", 0.0),
        ("[0, 0, 1e999, 10]", 0.0),
        ("[0, 0, 1e308, 1e308]", 0.0),
        ("[a, b, c, d]", 0.0),
        ("", 0.0),
        ("no idea", 0.0),
    ],
)
def test_box(response: str, expected: float) -> None:
    assert score("iou_box", response, "[0, 0, 10, 10]") == pytest.approx(expected, abs=1e-12)


def test_box_threshold() -> None:
    assert score("iou_box", "[0, 0, 10, 5]", "[0, 0, 10, 10]", iou_threshold=0.5) == 1.0
    assert score("iou_box", "[0, 0, 10, 4.9]", "[0, 0, 10, 10]", iou_threshold=0.5) == 0.0


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("[10, 20]", 1.0),
        ("10-20", 1.0),
        ("10 - 20 s", 1.0),
        ("10.0s to 20.0s", 1.0),
        ("from 10 to 20 seconds", 1.0),
        ("between 10 and 20 seconds", 1.0),
        ("00:10 to 00:20", 1.0),
        ("0:10 - 0:20", 1.0),
        ("00:00:10 to 00:00:20", 1.0),
        ("00:10.0\u201300:20.0", 1.0),
        ("<answer>[10, 20]</answer>", 1.0),
        (r"\boxed{10, 20}", 1.0),
        ("The answer is 10 to 20. It lasts 10 seconds.", 1.0),
        ("<think>3 to 4</think>10 to 20", 1.0),
        ("In shot 2 of 5 she waves from 10 to 20 seconds", 1.0),
        ('{"start": 10, "end": 20}', 1.0),
        ("10 to 15", 0.5),
        ("15 to 25", 5 / 15),
        ("0 to 40", 0.25),
        ("20 to 30", 0.0),
        ("30 to 40", 0.0),
        ("20 to 10", 0.0),
        ("10 to 10", 0.0),
        ("10", 0.0),
        ("never", 0.0),
        ("", 0.0),
    ],
)
def test_span(response: str, expected: float) -> None:
    assert score("iou_span", response, "[10, 20]") == pytest.approx(expected, abs=1e-12)


def test_span_in_minutes_and_hours() -> None:
    assert score("iou_span", "01:10 to 01:20", "[70, 80]") == 1.0
    assert score("iou_span", "1:01:10 to 1:01:20", "[3670, 3680]") == 1.0
    assert score("iou_span", "70 to 80", "01:10 - 01:20") == 1.0
    assert score("iou_span", "70 to 75", "01:10 - 01:20", iou_threshold=0.5) == 1.0
    assert score("iou_span", "70 to 74", "01:10 - 01:20", iou_threshold=0.5) == 0.0


@given(response=st.text() | st.text(alphabet="0123456789.,:e+-[]() to\\{}", max_size=80))
def test_never_raise_and_stay_in_range(response: str) -> None:
    assert 0.0 <= score("iou_box", response, "[0, 0, 10, 10]") <= 1.0
    assert 0.0 <= score("iou_span", response, "[10, 20]") <= 1.0


COORDINATES = st.floats(0, 1000).map(lambda x: round(x, 2))


@given(x=COORDINATES, y=COORDINATES, width=st.floats(0.1, 500), height=st.floats(0.1, 500), shift=st.floats(0.001, 1))
def test_the_gold_is_accepted_and_a_shifted_box_has_its_share(
    x: float, y: float, width: float, height: float, shift: float
) -> None:
    gold = f"[{x:.3f}, {y:.3f}, {x + width:.3f}, {y + height:.3f}]"
    check_example(Example("row-1", "?", gold, "iou_box"))
    assert score("iou_box", gold, gold) == 1.0
    moved = [x + shift * width, y, x + shift * width + width, y + height]
    assert score("iou_box", str(moved), str([x, y, x + width, y + height])) == pytest.approx(
        (1 - shift) / (1 + shift), abs=1e-6
    )
    span = f"[{x:.3f}, {x + width:.3f}]"
    check_example(Example("row-1", "?", span, "iou_span"))
    assert score("iou_span", f"<answer>{span}</answer>", span) == 1.0
    assert score("iou_span", str([x + shift * width, x + shift * width + width]), str([x, x + width])) == pytest.approx(
        (1 - shift) / (1 + shift), abs=1e-6
    )


@pytest.mark.parametrize(
    ("verifier", "answer", "metadata", "message"),
    [
        ("iou_box", "[1, 2, 3]", {}, r"row-1.*'iou_box': answer = '\[1, 2, 3\]': must be a box \[x1, y1, x2, y2\]"),
        ("iou_box", "[1, 2, 3, 4, 5]", {}, "must be a box"),
        ("iou_box", "[3, 3, 1, 1]", {}, "x1 < x2 and y1 < y2"),
        ("iou_box", "left", {}, "must be a box"),
        ("iou_box", "[0, 0, 1, 1]", {"iou_threshold": 1.5}, r"metadata\.iou_threshold = 1\.5: must be above 0"),
        ("iou_box", "[0, 0, 1, 1]", {"iou_threshold": 0}, "must be above 0"),
        ("iou_box", "[0, 0, 1, 1]", {"iou_threshold": "half"}, "must be above 0"),
        ("iou_span", "[1]", {}, r"'iou_span': answer = '\[1\]': must be a span \[start, end\]"),
        ("iou_span", "[5, 4]", {}, "start < end"),
        ("iou_span", "[1, 2]", {"iou_threshold": True}, "'iou_span': metadata.iou_threshold = True"),
    ],
)
def test_bad_rows(verifier: str, answer: str, metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_example(Example("row-1", "?", answer, verifier, metadata=metadata))
