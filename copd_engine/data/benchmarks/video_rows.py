"""Rows of the video benchmarks to questions, all of them multiple choice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from copd_engine.data.benchmarks.questions import Media, Question, Row, choice, options_of
from copd_engine.media import FRAME_SUFFIXES
from copd_engine.types import Clip, UserError

#: Where the videos of MVBench's tasks lie in its archive ``video``; the first folder there is counts. Those that end in
#: ``_segment`` hold the parts already cut.
MVBENCH_FOLDERS = {
    "object_interaction": ("star/Charades_v1_480", "star/Charades_segment"),
    "action_sequence": ("star/Charades_v1_480", "star/Charades_segment"),
    "action_prediction": ("star/Charades_v1_480", "star/Charades_segment"),
    "action_localization": ("sta/sta_video", "sta/sta_video_segment"),
    "moving_count": ("clevrer/video_validation",),
    "moving_attribute": ("clevrer/video_validation",),
    "moving_direction": ("clevrer/video_validation",),
    "counterfactual_inference": ("clevrer/video_validation",),
    "object_existence": ("clevrer/video_validation",),
    "fine_grained_pose": ("nturgbd", "nturgbd_convert"),
    "character_order": ("perception/videos",),
    "object_shuffle": ("perception/videos",),
    "state_change": ("perception/videos",),
    "action_count": ("perception/videos",),
    "egocentric_navigation": ("vlnqa",),
    "episodic_reasoning": ("tvqa/frames_fps3_hq", "tvqa/video_fps3_hq_segment"),
    "fine_grained_action": ("Moments_in_Time_Raw/videos",),
    "scene_transition": ("scene_qa/video",),
    "action_antonym": ("ssv2_video", "ssv2_video_mp4"),
    "unexpected_action": ("FunQA_test/test",),
}
#: Its tasks that ask about a part of the video, ``start`` to ``end``.
MVBENCH_BOUNDED = {
    "object_interaction",
    "action_sequence",
    "action_prediction",
    "action_localization",
    "episodic_reasoning",
}
#: Frames of a second of its videos that are folders of frames.
MVBENCH_FPS = 3.0
VIDEO_SUFFIXES = (".mp4", ".MP4", ".mkv", ".webm")


def video_holmes(row: Row, media: Media) -> Question:
    """Options are a mapping; the video is named by its id."""
    question = Question(
        str(row["Question"]), "", options=options_of(row["Options"]), videos=_by_id(row["video ID"], media)
    )
    return choice(question, row["Answer"])


def mmvu(row: Row, media: Media) -> Question | None:
    """The multiple-choice part; open questions are left out. The video is a path in the data set, or its address."""
    if row["question_type"] != "multiple-choice":
        return None
    video = media.find(str(row["video"]).rpartition("/resolve/main/")[2])
    return choice(
        Question(str(row["question"]), "", options=options_of(row["choices"]), videos=(video,)), row["answer"]
    )


def video_math_qa(row: Row, media: Media) -> Question:
    """Options carry their letters; two of them in the multi-binary form."""
    options = options_of(row["options"])
    return choice(
        Question(str(row["question"]), "", options=options, videos=_by_id(row["videoID"], media)), row["answer"]
    )


def mvbench(row: Row, media: Media) -> Question:
    """One JSON file a task, named after it; the gold is an option's text. ``start`` and ``end`` bound a part of the
    video in seconds; where it is a folder of frames, of its frames at 3 a second."""
    task = str(row.get("task_type") or media.file.stem).lower().replace(" ", "_").replace("-", "_")
    if task not in MVBENCH_FOLDERS:
        raise UserError(f"no task of MVBench is called {task!r}: keep the names of its JSON files")
    folders = [f"{top}{folder}" for folder in MVBENCH_FOLDERS[task] for top in ("video/", "")]
    path = media.find(*(f"{folder}/{row['video']}" for folder in folders), str(row["video"]))
    video: Any = path
    found_in = next((folder for folder in folders if path.as_posix().endswith(f"{folder}/{row['video']}")), "")
    if task in MVBENCH_BOUNDED and "_segment/" not in f"{found_in}/{row['video']}":
        start, end = float(row["start"]), float(row["end"])
        video = _frames(path, start, end) if path.is_dir() else Clip(path, start, end)
    options = options_of(row["candidates"])
    question = Question(str(row["question"]), "", options=options, videos=(video,), fps=MVBENCH_FPS, group=task)
    return choice(question, row["answer"], text_first=True)


def _frames(folder: Path, start: float, end: float) -> tuple[Path, ...]:
    """Frames ``start * 3`` to ``end * 3``, counted from 1 as their names are."""
    frames = sorted(file for file in folder.iterdir() if file.suffix.lower() in FRAME_SUFFIXES)
    first = max(1, round(start * MVBENCH_FPS))
    found = tuple(frames[first - 1 : round(end * MVBENCH_FPS)])
    if not found:
        raise UserError(f"video {folder} has no frames from {start:g} to {end:g} s at {MVBENCH_FPS:g} a second")
    return found


def _by_id(name: Any, media: Media) -> tuple[Path]:
    return (media.find(*(f"{name}{suffix}" for suffix in VIDEO_SUFFIXES)),)
