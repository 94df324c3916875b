"""``copd eval-table``: equal questions are compared, and what differs is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tests import cli_site, evaluation_site
from tests.benchmark_files import dump_lines
from tests.cli_site import Ended
from tests.evaluation_site import lines

finished, site, copd = cli_site.finished, cli_site.site, cli_site.copd
aime, evaluate = evaluation_site.aime, evaluation_site.evaluate


def test_models_are_asked_with_equal_seeds_and_compared(
    evaluate: Callable[..., Ended], copd: Callable[..., Ended]
) -> None:
    for out, model in (("a", "base"), ("b", "runs/small/models/merged")):
        assert evaluate("--num-samples", "2", "--out", out, model=model).code == 0
    seeds = [{(line["uid"], line["sample"]): line["seed"] for line in lines(out)} for out in "ab"]
    assert seeds[0] == seeds[1]
    ended = copd("eval-table", "a", "b", "--out", "table.md")
    assert ended.code == 0, ended.err
    assert Path("table.md").read_text() == ended.out
    means = [json.loads(Path(out, "eval.json").read_text())["averages"]["overall"]["value"] for out in "ab"]
    assert f"| runs/small/models/merged | {100 * (means[1] - means[0]):+.1f} (" in ended.out
    assert "| minus base | text | overall |" in ended.out
    same = copd("eval-table", "a", "a")
    assert (same.code, same.err) == (2, "copd: a is named twice\n")
    assert "runs holds no finished evaluation (no eval.json)" in copd("eval-table", "a", "runs").err
    path = Path("b/samples.jsonl")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert "b: samples are missing" in copd("eval-table", "a", "b").err


def test_only_equal_questions_are_compared(evaluate: Callable[..., Ended], copd: Callable[..., Ended]) -> None:
    """Rows without ids are named by file and number, so that another file's rows have the same uids."""
    for out, gold in (("a", "1"), ("b", "1"), ("c", "2")):
        for row in ("first", "second"):
            rows = [{"prompt": "first", "answer": "1"}, {"prompt": row, "answer": gold}]
            dump_lines(Path("own.jsonl"), rows)
            assert evaluate("--out", f"{out}-{row}", data="own.jsonl").code == 0
    uid = json.loads(Path("a-first/eval.json").read_text())["sources"][0]["uids"][1]
    ended = copd("eval-table", "a-first", "b-first")
    assert (ended.code, ended.err) == (0, "")
    assert "other settings" not in ended.out
    ended = copd("eval-table", "a-first", "b-second")
    assert ended.code == 2
    assert f"own {uid!r}: the prompt in b-second is not that in a-first: evaluate both" in ended.err
    ended = copd("eval-table", "a-first", "b-first", "c-first")
    assert ended.code == 2
    assert f"own {uid!r}: the gold in c-first is not that in a-first: evaluate both" in ended.err


def test_means_over_other_prompts_are_named(evaluate: Callable[..., Ended], copd: Callable[..., Ended]) -> None:
    assert evaluate("--num-prompts", "4", "--out", "a").code == 0
    assert evaluate("--out", "b", model="runs/small/models/merged").code == 0
    ended = copd("eval-table", "a", "b")
    assert ended.code == 0, ended.err
    own = [{line["uid"]: line["reward"] for line in lines(out)} for out in "ab"]
    assert (len(own[0]), len(own[1])) == (4, 6)
    change = 100 * sum(own[1][uid] - own[0][uid] for uid in own[0]) / 4
    assert f"| runs/small/models/merged | {change:+.1f} (" in ended.out
    assert (
        "Left out of the differences of runs/small/models/merged, not of the means above: AIME 2024 but for the "
        "4 prompts that both were asked (base: 4, runs/small/models/merged: 6)."
    ) in ended.out


def test_other_settings_stand_below_the_table(evaluate: Callable[..., Ended], copd: Callable[..., Ended]) -> None:
    assert evaluate("--out", "a").code == 0
    changes = ("--temperature", "0.5", "--max-new-tokens", "3", "media.video_fps=1.0", "--num-samples", "2")
    assert evaluate("--out", "b", *changes, model="runs/small/models/merged").code == 0
    ended = copd("eval-table", "a", "b")
    assert ended.code == 0, ended.err
    assert ended.out.endswith(
        "\nruns/small/models/merged was evaluated with other settings: num_samples 2 (base: 1), "
        "temperature 0.5 (base: 1.0), max_new_tokens 3 (base: 4), media.video_fps 1.0 (base: 2.0).\n"
    )
