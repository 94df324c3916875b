"""The config of a study: defaults from a list of methods, units, equal rollouts, one config per folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from copd_engine.algorithms import Schedule
from copd_engine.config import RunConfig
from copd_engine.study.config import StudyConfig, load_study
from copd_engine.study.plan import claim_folder, fingerprint, merged, units_of
from copd_engine.types import UserError
from tests.study_folder import RUN, study_of

TESTBED = Path(__file__).parent.parent / "configs" / "testbed.yaml"


def write_study(folder: Path, **data: Any) -> Path:
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump({"seeds": [1, 2], "output_dir": str(folder / "studies"), **data}))
    return file


def run_with(*names: str) -> dict[str, Any]:
    return {"branches": [{"name": name, "data": {"domain": "text"}} for name in names]}


def error_of(file: Path) -> str:
    with pytest.raises(UserError) as caught:
        units_of(load_study(file))
    return str(caught.value)


def _above(model: str, domain: str = "average") -> dict[str, Any]:
    """A claim about a model and the base, which every run has."""
    variant = "mixed" if model.startswith("mixed") else "copd"
    return {"claim": "c", "better": model, "than": f"{variant}/base", "domain": domain}


# configs/testbed.yaml


def prompts_drawn(config: RunConfig) -> int:
    schedule = Schedule(config)
    steps = range(1, schedule.num_steps + 1)
    return sum(assignment.num_prompts for step in steps for assignment in schedule.plan(step).assignments)


def test_the_testbeds_variants_draw_equal_rollouts() -> None:
    """To the last prompt, as the comment in the file says. Adaptive phases stop by themselves at CoPD's number."""
    units = {unit.variant: unit for unit in units_of(load_study(TESTBED)) if unit.seed == 1}
    skipped = {"pilot", "adaptive"}
    counts = {}
    for name, unit in units.items():
        taken = unit.config.method in ("static_opd", "mopd")  # the experts, trained in another unit
        config = unit.config
        if taken:
            section = getattr(config, config.method).model_copy(update={"experts": None})
            config = config.model_copy(update={config.method: section})
        if name not in skipped:
            counts[name] = prompts_drawn(config)
    for name, count in counts.items():
        reference = counts[f"copd{len(units[name].config.branches)}"]
        assert count == reference, name
    assert counts["copd2"] == 2 * 210 * 16


def test_the_testbed_has_all_units_and_trains_what_others_need_first() -> None:
    study = load_study(TESTBED)
    units = units_of(study)
    assert len(units) == len(study.seeds) * (len(study.variants) + 1)
    assert len({unit.folder for unit in units}) == len(units)
    for index, unit in enumerate(units):
        for need in unit.needs:
            assert f"seed-{unit.seed}/{need}" in [earlier.name for earlier in units[:index]]
    needs = {unit.variant: unit.needs for unit in units if unit.seed == 1 and unit.needs}
    assert needs == {
        "expert3": ("copd3",),
        "mixed3": ("copd3",),
        "mopd3": ("expert3",),
        "mopd3_into_text": ("expert3",),
        "expert2": ("copd2",),
        "mixed2": ("copd2",),
        "static_image_to_text": ("expert2",),
        "static_text_to_image": ("expert2",),
        "pilot": ("expert3",),
    }
    folder = study.output_dir / "testbed" / "seed-2"
    assert next(unit for unit in units if unit.name == "seed-2/mixed3").config.flops_of == folder / "copd3"
    static = next(unit for unit in units if unit.name == "seed-2/static_image_to_text")
    assert static.config.static_opd.experts == study.output_dir / "testbed" / "seed-2" / "expert2"
    assert 0 not in study.seeds


def test_generated_prompts_are_other_ones_for_every_seed_and_equal_for_all_variants() -> None:
    units = units_of(load_study(TESTBED))
    seeds = {(unit.seed, branch.data.seed) for unit in units for branch in unit.config.branches}
    assert seeds == {(seed, seed) for seed in (1, 2, 3, 4, 5)}


def test_reasoning_gym_has_no_question_twice_in_two_seeds(tmp_path: Path) -> None:
    """Question i is made from seed + i, a held-out one from seed + 2**30 + i, one of a search from seed + 2**29 + i."""
    gym = {"source": "reasoning_gym", "task": "basic_arithmetic", "seed": 3}
    mixture = {"source": "mixture", "sources": [{**gym, "weight": 1}, {"domain": "text", "seed": 3, "weight": 1}]}
    branches = [{"name": "gym", "data": gym}, {"name": "both", "data": mixture}]
    study = study_of(tmp_path, run={"branches": branches}, variants={"copd": {}}, seeds=[0, 1, 2, 510])
    data = {unit.seed: [branch.data for branch in unit.config.branches] for unit in units_of(study)}
    assert [gym.seed for gym, _ in data.values()] == [3, 3 + 2**20, 3 + 2**21, 3 + 510 * 2**20]
    assert [[source.seed for source in both.sources] for _, both in data.values()] == [
        [3, 3],
        [3 + 2**20, 4],
        [3 + 2**21, 5],
        [3 + 510 * 2**20, 513],
    ]
    starts = [gym.seed + offset for gym, _ in data.values() for offset in (0, 2**29, 2**30)]
    distances = np.diff(sorted(starts))
    assert min(distances) == 2**20
    with pytest.raises(UserError, match="seeds: 511 is too large: with source reasoning_gym"):
        units_of(study_of(tmp_path, run={"branches": branches}, variants={"copd": {}}, seeds=[511]))


def test_rows_of_files_stay_where_they_are(tmp_path: Path) -> None:
    branch = {"name": "text", "data": {"source": "jsonl", "path": "text.jsonl"}}
    study = study_of(tmp_path, run={"branches": [branch]}, variants={"copd": {}})
    assert {unit.config.branches[0].data.seed for unit in units_of(study)} == {0}


def test_fast_changes_the_run_the_seeds_and_the_name() -> None:
    study = load_study(TESTBED, fast=True)
    units = units_of(study, fast=True)
    assert (study.name, study.seeds) == ("testbed-fast", (1,))
    assert {unit.config.schedule.cycles for unit in units} == {1}
    assert {branch.data.size for unit in units for branch in unit.config.branches} == {64}
    assert {unit.config.flops_of for unit in units if unit.variant == "expert2"} == {
        study.output_dir / "testbed-fast" / "seed-1" / "copd2"
    }
    assert next(u for u in units if u.variant == "copd2_conflict_0.5").config.branches[0].data.conflict == 0.5
    assert fingerprint(study, fast=True) != fingerprint(load_study(TESTBED))


# Five lines


def test_methods_and_a_run_config_are_a_whole_study(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"name": "mine", "seed": 7, **run_with("math", "charts")}))
    methods = ["copd", "mixed", "mopd", "static_opd", "expert"]
    study = load_study(write_study(tmp_path, run="run.yaml", methods=methods))
    assert list(study.variants) == ["expert", "mixed", "static_opd_math", "static_opd_charts", "mopd", "copd"]
    units = units_of(study)
    assert len(units) == 2 * 6
    by_name = {unit.name: unit for unit in units}
    static = by_name["seed-2/static_opd_charts"].config
    assert (static.static_opd.student, static.static_opd.teacher, static.seed) == ("charts", "math", 2)
    assert by_name["seed-1/mopd"].config.mopd.experts == tmp_path / "studies/study/seed-1/expert"
    compared = {(claim.better, claim.than, claim.domain) for claim in study.claims if claim.kind == "accuracy"}
    others = ("expert", "mixed", "static_opd_math", "static_opd_charts", "mopd")
    assert compared == {
        *(("copd", other, "average") for other in others),
        *(("copd", f"expert/expert:{name}", name) for name in ("math", "charts")),
    }
    assert {claim.kind for claim in study.claims} == {"accuracy", "phase", "above", "stays_above"}
    assert study.tables[0].rows["CoPD, merged"] == "copd"
    assert "Overlap (k = 10) stays above 0.90" in [claim.claim for claim in study.claims]


@pytest.mark.parametrize("number", [1, 3])
def test_methods_for_other_numbers_of_branches(tmp_path: Path, number: int) -> None:
    names = ["math", "charts", "clips"][:number]
    methods = ["copd", "static_opd", "mopd"]
    study = load_study(write_study(tmp_path, run=run_with(*names), methods=methods))
    statics = [v.changes["static_opd"] for v in study.variants.values() if v.changes["method"] == "static_opd"]
    assert [(s["student"], s["teacher"]) for s in statics] == (
        [] if number == 1 else [("math", "charts"), ("charts", "math"), ("clips", "math")]
    )
    assert "expert" in study.variants  # nobody asked for it, others need it
    assert "mixed" not in study.variants
    units_of(study)
    if number == 1:  # nothing to merge: the branch stands for CoPD
        assert [(c.better, c.than) for c in study.claims] == [("copd/branch:math", "expert/expert:math")]
        rows = {
            "base": "expert/base",
            "math expert, alone": "expert/expert:math",
            "CoPD, math branch": "copd/branch:math",
        }
        assert study.tables[0].rows == rows


def test_under_lora_static_methods_train_experts_of_their_own(tmp_path: Path) -> None:
    """A finished run has no adapters to go on with: units that took its experts would fail after it was trained."""
    run = {**run_with("math", "charts"), "model": {"lora": {"rank": 4}}}
    for number, methods in enumerate((["copd", "static_opd", "mopd", "expert"], ["copd", "static_opd", "mopd"])):
        (tmp_path / str(number)).mkdir()
        study = load_study(write_study(tmp_path / str(number), run=run, methods=methods))
        assert ("expert" in study.variants) == ("expert" in methods)
        assert [variant.needs for variant in study.variants.values()] == [()] * len(study.variants)
        configs = {unit.variant: unit.config for unit in units_of(study)}
        assert configs["mopd"].mopd.experts is None
        assert {configs[f"static_opd_{name}"].static_opd.experts for name in ("math", "charts")} == {None}
    assert (
        error_of(
            write_study(
                tmp_path,
                run=run,
                variants={
                    "expert": {"changes": {"method": "expert"}},
                    "mopd": {"changes": {"method": "mopd"}, "experts": "expert"},
                },
            )
        )
        == "variants.mopd.experts: under model.lora a run has no adapters to go on with; leave it out"
    )


def test_overrides_change_a_run_that_is_a_path(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"optim": {"lr": 1e-3}, **run_with("math", "charts")}))
    (tmp_path / "other.yaml").write_text(yaml.safe_dump({"optim": {"lr": 2e-3}, **run_with("math", "charts")}))
    file = write_study(tmp_path, run="run.yaml", methods=["copd"])

    def run_of(*overrides: str) -> dict[str, Any]:
        return load_study(file, list(overrides)).run

    assert run_of()["optim"] == {"lr": 1e-3}
    changed = run_of("run.optim.lr=5e-4", "run.branches.1.beta=2", "seeds=[7]")
    assert (changed["optim"], changed["branches"][1]["beta"]) == ({"lr": 5e-4}, 2)
    assert run_of("run.optim.max_tokens_per_micro_batch=64", "run=other.yaml")["optim"] == {
        "lr": 2e-3,
        "max_tokens_per_micro_batch": 64,
    }
    inline = write_study(tmp_path, run=run_with("math", "charts"), methods=["copd"])
    assert load_study(inline, ["run.optim.lr=5e-4"]).run["optim"] == {"lr": 5e-4}


def test_what_is_written_out_stands_beside_the_defaults(tmp_path: Path) -> None:
    extra = {"half": {"changes": {"method": "copd", "schedule": {"cycles": 2}}}}
    claims = [{"claim": "longer is better", "better": "copd", "than": "half"}]
    data = {"run": RUN, "methods": ["copd", "expert"], "variants": extra, "claims": claims}
    study = load_study(write_study(tmp_path, **data))
    assert list(study.variants) == ["expert", "copd", "half"]
    assert study.claims[-1].claim == "longer is better"
    assert study.claims[0].claim == "CoPD is above the average of the experts"


# Errors


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"sedes": [1]}, "unknown key 'sedes' (did you mean 'seeds'?)"),
        ({"seeds": [1, 1]}, "seeds = [1, 1]: must be different seeds, at least one"),
        ({"seeds": []}, "must be different seeds, at least one"),
        ({"methods": ["copd", "grpo"]}, "methods = ['copd', 'grpo']: must be a list of copd, mixed, mopd"),
        ({"run": "missing.yaml"}, "missing.yaml does not exist"),
        ({"methods": ["copd"], "variants": ["a"]}, "variants = ['a']: must be a mapping of names to sections"),
        ({"methods": ["copd"], "claims": 5}, "claims = 5: must be a list"),
        ({"methods": ["copd"], "run": {"branches": 3}}, "run.branches must be a list of branches, each with a name"),
        ({"methods": ["copd"], "run": {"branches": []}}, "run.branches must be a list of branches, each with a name"),
        ({"methods": ["copd"], "run": {"branches": [3]}}, "run.branches must be a list of branches, each with a name"),
        ({"methods": ["copd"], "run": {**RUN, "model": "smollm2"}}, "run.model = 'smollm2': must be a section of keys"),
        ({"methods": ["copd"], "run": 3}, "run = 3: must be a section"),
        ({"methods": ["copd"], "run": None}, "key 'run' is missing"),
        ({"variants": {"pilot": {}}}, "the name 'pilot' is taken"),
        (
            {"variants": {"copd": {"branchs": ["text"]}}},
            "unknown key 'variants.copd.branchs' (did you mean 'branches'?)",
        ),
        (
            {"variants": {"copd": {"branches": ["texts"]}}},
            "variants.copd.branches: no branch is named 'texts' (did you",
        ),
        (
            {"variants": {"copd": {"changes": {"schedule": {"cycle": 1}}}}},
            "unknown key 'schedule.cycle' (did you mean 'cyc",
        ),
        ({"variants": {"a": {"experts": "b"}}}, "variants.a.experts: no variant is named 'b'"),
        ({"variants": {"a": {"experts": "copd"}, "copd": {}}}, "variant 'copd' is not of method 'expert'"),
        (
            {"variants": {"a": {"experts": "b"}, "b": {"changes": {"method": "expert"}}}},
            "only static_opd and mopd take experts, its method is None",
        ),
        (
            {"tables": [{"title": "t", "rows": {"x": "coop/merged"}}]},
            "tables.0.rows: no variant is named 'coop' (did you",
        ),
        (
            {"tables": [{"title": "t", "rows": {"x": "copd/branch:texts"}}]},
            "tables.0.rows: variant 'copd' has no row 'branch:texts' (did you mean 'branch:text'?); its rows are ",
        ),
        (
            {
                "variants": {"mixed": {"changes": {"method": "mixed"}}},
                "claims": [_above("mixed/mixed RLVR, equal FLOPs")],
            },
            "claims.0: variant 'mixed' has no row 'mixed RLVR, equal FLOPs' (did you mean 'mixed RLVR, equal steps'?)",
        ),
        (
            {"sweeps": [{"title": "t", "x_label": "x", "lines": {"a": {1: "copd"}}, "domain": "txt"}]},
            "sweeps.0.lines: 'copd' is not evaluated on 'txt' (did you mean 'text'?); its domains are text, ",
        ),
        ({"claims": [_above("copd/base", "video")]}, "claims.0: 'copd/base' is not evaluated on 'video'"),
        (
            {"variants": {"copd": {}, "one": {"branches": ["text"]}}, "claims": [_above("one")]},
            "claims.0: variant 'one' has one branch and nothing to merge; write 'one/branch:text'",
        ),
        (
            {"variants": {"copd": {}, "one": {"branches": ["text"]}}, "claims": [_above("one/base")]},
            "claims.0: 'one/base' is averaged over text, 'copd/base' over text, image; name a domain that both have",
        ),
        (
            {"steps": [{"title": "t", "measure": "overlap", "lines": {"a": "copd/merged"}}]},
            "steps.0.lines: no variant is named 'copd/merged'",
        ),
        ({"variants": {"a": {"flops_of": "b"}}}, "variants.a.flops_of: no variant is named 'b'"),
        (
            {"variants": {"a": {"flops_of": "b"}, "b": {"changes": {"method": "mixed"}}}},
            "variants.a.flops_of: variant 'b' is not of method 'copd'",
        ),
        (
            {"variants": {"a": {"flops_of": "copd"}, "copd": {}}},
            "flops_of: only expert and mixed go on until a number of FLOPs, not copd",
        ),
        ({"claims": [{"claim": "c", "better": "copd"}]}, "claims.0: kind 'accuracy' needs 'than'"),
        ({"claims": [{"claim": "c", "kind": "pilot", "than": "copd"}]}, "kind 'pilot' takes no 'than'"),
        ({"claims": [{"claim": "c", "kind": "pilot"}]}, "claims.0: kind 'pilot' needs the section 'pilot'"),
        (
            {"claims": [{"claim": "c", "kind": "stays_above", "variant": "copd", "measure": "overlap"}]},
            "kind 'stays_above' needs 'than' or 'level', and not both",
        ),
    ],
)
def test_mistakes_are_named(tmp_path: Path, data: dict[str, Any], message: str) -> None:
    file = write_study(tmp_path, **{"run": RUN, "variants": {"copd": {}}, **data})
    assert message in error_of(file)


def test_a_pilot_names_branches(tmp_path: Path) -> None:
    pilot = {"experts": "expert", "teacher": "sound", "students": ["text"], "fractions": [1.0], "opd_steps": 1}
    with pytest.raises(UserError, match="pilot: no branch of variant 'expert' is named 'sound'"):
        units_of(study_of(tmp_path, pilot=pilot))


def test_a_pilot_under_lora_is_an_error_before_anything_is_trained(tmp_path: Path) -> None:
    """It would train all weights of its students."""
    pilot = {"experts": "expert", "teacher": "image", "students": ["text"], "fractions": [1.0], "opd_steps": 1}
    study = study_of(tmp_path, pilot=pilot, run={**RUN, "model": {"lora": {"rank": 4}}})
    with pytest.raises(UserError, match=r"pilot: .*'expert' under model\.lora"):
        units_of(study)
    assert not list(tmp_path.iterdir())


# The folder


def test_a_study_is_fixed_before_its_seeds_are_run(tmp_path: Path) -> None:
    claims = [{"claim": "c", "better": "copd", "than": "expert"}]
    study = study_of(tmp_path, claims=claims)
    root = claim_folder(study)
    assert json.loads((root / "study.json").read_text())["sha256"] == fingerprint(study)
    before = (root / "study.json").read_bytes()
    assert claim_folder(study_of(tmp_path, claims=claims, processes=2)) == root
    lr = {"optim": {"lr": 1e-3}}
    for changes, first in (
        ({"seeds": [1, 2]}, r"seeds was \[1, 2, 3\], is \[1, 2\]"),
        ({"claims": []}, r"claims was \[\{.*, is \[\]"),
        ({"claims": [{**claims[0], "domain": "text"}]}, "claims.0.domain was 'average', is 'text'"),
        ({"run": merged(RUN, lr)}, r"run.optim was None, is \{'lr': 0.001\}"),
    ):
        with pytest.raises(UserError, match=rf"another config \({first}; sha.*were fixed before its seeds were run"):
            claim_folder(study_of(tmp_path, **{"claims": claims, **changes}))
    with pytest.raises(UserError, match=r"another config \(with or without --fast; "):
        claim_folder(study, fast=True)
    assert (root / "study.json").read_bytes() == before


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    (tmp_path / study.name).mkdir()
    (tmp_path / study.name / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not a study's folder"):
        claim_folder(study)
    assert [path.name for path in (tmp_path / study.name).iterdir()] == ["notes.txt"]


def test_sections_are_merged_key_by_key_and_the_originals_stay() -> None:
    data = {"a": {"x": 1, "y": [1, 2]}, "b": 1}
    assert merged(data, {"a": {"y": [3]}, "c": {"z": 1}}) == {"a": {"x": 1, "y": [3]}, "b": 1, "c": {"z": 1}}
    assert data == {"a": {"x": 1, "y": [1, 2]}, "b": 1}


def test_the_name_is_no_part_of_the_fingerprint() -> None:
    assert fingerprint(StudyConfig(**_data("a"))) == fingerprint(StudyConfig(**_data("b")))


def _data(name: str) -> dict[str, Any]:
    return {"name": name, "seeds": [1], "run": RUN, "variants": {"copd": {}}}
