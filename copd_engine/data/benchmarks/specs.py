"""The table of benchmarks: domain, columns, how rows are named and grouped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from copd_engine.data.benchmarks import image_rows, video_rows
from copd_engine.data.benchmarks.questions import Media, Question, Row

Domain = Literal["text", "image", "video"]


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """``columns``: those a file must have, each with other names it goes by; rows are given to ``read`` under the first
    one. ``read`` returns None for rows that are no part of the benchmark. ``uid``: columns whose values name a row;
    without any it is the row's number. ``group``: a column by which accuracy is shown too, and by which
    ``name:group`` selects rows. ``together``: a column whose rows count as one, right where all are right.
    ``media``: folders, beside the data file, in which files may lie. ``split``: what the names of its files contain,
    where those of another split lie beside them. ``several_files``: a file for each task or subject. ``boxed_in``: the
    column whose last ``\\boxed{}`` is the gold of rows without ``answer``."""

    title: str
    domain: Domain
    columns: Mapping[str, tuple[str, ...]]
    read: Callable[[Row, Media], Question | None]
    uid: tuple[str, ...] = ()
    group: str | None = None
    together: str | None = None
    media: tuple[str, ...] = ()
    optional: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    split: str | None = None
    several_files: bool = False
    boxed_in: str | None = None


def _columns(*names: str) -> dict[str, tuple[str, ...]]:
    return dict.fromkeys(names, ())


def _mathematics(row: Row, _: Media) -> Question:
    return Question(str(row["problem"]), str(row["answer"]).strip())


def _integer(row: Row, _: Media) -> Question:
    """AIME's golds are written with leading zeros in places."""
    gold = str(row["answer"]).strip()
    return Question(str(row["problem"]), str(int(gold)) if gold.isdecimal() else gold)


def _text(
    title: str, read: Callable[[Row, Media], Question], uid: tuple[str, ...] = ("id",), group: str | None = None
) -> Benchmark:
    return Benchmark(
        title=title,
        domain="text",
        columns={"problem": ("Problem", "question"), "answer": ("Answer",)},
        read=read,
        uid=uid,
        optional={"id": ("ID", "problem_idx", "unique_id")},
        group=group,
        boxed_in="solution",
    )


_VIDEO_MATH_QA = _columns("videoID", "question_id", "question", "options", "answer")

BENCHMARKS: Mapping[str, Benchmark] = MappingProxyType(
    {
        "mmmu": Benchmark(
            title="MMMU",
            domain="image",
            columns=_columns("id", "question", "options", "answer", "question_type", "image_1"),
            read=image_rows.mmmu,
            uid=("id",),
            group="subfield",
            several_files=True,
        ),
        "mmmu_pro": Benchmark(
            title="MMMU-Pro",
            domain="image",
            columns=_columns("id", "options", "answer") | {"image": ("image_1",)},
            read=image_rows.mmmu_pro,
            uid=("id",),
            group="subject",
            several_files=True,
        ),
        "mathvista": Benchmark(
            title="MathVista",
            domain="image",
            columns=_columns("pid", "question", "choices", "answer", "question_type", "answer_type", "precision")
            | {"image": ("decoded_image",)},
            read=image_rows.math_vista,
            uid=("pid",),
            group="answer_type",
        ),
        "mathvision": Benchmark(
            title="MathVision",
            domain="image",
            columns=_columns("id", "question", "options", "answer") | {"image": ("decoded_image",)},
            read=image_rows.math_vision,
            uid=("id",),
            group="subject",
        ),
        "zerobench": Benchmark(
            title="ZeroBench(sub)",
            domain="image",
            columns=_columns("question_id", "question_text", "question_answer"),
            read=image_rows.zero_bench,
            uid=("question_id",),
            split="subquestions",
        ),
        "wemath": Benchmark(
            title="WeMath",
            domain="image",
            columns=_columns("ID", "key", "question", "option", "answer") | {"image_path": ("image",)},
            read=image_rows.we_math,
            uid=("ID", "key"),
            group="key",
        ),
        "mathverse": Benchmark(
            title="MathVerse",
            domain="image",
            columns=_columns("sample_index", "problem_version", "question", "image", "answer", "question_type"),
            read=image_rows.math_verse,
            uid=("sample_index",),
            group="problem_version",
            media=("images",),
        ),
        "aime_2025": _text("AIME 2025", _integer),
        "aime_2024": _text("AIME 2024", _integer),
        "hmmt_2025": _text("HMMT 2025", _mathematics),
        "math_500": _text("MATH-500", _mathematics, group="subject"),
        "minerva": _text("Minerva", _mathematics, uid=()),
        "video_holmes": Benchmark(
            title="Video-Holmes",
            domain="video",
            columns=_columns("video ID", "Question ID", "Question", "Options", "Answer"),
            read=video_rows.video_holmes,
            uid=("video ID", "Question ID"),
            group="Question Type",
            media=("videos", "videos_cropped"),
        ),
        "mvbench": Benchmark(
            title="MVBench",
            domain="video",
            columns=_columns("video", "question", "candidates", "answer"),
            read=video_rows.mvbench,
            several_files=True,
        ),
        "mmvu": Benchmark(
            title="MMVU(mc)",
            domain="video",
            columns=_columns("id", "question_type", "question", "choices", "answer") | {"video": ("video_path",)},
            read=video_rows.mmvu,
            uid=("id",),
        ),
        "videomathqa": Benchmark(
            title="VideoMathQA",
            domain="video",
            columns=_VIDEO_MATH_QA,
            read=video_rows.video_math_qa,
            uid=("question_id",),
            group="category",
            media=("videos",),
        ),
        "videomathqa_mbin": Benchmark(
            title="VideoMathQA(mbin)",
            domain="video",
            columns=_VIDEO_MATH_QA,
            read=video_rows.video_math_qa,
            together="question_id",
            group="category",
            media=("videos",),
        ),
    }
)
