"""The study of the testbed in its short version, by the command, all methods and claims."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from copd_engine.study.config import load_study
from copd_engine.study.run import times_of
from tests import cli_site
from tests.cli_site import Ended
from tests.small_run import contents

TESTBED = Path(__file__).parent.parent / "configs" / "testbed.yaml"
copd = cli_site.copd

#: Words of the claims of the paper, and of the controls beside them, that the study has to test.
REQUIRED = (
    "mixed RLVR, two branches",
    "mixed RLVR, three branches",
    "static OPD, image → text",
    "static OPD, text → image",
    "above MOPD",
    "average of independent experts, two branches",
    "average of independent experts, three branches",
    "(two branches) is above the text expert on text",
    "(two branches) is above the image expert on image",
    "(three branches) is above the text expert on text",
    "(three branches) is above the image expert on image",
    "(three branches) is above the video expert on video",
    "falls in phase I",
    "recovers in phase II",
    "stays above that of independent RLVR",
    "stays above 0.90",
    "above 0.5 : 1",
    "above 1 : 1",
    "above 3 : 1",
    "without image → text",
    "without text → image",
    "above the text branch alone",
    "above the image branch alone",
    "mixed RLVR at conflict 0.5",
    "mixed RLVR at conflict 1",
    "experts at conflict 0.5",
    "experts at conflict 1",
    "what is measured are above fixed ones",
    "Beta scaled by KL",
    "Pilot",
)


@pytest.mark.timeout(900)  # a machine that is busy with other things
def test_all_of_it_runs(tmp_path: Path, copd: Callable[..., Ended]) -> None:
    arguments = ("study", str(TESTBED), f"output_dir={tmp_path}", "--fast", "--markdown", str(tmp_path / "results.md"))
    ended = copd(*arguments)
    assert ended.code == 0, ended.err
    study = load_study(TESTBED, fast=True)
    root = tmp_path / "testbed-fast"
    units = {path.parent.name for path in root.glob("seed-1/*/result.json")}
    assert units == {*study.variants, "pilot"}
    assert not list(root.rglob("checkpoints"))
    methods = {json.loads(p.read_text()).get("method") for p in root.glob("seed-1/*/result.json")}
    assert methods == {"copd", "expert", "mixed", "static_opd", "mopd", None}  # None: the pilot
    text = (tmp_path / "results.md").read_text()
    html = (root / "study.html").read_text()
    for claim in study.claims:
        assert claim.claim in text
        assert claim.claim in html
    for words in REQUIRED:
        assert any(words in claim.claim for claim in study.claims), words
    assert f"{len(study.claims)} claims were tested: 0 hold, 0 do not hold, {len(study.claims)} are not decided" in text
    assert "missing" not in text.split("## Config")[0]
    figures = [*study.steps, *study.sweeps, study.pilot]
    assert len(list((tmp_path / "results").glob("*.png"))) == html.count("data:image/png") == len(figures)
    for table in study.tables:
        assert f"## {table.title}" in text
        for label in table.rows:
            assert f"| {label} |" in text

    before = contents(root / "seed-1")
    assert copd(*arguments).code == 0
    assert contents(root / "seed-1") == before
    assert len(times_of(root)) == len(units)
