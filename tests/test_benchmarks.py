"""Every benchmark's own columns become prompts, options, golds and media; answers as models give them are scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from copd_engine.config import MediaConfig, build_config
from copd_engine.data.benchmarks import BENCHMARKS, read_benchmark
from copd_engine.evaluation.results import collect
from copd_engine.evaluation.run import WITHOUT_CONFIG
from copd_engine.evaluation.sources import Source, open_sources
from copd_engine.media import open_image, open_video
from copd_engine.types import Clip
from copd_engine.verifiers import verify_all
from copd_engine.verifiers.vote import extracted_answer
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
    assert example.metadata.get("together") == case.together
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


def test_pairs_of_one_question_are_scored_together(tmp_path: Path):
    """Sample 0 is right in all pairs, sample 1 in none of question 1's first pair."""
    path = CASES["videomathqa_mbin"].make(tmp_path)

    def opened(num_prompts: int | None) -> Source:
        data = [f"videomathqa_mbin={path}"]
        return open_sources(data, build_config(WITHOUT_CONFIG), None, num_prompts)[0]  # type: ignore[arg-type]

    source = opened(None)
    assert [item.together for item in source.items] == ["1", "1", "2"]
    assert [item.together for item in opened(1).items] == ["1", "1"]
    prompts: list[tuple[str, list[dict[str, Any]]]] = []
    examples = read_benchmark("videomathqa_mbin", path)
    for item, example, letters in zip(source.items, examples, ("AB", "BB", "AA"), strict=True):
        records = [
            {
                "reward": verify_all([(letter, example)])[0],
                "answer": extracted_answer(letter, example),
                "finish_reason": "stop",
                "num_tokens": 1,
            }
            for letter in letters
        ]
        prompts.append((item.name, records))
    together = {item.name: str(item.together) for item in source.items}
    found = collect(source.name, source.title, source.domain, prompts, {}, together)
    assert found.units == ("1", "2")
    assert found.rewards_PG.tolist() == [[1, 0], [1, 1]]
    assert found.majority_P.tolist() == [0.5, 1]


def test_part_of_a_video(tmp_path: Path):
    first = read_benchmark("mvbench", mvbench(tmp_path))[0]
    (part,) = first.videos
    assert part == Clip(tmp_path / "video/star/Charades_v1_480/Z.mp4", 0.5, 1.5)
