"""Every benchmark's own columns become prompts, options, golds and media; answers as models give them are scored."""

from __future__ import annotations

from pathlib import Path

import pytest

from copd_engine.config import MediaConfig
from copd_engine.data.benchmarks import BENCHMARKS, read_benchmark
from copd_engine.media import open_image, open_video
from copd_engine.types import Clip
from copd_engine.verifiers import verify_all
from tests import benchmark_cases, benchmark_videos
from tests.benchmark_videos import mvbench

CASES = benchmark_cases.CASES | benchmark_videos.CASES


def test_every_benchmark_has_a_case():
    assert CASES.keys() == BENCHMARKS.keys()


@pytest.mark.parametrize("name", CASES)
def test_rows_become_examples_that_are_scored(name: str, tmp_path: Path):
    case = CASES[name]
    examples = read_benchmark(name, case.make(tmp_path))
    example = examples[0]
    assert example.prompt == case.prompt
    assert (example.answer, example.verifier, example.uid) == (case.answer, case.verifier, case.uid)
    assert example.metadata.get("choices") == case.choices
    assert example.metadata.get("group") == case.group
    assert (len(example.images), len(example.videos)) == (case.num_images, case.num_videos)
    for image in example.images:
        assert open_image(image, "image").size == (8, 8)
    for part in example.videos:
        assert len(open_video(part, example.fps, MediaConfig(), "video").frames) > 1
    assert verify_all([(response, example) for response in case.right]) == [1.0] * len(case.right)
    assert verify_all([(response, example) for response in case.wrong]) == [0.0] * len(case.wrong)
    assert verify_all([(response, examples[1]) for response in case.second]) == [1.0, 0.0]


@pytest.mark.parametrize("name", CASES)
def test_the_paper_s_domain(name: str):
    texts = {"aime_2024", "aime_2025", "hmmt_2025", "math_500", "minerva"}
    videos = {"video_holmes", "mvbench", "mmvu", "videomathqa", "videomathqa_mbin"}
    assert BENCHMARKS[name].domain == ("text" if name in texts else "video" if name in videos else "image")


def test_part_of_a_video(tmp_path: Path):
    first = read_benchmark("mvbench", mvbench(tmp_path))[0]
    (part,) = first.videos
    assert part == Clip(tmp_path / "video/star/Charades_v1_480/Z.mp4", 0.5, 1.5)
