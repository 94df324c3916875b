"""``copd eval``: what is drawn, kept and drawn again."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import copd_engine.evaluation.run as run
from copd_engine.evaluation.samples import read_samples
from copd_engine.verifiers import shared_pool
from tests import cli_site, evaluation_site
from tests.benchmark_files import dump_lines, parquet
from tests.cli_site import Ended, Site
from tests.evaluation_site import drawn, lines
from tests.small_run import contents

finished, site, copd = cli_site.finished, cli_site.site, cli_site.copd
aime, evaluate = evaluation_site.aime, evaluation_site.evaluate
NUM_SAMPLES = 4


def test_every_output_is_kept_and_scored(evaluate: Callable[..., Ended], aime: str) -> None:
    ended = evaluate("--num-samples", str(NUM_SAMPLES), "--out", "out")
    assert ended.code == 0, ended.err
    found = lines("out")
    assert sorted((line["uid"], line["sample"]) for line in found) == [
        (str(i), g) for i in range(6) for g in range(NUM_SAMPLES)
    ]
    line = next(line for line in found if (line["uid"], line["sample"]) == ("3", 2))
    assert line.keys() == {
        *("benchmark", "uid", "sample", "seed", "prompt", "response"),
        *("answer", "gold", "reward", "finish_reason", "num_tokens", "digest"),
    }
    assert (line["benchmark"], line["gold"]) == ("aime_2024", "2")
    assert line["prompt"].startswith("3+3=\nPlease reason")
    kept = read_samples(Path("out"))["aime_2024", "3"][2]
    assert kept.items() <= line.items()
    assert not {"prompt", "response"} & kept.keys()  # of an evaluation they would fill the memory
    assert all(line["num_tokens"] <= 4 and line["finish_reason"] in ("stop", "length") for line in found)
    assert all(line["reward"] == 1.0 for line in found if line["response"] == line["gold"])
    assert 0 < sum(line["reward"] for line in found) < len(found)
    assert len({line["seed"] for line in found}) == len(found)

    result = json.loads(Path("out/eval.json").read_text())
    numbers = result["benchmarks"]["aime_2024"]
    assert numbers["mean"]["value"] == pytest.approx(sum(line["reward"] for line in found) / len(found))
    assert numbers["mean"]["low"] <= numbers["mean"]["value"] <= numbers["mean"]["high"]
    solved = {line["uid"] for line in found if line["reward"] == 1.0}
    assert numbers["pass"]["4"]["value"] == pytest.approx(len(solved) / 6)
    assert result["averages"]["text"] == numbers["mean"]
    assert result["command"].startswith("copd eval base num_threads=1 --data aime_2024=")
    assert {"date", "machine", "device", "versions", "settings", "model"} <= result.keys()
    assert Path("out/table.md").read_text() in ended.out
    assert "| model | AIME 2024 |" in ended.out
    assert ended.out.endswith("outputs: out\n")


def test_more_samples_keep_the_first_ones(evaluate: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch) -> None:
    assert evaluate("--num-samples", "2", "--num-prompts", "3", "--out", "some").code == 0
    first = lines("some")
    assert len(first) == 6
    assert evaluate("--num-samples", "3", "--out", "some").code == 0
    assert lines("some")[:6] == first
    assert evaluate("--num-samples", "3", "--out", "whole").code == 0
    assert drawn("some") == drawn("whole")
    assert Path("some/table.md").read_text() == Path("whole/table.md").read_text()

    def no_engine(*_: object) -> None:
        raise AssertionError("samples")

    monkeypatch.setattr(run, "create_engine", no_engine)
    before = contents(Path("whole"))
    assert evaluate("--num-samples", "3", "--out", "whole").code == 0
    assert contents(Path("whole")) == before


def test_a_kill_loses_what_was_not_written(evaluate: Callable[..., Ended]) -> None:
    """The rest is drawn again, to the same responses."""
    assert evaluate("--num-samples", "2", "--out", "out").code == 0
    whole, text = drawn("out"), Path("out/samples.jsonl").read_text()
    Path("out/samples.jsonl").write_text(text[: len(text) // 2])
    Path("out/eval.json").unlink()
    assert evaluate("--num-samples", "2", "--out", "out").code == 0
    assert drawn("out") == whole
    assert text.startswith(Path("out/samples.jsonl").read_text()[: len(text) // 2].rpartition("\n")[0])


def test_a_line_that_lost_only_its_end_is_drawn_again(evaluate: Callable[..., Ended]) -> None:
    assert evaluate("--num-samples", "2", "--out", "out").code == 0
    whole, text = drawn("out"), Path("out/samples.jsonl").read_text()
    Path("out/samples.jsonl").write_text(text.removesuffix("\n"))
    assert evaluate("--num-samples", "2", "--out", "out").code == 0
    assert drawn("out") == whole
    assert Path("out/samples.jsonl").read_text() == text


def test_a_stop_in_between_leaves_what_was_drawn(
    evaluate: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    from copd_engine.rollout.embedded import EmbeddedEngine

    groups = EmbeddedEngine.generate_groups

    def stops(self: EmbeddedEngine, *arguments: Any) -> Any:
        for number, group in enumerate(groups(self, *arguments)):
            assert len(lines("out")) == 2 * number  # on disk while the others are drawn
            if number == 4:
                raise KeyboardInterrupt
            yield group

    monkeypatch.setattr(EmbeddedEngine, "generate_groups", stops)
    assert evaluate("--num-samples", "2", "--out", "out").code == 130
    assert len(lines("out")) == 8
    monkeypatch.setattr(EmbeddedEngine, "generate_groups", groups)
    assert evaluate("--num-samples", "2", "--out", "out").code == 0
    assert evaluate("--num-samples", "2", "--out", "whole").code == 0
    assert drawn("out") == drawn("whole")


def test_lost_samples_are_an_error(evaluate: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch) -> None:
    from copd_engine.rollout.embedded import EmbeddedEngine

    groups = EmbeddedEngine.generate_groups
    monkeypatch.setattr(EmbeddedEngine, "generate_groups", lambda self, *args: (g[:1] for g in groups(self, *args)))
    ended = evaluate("--num-samples", "2", "--out", "out")
    assert ended.code == 2
    assert ended.err.endswith("aime_2024: the engine lost 6 of 12 samples; the same command draws them again\n")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("--temperature", "0.5"), "out holds samples of other settings (temperature: 1.0, now 0.5): choose another"),
        (("--seed", "3"), "(seed: 0, now 3)"),
        (("--max-new-tokens", "5"), "(max_new_tokens: 4, now 5)"),
    ],
)
def test_other_settings_are_not_mixed(evaluate: Callable[..., Ended], changes: tuple[str, str], message: str) -> None:
    assert evaluate("--out", "out").code == 0
    before = contents(Path("out"))
    ended = evaluate("--out", "out", *changes)
    assert ended.code == 2
    assert message in ended.err
    assert contents(Path("out")) == before


def test_other_weights_and_other_questions_are_not_mixed(evaluate: Callable[..., Ended], site: Site) -> None:
    assert evaluate("--out", "out").code == 0
    assert "(weights: " in evaluate("--out", "out", model="runs/small/models/merged").err
    parquet(site.root / "aime/train.parquet", [{"id": i, "problem": "new", "answer": "1"} for i in range(6)])
    ended = evaluate("--out", "out")
    assert ended.code == 2
    assert "the samples of aime_2024 '0' are of another prompt or answer than prompt '0' (" in ended.err
    with (site.root / "base/chat_template.jinja").open("a") as file:
        file.write("{# another #}")
    assert "out holds samples of other settings (tokenizer: " in evaluate("--out", "out").err
    Path("other").mkdir()
    Path("other/notes.txt").write_text("mine")
    assert "other exists and holds no evaluation (no settings.json)" in evaluate("--out", "other").err


QUESTION: dict[str, Any] = {
    "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "1+1="}],
    "answer": "2",
    "verifier": "numeric",
    "metadata": {"abs_tol": 0},
}


@pytest.mark.parametrize(
    "change",
    [
        {"messages": [{"role": "system", "content": "think"}, QUESTION["messages"][1]]},
        {"verifier": "exact"},
        {"metadata": {"abs_tol": 1}},
        {"answer": "3"},
    ],
    ids=str,
)
def test_samples_of_another_question_are_not_mixed(
    evaluate: Callable[..., Ended], copd: Callable[..., Ended], change: dict[str, Any]
) -> None:
    """Also where the last turn and the gold are the same."""
    dump_lines(Path("own.jsonl"), [QUESTION])
    assert evaluate("--out", "out", data="own.jsonl").code == 0
    before = contents(Path("out"))
    dump_lines(Path("own.jsonl"), [QUESTION | change])
    ended = evaluate("--out", "out", data="own.jsonl")
    assert ended.code == 2
    assert "are of another prompt or answer than" in ended.err
    assert contents(Path("out")) == before
    assert evaluate("--out", "changed", data="own.jsonl").code == 0
    key = {"messages": "messages", "answer": "gold"}.get(next(iter(change)), "verifier or metadata")
    assert f": the {key} in changed is not that in out: evaluate both" in copd("eval-table", "out", "changed").err


def test_failures_of_verifiers_are_kept_with_the_samples(
    evaluate: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Across calls: one comparison of every prompt runs out of time."""

    def times_out(pairs: Any) -> list[float]:
        pool = shared_pool()
        monkeypatch.setattr(pool, "failures", replace(pool.failures, timeouts=pool.failures.timeouts + 1))
        return [0.0 for _ in pairs]

    monkeypatch.setattr(run, "verify_all", times_out)
    assert evaluate("--num-samples", "2", "--num-prompts", "2", "--out", "out").code == 0
    ended = evaluate("--num-samples", "2", "--out", "out")
    assert ended.code == 0, ended.err
    result = json.loads(Path("out/eval.json").read_text())
    counts = {"timeouts": 6, "out_of_memory": 0, "crashes": 0}
    assert result["benchmarks"]["aime_2024"]["verifier_failures"] == counts
    assert "AIME 2024: comparisons that ended without a result, scored 0: timeouts 6." in ended.out
    assert sum("verifier_failures" in line for line in lines("out")) == 6


def test_without_out_each_model_and_setting_has_a_folder(evaluate: Callable[..., Ended]) -> None:
    assert evaluate().code == evaluate("--seed", "1").code == evaluate().code == 0
    folders = sorted(Path("runs/eval").iterdir())
    assert len(folders) == 2
    assert all(folder.name.startswith("base-") and (folder / "samples.jsonl").is_file() for folder in folders)


def test_temperature_0_draws_the_same_response_for_all_samples(evaluate: Callable[..., Ended]) -> None:
    assert evaluate("--temperature", "0", "--num-samples", "3", "--out", "out").code == 0
    found = drawn("out")
    assert all(len({found[str(i), g] for g in range(3)}) == 1 for i in range(6))


def test_several_sources(copd: Callable[..., Ended], site: Site, aime: str) -> None:
    """Benchmarks of two domains, a file of our own, and two files of one name."""
    from tests.benchmark_cases import math_verse

    verse = math_verse(site.root)
    (site.root / "own").mkdir()
    dump_lines(site.root / "own/sums.jsonl", [{"prompt": "1", "answer": "1"}, {"prompt": "2", "answer": "2"}])
    for name in "ab":
        dump_lines(site.root / f"own/{name}.jsonl", [{"prompt": name, "answer": "1", "uid": name}])
    sources = [aime, f"mathverse:text_lite={verse}", "own/sums.jsonl", "two=own/a.jsonl", "two=own/b.jsonl"]
    data = [part for source in sources for part in ("--data", source)]
    ended = copd("eval", "base", *data, "--max-new-tokens", "2", "--out", "out", "rollout.max_prompt_tokens=400")
    assert ended.code == 0, ended.err
    result = json.loads(Path("out/eval.json").read_text())
    assert {name: (row["domain"], row["num_prompts"]) for name, row in result["benchmarks"].items()} == {
        "aime_2024": ("text", 6),
        "mathverse:text_lite": ("image", 1),
        "sums": ("text", 2),
        "two": ("text", 2),
    }
    assert "MathVerse (text_lite)" in ended.out
    assert "text average" in ended.out
    values = [row["mean"]["value"] for row in result["benchmarks"].values()]
    assert result["averages"]["overall"]["value"] == pytest.approx(sum(values) / 4)


def test_branches_keep_their_outputs_too(copd: Callable[..., Ended], site: Site) -> None:
    ended = copd("eval", "base", "--config", site.write(), "--num-samples", "2", "--num-prompts", "4", "--out", "out")
    assert ended.code == 0, ended.err
    records = read_samples(Path("out"))
    assert {key[0] for key in records} == {"text", "image"}
    assert all(sorted(samples) == [0, 1] for samples in records.values())
    result = json.loads(Path("out/eval.json").read_text())
    assert [result["benchmarks"][name]["domain"] for name in ("text", "image")] == ["text", "image"]
    shown = next(line for line in ended.out.splitlines() if line.startswith("base"))
    assert f"{100 * result['benchmarks']['text']['mean']['value']:.1f}" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "copd eval needs --data, e.g. --data aime_2024=aime.parquet, or --config"),
        (("--data", "aime_2023=x.parquet"), "--data aime_2023: x.parquet does not exist"),
        (("--data", "aime_2024=x.parquet"), "aime_2024: x.parquet does not exist"),
        (("--data", "aime_2023=x.json"), "must be BENCHMARK=PATH, or a .jsonl or .parquet file of docs/data.md"),
        (("--data", "aime_2023:easy=x.json"), "no benchmark is called 'aime_2023' (did you mean 'aime_202"),
        (("--data", "x.csv"), "a benchmark is given as NAME=PATH"),
        (("--data", "a.jsonl", "--data", "a.jsonl"), "--data a.jsonl is given twice"),
        (("--data", "a.jsonl", "rollout.max_runing=3"), "config: unknown key 'rollout.max_runing' (did you mean"),
    ],
)  # fmt: skip
def test_errors_of_the_command_line(
    copd: Callable[..., Ended], site: Site, arguments: tuple[str, ...], message: str
) -> None:
    ended = copd("eval", "base", *arguments)
    assert ended.code == 2
    assert message in ended.err
    assert not (site.root / "runs/eval").exists()
