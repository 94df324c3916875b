"""The study of the testbed: what its claims compare, and its short version by the command, all methods."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from copd_engine.study.config import ClaimConfig, load_study
from copd_engine.study.plan import units_of
from copd_engine.study.results import Results
from copd_engine.study.run import times_of
from tests import cli_site
from tests.cli_site import Ended
from tests.small_run import contents

TESTBED = Path(__file__).parent.parent / "configs" / "testbed.yaml"
copd = cli_site.copd

EQUAL = {"": "", " at equal steps": ", equal steps", " at equal FLOPs": ", equal FLOPs"}
NUMBERS = {"two": "2", "three": "3"}
DOMAINS = {"two": ("text", "image"), "three": ("text", "image", "video")}


def accuracy(claim: str, better: str, than: str, domain: str = "average") -> dict[str, Any]:
    return {"claim": claim, "better": better, "than": than, "domain": domain}


def of_overlap(claim: str, kind: str, branches: str, **fields: Any) -> dict[str, Any]:
    """A claim about the overlap of CoPD with so many branches."""
    variant = f"copd{NUMBERS[branches]}"
    return {"claim": f"{claim}, {branches} branches", "kind": kind, "variant": variant, "measure": "overlap", **fields}


def row(variant: str, label: str, suffix: str) -> str:
    return f"{variant}/{label}{suffix}" if suffix else variant


def required() -> list[dict[str, Any]]:
    """The claims of the paper, and the controls beside them: what each compares."""
    claims = []
    for branches, n in NUMBERS.items():
        for at, suffix in EQUAL.items():
            mixed, average = row(f"mixed{n}", "mixed RLVR", suffix), row(f"expert{n}", "average of experts", suffix)
            experts = f"CoPD is above the average of independent experts{at}, {branches} branches"
            claims.append(accuracy(f"CoPD is above mixed RLVR{at}, {branches} branches", f"copd{n}", mixed))
            claims.append(accuracy(experts, f"copd{n}", average))
        for d in DOMAINS[branches]:
            claim = f"CoPD ({branches} branches) is above the {d} expert on {d}"
            claims.append(accuracy(claim, f"copd{n}", f"expert{n}/expert:{d}", d))
        lone = {"than": f"expert{n}"}
        claims += [
            of_overlap("Overlap falls in phase I", "phase", branches, phase="rl", direction="falls"),
            of_overlap("Overlap recovers in phase II", "phase", branches, phase="opd", direction="rises"),
            of_overlap("Overlap is above that of independent RLVR", "above", branches, **lone),
            of_overlap("Overlap stays above that of independent RLVR", "stays_above", branches, **lone),
            of_overlap("Overlap (k = 2) stays above 0.90", "stays_above", branches, level=0.9),
        ]
    claims.append(accuracy("CoPD is above MOPD", "copd3", "mopd3"))
    claims.append(accuracy("CoPD is above MOPD into the text expert", "copd3", "mopd3_into_text"))
    for edge in ("image → text", "text → image"):
        name = edge.replace(" → ", "_to_")
        claims.append(accuracy(f"CoPD is above static OPD, {edge}", "copd2", f"static_{name}"))
        claims.append(accuracy(f"CoPD is above CoPD without {edge}", "copd2", f"copd2_without_{name}"))
    claims += [accuracy(f"1.5 : 1 is above {ratio} : 1", "copd2", f"ratio_{ratio}") for ratio in ("0.5", "1", "3")]
    for d in ("text", "image"):
        claims.append(accuracy(f"The merged model is above the {d} branch alone", "copd2", f"copd2/branch:{d}"))
    for dial in ("0.5", "1"):
        of = f"_conflict_{dial}"
        for and_at, suffix in ((" at", ""), (" at equal steps and", ", equal steps")):
            mixed, average = row(f"mixed2{of}", "mixed RLVR", suffix), row(f"expert2{of}", "average of experts", suffix)
            experts = f"CoPD is above the average of independent experts{and_at} conflict {dial}"
            claims.append(accuracy(f"CoPD is above mixed RLVR{and_at} conflict {dial}", f"copd2{of}", mixed))
            claims.append(accuracy(experts, f"copd2{of}", average))
    claims += [
        accuracy("Phases that end by what is measured are above fixed ones", "adaptive", "copd2"),
        accuracy("Beta scaled by KL is above a fixed beta", "beta_kl", "copd2"),
        {"claim": "Pilot: the gain rises with starting overlap", "kind": "pilot"},
        {"claim": "Pilot: the gain per headroom rises with starting overlap", "kind": "pilot_headroom"},
    ]
    return claims


def test_the_claims_compare_what_they_say() -> None:
    study = load_study(TESTBED)
    expected = {claim["claim"]: ClaimConfig(**claim) for claim in required()}
    assert len(expected) == len(required())
    assert {claim.claim: claim for claim in study.claims} == expected
    assert len(study.claims) == len(expected)


def test_the_variants_are_what_their_names_say() -> None:
    """Method, branches, conflict dial and schedule behind the names that the claims compare."""
    seen = {}
    for unit in units_of(load_study(TESTBED)):
        config = unit.config
        if unit.seed == 1 and unit.variant != "pilot":
            dial = {branch.data.conflict for branch in config.branches}
            ratio = config.schedule.rl_steps / config.schedule.opd_steps
            seen[unit.variant] = (config.method, "+".join(config.branch_names), dial, ratio, config.schedule.topology)
    two, three, ratio = "text+image", "text+image+video", 1.5
    expected: dict[str, Any] = {}
    for method in ("copd", "expert", "mixed"):
        expected[f"{method}3"] = (method, three, {0.0}, ratio, "full")
        for name, dial in (("", 0.0), ("_conflict_0.5", 0.5), ("_conflict_1", 1.0)):
            expected[f"{method}2{name}"] = (method, two, {dial}, ratio, "full")
    expected |= dict.fromkeys(("mopd3", "mopd3_into_text"), ("mopd", three, {0.0}, ratio, "full"))
    for student, teacher in (("text", "image"), ("image", "text")):
        expected[f"static_{teacher}_to_{student}"] = ("static_opd", two, {0.0}, ratio, "full")
        # What is left is the other direction, [student, teacher].
        expected[f"copd2_without_{teacher}_to_{student}"] = ("copd", two, {0.0}, ratio, [(teacher, student)])
    expected |= {f"ratio_{x}": ("copd", two, {0.0}, float(x), "full") for x in ("0.5", "1", "3")}
    expected |= {name: ("copd", two, {0.0}, ratio, "full") for name in ("adaptive", "beta_kl")}
    assert seen == expected
    configs = {unit.variant: unit.config for unit in units_of(load_study(TESTBED)) if unit.seed == 1}
    for student, teacher in (("text", "image"), ("image", "text")):
        section = configs[f"static_{teacher}_to_{student}"].static_opd
        assert (section.student, section.teacher) == (student, teacher)
    assert configs["adaptive"].schedule.adaptive is not None
    assert configs["beta_kl"].schedule.beta_scale == "kl"


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
    number = len(study.claims)
    assert f"0 of {number} claims were tested: 0 hold, 0 do not hold, 0 are not decided" in text  # one seed
    assert f"; {number} others have numbers of too few seeds. " in text
    assert text.count("| not decided |") == number
    assert "missing" not in text.split("## Config")[0]
    figures = [*study.steps, *study.sweeps, "gain"]
    # On four prompts a student is hardly ever two standard errors below its teacher.
    figures += ["gain per headroom"] if any(p.has_headroom for p in Results(study, True).pilot_points((1,))) else []
    assert len(list((tmp_path / "results").glob("*.png"))) == html.count("data:image/png") == len(figures)
    for table in study.tables:
        assert f"## {table.title}" in text
        for label in table.rows:
            assert f"| {label} |" in text

    before = contents(root / "seed-1")
    assert copd(*arguments).code == 0
    assert contents(root / "seed-1") == before
    assert len(times_of(root)) == len(units)
