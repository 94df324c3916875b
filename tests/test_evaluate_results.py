"""From samples to a table: the paper's averages, groups, prompts that count as one, differences, extracted answers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from copd_engine.evaluation.results import BenchmarkScores, averages, collect, differences, unpaired
from copd_engine.evaluation.scores import majority_score
from copd_engine.evaluation.table import markdown
from copd_engine.types import Example
from copd_engine.verifiers import verify_all
from copd_engine.verifiers.alternatives import ALTERNATIVES
from copd_engine.verifiers.vote import extracted_answer

IMAGE = ("mmmu", "mmmu_pro", "mathvista", "mathvision", "zerobench", "wemath", "mathverse")
TEXT = ("aime_2025", "aime_2024", "hmmt_2025", "math_500", "minerva")
VIDEO = ("video_holmes", "mvbench", "mmvu", "videomathqa")


def scores(name: str, domain: str, rewards_PG: Any, majority: float = 1.0) -> BenchmarkScores:
    rewards_PG = np.array(rewards_PG, np.float64)
    units = tuple(f"{name}-{i}" for i in range(len(rewards_PG)))
    majority_P = np.full(len(units), majority)
    return BenchmarkScores(name, name.upper(), domain, units, rewards_PG, majority_P, ("",) * len(units), 0.25, 1234.5)


def at(name: str, domain: str, percent: float) -> BenchmarkScores:
    return scores(name, domain, [[percent / 100]])


def paper(image: float, text: float, video: float | None = None) -> list[BenchmarkScores]:
    """Benchmarks that scatter around these means."""
    found = [at(name, "image", image + 3 - i) for i, name in enumerate(IMAGE)]
    found += [at(name, "text", text + 2 - i) for i, name in enumerate(TEXT)]
    return found if video is None else [*found, *(at(name, "video", video + 1.5 - i) for i, name in enumerate(VIDEO))]


@pytest.mark.parametrize(
    ("domains", "overall"),
    [
        ((54.00, 55.78), 54.74),
        ((56.97, 58.76), 57.71),
        ((54.00, 55.78, 56.22), 55.11),
        ((57.12, 58.63, 59.21), 58.12),
        ((56.17, 55.39, 59.62), 56.79),
    ],
)
def test_the_paper_s_averages(domains: tuple[float, ...], overall: float):
    """Overall is the mean over the 12 or 16 benchmarks, as the numbers of the paper's tables are to two decimals."""
    found = averages(paper(*domains), seed=0)
    assert [round(100 * x.value, 2) for x in found.values()] == [*domains, pytest.approx(overall, abs=0.011)]
    assert list(found) == [*("image", "text", "video")[: len(domains)], "overall"]
    assert abs(np.mean(domains) - overall) > 0.011


def record(reward: float, answer: str | None, reason: str = "stop") -> dict[str, Any]:
    return {"reward": reward, "answer": answer, "finish_reason": reason, "num_tokens": 10}


def test_collect_and_its_numbers():
    prompts = [
        ("a", [record(1, "7"), record(1, "7"), record(0, "8"), record(0, "9")]),
        ("b", [record(0, "1"), record(0, "1"), record(1, "2"), record(0, None, "length")]),
    ]
    found = collect("x", "X", "text", prompts, {"a": "easy", "b": "hard"}, {})
    numbers = found.to_dict(seed=0)
    assert numbers["mean"]["value"] == pytest.approx(3 / 8)
    assert {k: v["value"] for k, v in numbers["pass"].items()} == pytest.approx(
        {"1": 3 / 8, "2": (5 / 6 + 1 / 2) / 2, "4": 1.0}
    )
    assert numbers["maj"]["value"] == pytest.approx(0.5)
    assert numbers["groups"] == {
        "easy": {"mean": 0.5, "num_prompts": 1},
        "hard": {"mean": 0.25, "num_prompts": 1},
    }
    assert (numbers["truncated"], numbers["mean_num_tokens"], numbers["num_samples"]) == (1 / 8, 10, 4)
    assert numbers["verifier_failures"] == {}


def test_failures_of_verifiers_are_counted_and_shown():
    failed = {"verifier_failures": {"timeouts": 1, "out_of_memory": 0, "crashes": 0}}
    prompts = [("a", [record(0, "7") | failed, record(1, "8")]), ("b", [record(0, "1") | failed, record(0, "1")])]
    found = collect("x", "X", "text", prompts, {}, {})
    assert found.to_dict(seed=0)["verifier_failures"] == {"timeouts": 2, "out_of_memory": 0, "crashes": 0}
    table = markdown({"base": [found]}, seed=0)
    assert table.endswith("\n\nX: comparisons that ended without a result, scored 0: timeouts 2.")


def test_prompts_that_count_as_one_are_right_where_all_are():
    prompts = [
        ("q1-1", [record(1, "A"), record(1, "A"), record(1, "A")]),
        ("q1-2", [record(1, "A"), record(0, "B"), record(0, "B")]),
        ("q2-1", [record(1, "A"), record(1, "A"), record(0, "B")]),
    ]
    found = collect("x", "X", "video", prompts, {}, {"q1-1": "q1", "q1-2": "q1", "q2-1": "q2"})
    assert found.units == ("q1", "q2")
    assert found.rewards_PG.tolist() == [[1, 0, 0], [1, 1, 0]]
    assert found.majority_P.tolist() == [0, 1]


def test_differences_are_paired():
    a = [scores("mmmu", "image", [[0], [1], [0], [1]]), scores("minerva", "text", [[0], [0]])]
    b = [scores("mmmu", "image", [[1], [1], [0], [1]]), scores("minerva", "text", [[0], [0]])]
    found = differences(a, b, seed=0)
    assert {name: x.value for name, x in found.items()} == {"image": 0.25, "text": 0.0, "overall": 0.125}
    assert found["image"].low == 0.0  # never below: no prompt became worse
    assert found["text"] == (0.0, 0.0, 0.0)
    assert differences(a, b[::-1], seed=0) == found  # by name, in whatever order
    assert unpaired(a, b[::-1]) == []


def test_differences_of_what_both_were_asked():
    """A benchmark of one model alone and prompts of one model alone are left out, and named."""
    a = [scores("mmmu", "image", [[0], [1], [0], [1]]), scores("minerva", "text", [[0], [0]])]
    b = [scores("aime_2024", "text", [[1]]), scores("mmmu", "image", [[0], [1], [1]])]
    b[1] = replace(b[1], units=("mmmu-3", "mmmu-9", "mmmu-2"))
    found = differences(a, b, seed=0)
    assert {name: x.value for name, x in found.items()} == {"image": 0.0, "overall": 0.0}  # 3: 1 to 0, 2: 0 to 1
    assert (found["image"].low, found["image"].high) == (-1.0, 1.0)
    assert unpaired(a, b) == [("AIME_2024", 0, 1, 0), ("MMMU", 4, 3, 2), ("MINERVA", 2, 0, 0)]
    table = markdown({"base": a, "copd": b}, seed=0)
    assert cells(table, "minus base") == ["image", "overall"]
    assert table.endswith(
        "Left out of the differences of copd, not of the means above: AIME_2024 (copd alone has it); MMMU but for the "
        "2 prompts that both were asked (base: 4, copd: 3); MINERVA (base alone has it)."
    )
    assert differences(a[1:], b[1:], seed=0) == {}
    assert "| copd | - |" in markdown({"base": a[1:], "copd": b[1:]}, seed=0)


# The table


def cells(table: str, row: str) -> list[str]:
    line = next(line for line in table.splitlines() if line.startswith(f"| {row} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_table_in_the_layout_of_the_paper():
    base = paper(54.0, 55.78, 56.22)
    table = markdown({"base": base, "copd": paper(57.12, 58.63, 59.21)}, seed=0)
    head = cells(table, "model")
    assert head == [
        *map(str.upper, IMAGE), "image average",
        *map(str.upper, TEXT), "text average",
        *map(str.upper, VIDEO), "video average",
        "overall",
    ]  # fmt: skip
    row = dict(zip(head, cells(table, "base"), strict=True))
    assert row["MMMU"] == "57.0 (57.0 to 57.0)"
    assert row["image average"] == "54.0 (54.0 to 54.0)"
    assert row["overall"].startswith("55.1 ")
    assert dict(zip(head, cells(table, "copd"), strict=True))["overall"].startswith("**58.1** ")
    assert cells(table, "minus base") == ["image", "text", "video", "overall"]
    assert cells(table, "copd")[0].startswith("**60.1**")


def test_differences_and_details_of_the_table():
    a = [scores("mmmu", "image", [[0, 0], [1, 1], [0, 1]], majority=0.5)]
    b = [scores("mmmu", "image", [[1, 0], [1, 1], [0, 1]], majority=1.0)]
    table = markdown({"a": a, "b": b}, seed=0)
    assert "| MMMU | 3 | 50.0 (0.0 to 100.0) | 66.7 (0.0 to 100.0) | 50.0 (50.0 to 50.0) | 25.0 % | 1,234 |" in table
    assert "| b | +16.7 (+0.0 to +50.0) | +16.7 (+0.0 to +50.0) |" in table
    assert "| model | MMMU |" in table  # one benchmark has no averages


def test_a_model_without_a_benchmark_has_no_averages():
    table = markdown({"a": paper(50, 50), "b": paper(50, 50)[:-1]}, seed=0)
    assert cells(table, "a")[-1].startswith("**50.0**")
    row = dict(zip(cells(table, "model"), cells(table, "b"), strict=True))
    assert (row["MINERVA"], row["text average"], row["image average"], row["overall"]) == ("-", "-", "-", "-")
    assert row["MMMU"].startswith("**53.0**")


# Answers that vote


@pytest.mark.parametrize(
    ("verifier", "response", "answer"),
    [
        ("multiple_choice", r"It is \boxed{b}.", "B"),
        ("multiple_choice", "Answer: (B) a dog", "B"),
        ("multiple_choice", "Answer: a dog", "B"),
        ("multiple_choice", "A or B", None),
        ("numeric", r"\boxed{1,234.50 \text{ cm}}", "1234.5"),
        ("numeric", "The answer is 12.", "12"),
        ("numeric", "45%", "45%"),
        ("math", r"\boxed{ X + 1 }", "x + 1"),
        ("numeric", "First 7.\nThen 12 of them.", "12"),
        ("numeric", r"\boxed{12 \text{ or } 13}", r"12 or 13"),
        ("math", "I thought\nfor a while", "for while"),
        ("math", "First 7.\nso it is 12", "12"),
        ("math", "First 7.\nso it is $x + 1$.", "x + 1"),
        ("normalized", "I thought.\nIt is the dog.", "it is dog"),
        ("reasoning_gym_number", "1 and\n12 of them", "12"),
        ("json_fields", 'Here:\n{"b": 1,\n "a": [2]}\nDone.', '{"a": [2], "b": 1}'),
        ("json_fields", "none", None),
        ("math", "12", "12"),
        ("math", r"\boxed{-\sqrt{3}}", r"-\sqrt{3}"),
        ("math", r"\boxed{\sqrt{3}}", r"\sqrt{3}"),
        ("math", r"\boxed{(0,1)}", "(0 1)"),
        ("math", r"\boxed{[0, 1]}", "[0 1]"),
        ("normalized", "The answer is The Eiffel Tower. It is tall.", "eiffel tower"),
        ("math", "<think>4", None),
        ("answer_after_hash", "1+2#3", "3"),
        ("answer_after_hash", "1+2", None),
    ],
)
def test_extracted_answer(verifier: str, response: str, answer: str | None):
    choices = {"choices": {"A": "a cat", "B": "a dog"}} if verifier == "multiple_choice" else {}
    assert extracted_answer(response, Example("1", "?", "B", verifier, metadata=choices)) == answer


@pytest.mark.parametrize("verifier", ["numeric", "math", ALTERNATIVES])
def test_right_and_wrong_responses_vote_by_the_same_rule(verifier: str):
    """Responses of several lines that mark no answer: one is right, seven are wrong."""
    ways = {"alternatives": [{"answer": "five", "verifier": "normalized"}, {"answer": "5", "verifier": "numeric"}]}
    example = Example("1", "?", "5", verifier, metadata=ways if verifier == ALTERNATIVES else {})
    responses = ["I add.\nso 5", *["I add.\nso 6"] * 6, "I add.\nso it is 6"]
    rewards = verify_all([(response, example) for response in responses])
    assert rewards == [1.0] + [0.0] * 7
    assert majority_score([extracted_answer(response, example) for response in responses], rewards) == 0.0
    assert extracted_answer(r"\boxed{5.0}", example) == ("5.0" if verifier == "math" else "5")
