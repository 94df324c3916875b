"""Which prompts of a source are asked, and when they are read."""

from __future__ import annotations

from typing import Any

from copd_engine.evaluation.sources import Picked, first_units
from copd_engine.types import Example


def test_num_prompts_cuts_no_question_of_several_rows() -> None:
    rows = [("q1", "a"), ("q2", "a"), ("q1", "b"), ("q3", "a"), ("q2", "b"), ("q3", "b")]
    examples = [Example(f"{q}-{i}", "?", "1", "exact", metadata={"together": q}) for q, i in rows]
    assert [example.uid for example in first_units(examples, 2)] == ["q1-a", "q2-a", "q1-b", "q2-b"]
    assert list(first_units(examples, None)) == list(first_units(examples, 9)) == examples
    alone = [Example(str(i), "?", "1", "exact") for i in range(3)]
    assert [example.uid for example in first_units([*alone[:1], *examples, *alone[1:]], 2)] == ["0", "q1-a", "q1-b"]
    assert list(first_units(alone, 2)) == alone[:2]


def test_files_of_one_name_are_read_when_they_are_asked_for() -> None:
    asked: list[tuple[str, int]] = []

    class File(list[Example]):
        def __getitem__(self, index: Any) -> Any:
            example = super().__getitem__(index)
            asked.append((example.uid, index))
            return example

    examples = [Example(uid, "?", "1", "exact") for uid in "abc"]
    both = Picked([File(examples[:2]), File(examples[2:])])
    assert (len(both), asked) == (3, [])
    assert both[2].uid == "c"
    assert asked == [("c", 0)]
    assert [example.uid for example in both[1:]] == ["b", "c"]
    assert list(both) == examples
