"""What claims say about runs whose numbers are known."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from copd_engine.study.claims import Measured, measure_claims
from copd_engine.study.results import Results, final_row
from copd_engine.study.statistics import t_interval
from copd_engine.study.tables import claims_note, claims_table, what_is_measured
from copd_engine.types import UserError
from tests.study_folder import RUN, study_of, write_pilot, write_run


def measured(root: Path, claim: dict[str, Any], runs: Any, **sections: Any) -> Measured:
    """The claim on a study whose folders ``runs(study)`` writes."""
    study = study_of(root, claims=[{"claim": "it is so", **claim}], **sections)
    runs(study)
    return measure_claims(study, Results(study))[0]


def scores(*right: int) -> list[float]:
    """20 prompts, of which these are solved."""
    return [float(i in right) for i in range(20)]


def test_a_variant_stands_for_its_model_at_equal_rollouts() -> None:
    """In whatever order its rows are."""
    labels = ["mixed RLVR, equal FLOPs", "mixed RLVR, equal steps", "mixed RLVR"]
    rows = [{"model": "base", "kind": "base"}, *({"model": label, "kind": "baseline"} for label in labels)]
    for order in itertools.permutations(rows):
        found = final_row(order)
        assert found is not None
        assert found["model"] == "mixed RLVR"
    assert final_row(rows[:3]) is None


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ((3, 4, 5), "holds"),
        ((-3, -4, -5), "does not hold"),
        ((3, -4, 5), "not decided"),
        ((0, 0, 0), "not decided"),
        ((1, 1, 1), "not decided"),  # a standard error of 0 is that of counting in whole prompts
        ((4, 4, 5), "holds"),
    ],
)
def test_accuracy_is_compared_seed_by_seed(tmp_path: Path, differences: tuple[int, ...], expected: str) -> None:
    def runs(study: Any) -> None:
        for seed, difference in zip(study.seeds, differences, strict=True):
            write_run(study, "copd", seed, {"merged": {"text": scores(*range(8 + difference))}})
            write_run(study, "expert", seed, {"average of experts": {"text": scores(*range(8))}})

    found = measured(tmp_path, {"better": "copd", "than": "expert"}, runs)
    assert found.outcome == expected
    assert found.by_seed == pytest.approx({seed: d / 20 for seed, d in zip((1, 2, 3), differences, strict=True)})
    assert found.interval == pytest.approx(t_interval([d / 20 for d in differences]))


def test_domains_and_other_rows_of_a_run(tmp_path: Path) -> None:
    def runs(study: Any) -> None:
        for seed in study.seeds:
            merged = {"text": scores(*range(4 + seed)), "image": scores(*range(10))}
            write_run(study, "copd", seed, {"branch:text": {"text": scores(), "image": scores(0)}, "merged": merged})
            write_run(study, "expert", seed, {"expert:text": {"text": scores(0), "image": scores(1)}, "x": merged})

    claim = {"better": "copd", "than": "expert/expert:text", "domain": "text"}
    assert measured(tmp_path, claim, runs).by_seed == pytest.approx({s: (3 + s) / 20 for s in (1, 2, 3)})
    average = measured(tmp_path / "average", {"better": "copd", "than": "copd/branch:text"}, runs)
    assert average.by_seed == pytest.approx({s: (13 + s) / 40 for s in (1, 2, 3)})
    for model, message in (
        ("copd/branch:video", "no such row.*'branch:text', 'merged'"),
        ("copd", "no accuracy on 'sound'"),
    ):
        with pytest.raises(UserError, match=message):
            measured(tmp_path / model, {"better": model, "than": "expert", "domain": "sound"}, runs)


def test_the_interval_over_prompts_pairs_them_within_seeds(tmp_path: Path) -> None:
    """Against resampling by brute force; unpaired resampling would give an interval more than twice as wide."""
    rng = np.random.default_rng(0)
    ours = {seed: rng.integers(0, 2, 50).astype(float) for seed in (1, 2, 3)}
    theirs = {seed: np.where(rng.random(50) < 0.1, 1 - values, values) for seed, values in ours.items()}

    def runs(study: Any) -> None:
        for seed in study.seeds:
            write_run(study, "copd", seed, {"merged": {"text": ours[seed]}})
            write_run(study, "expert", seed, {"average": {"text": theirs[seed]}})

    found = measured(tmp_path, {"better": "copd", "than": "expert"}, runs).prompts
    assert found is not None
    means = []
    for _ in range(4000):
        draws = {seed: rng.integers(0, 50, 50) for seed in ours}
        means.append(np.mean([(ours[s] - theirs[s])[i].mean() for s, i in draws.items()]))
    low, high = np.percentile(means, [2.5, 97.5])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.008)
    assert high - low < 0.12


def test_prompts_that_all_seeds_share_are_resampled_once(tmp_path: Path) -> None:
    """Rows of a file that are easier for one of the models in every seed: three seeds are no three times as many rows.
    Domains have equal weight; those of another number of prompts too."""
    rng = np.random.default_rng(0)
    easier = {"text": (rng.random(50) < 0.4).astype(float), "image": (rng.random(80) < 0.2).astype(float)}
    noise = {(s, d): 0.1 * rng.random(len(v)) for s in (1, 2, 3) for d, v in easier.items()}

    def runs(study: Any) -> None:
        for seed in study.seeds:
            ours = {domain: 0.9 * values + noise[seed, domain] for domain, values in easier.items()}
            write_run(study, "copd", seed, {"merged": ours})
            write_run(study, "expert", seed, {"average": {d: np.zeros(len(v)) for d, v in easier.items()}})

    def interval(root: Path, source: dict[str, Any], domain: str) -> tuple[float, float]:
        run = {"branches": [{"name": name, "data": {"domain": name, **source}} for name in ("text", "image")]}
        found = measured(root, {"better": "copd", "than": "expert", "domain": domain}, runs, run=run).prompts
        assert found is not None
        return found.low, found.high

    file = {"source": "jsonl", "path": "rows.jsonl", "domain": None}
    for domain, names in (("text", ["text"]), ("average", ["text", "image"])):
        means = np.zeros(4000)
        for name in names:
            per_row = np.mean([0.9 * easier[name] + noise[seed, name] for seed in (1, 2, 3)], axis=0)
            means += per_row[rng.integers(0, len(per_row), (4000, len(per_row)))].mean(1) / len(names)
        low, high = np.percentile(means, [2.5, 97.5])
        shared = interval(tmp_path / f"file-{domain}", file, domain)
        assert shared == pytest.approx((low, high), abs=0.02)
        own = interval(tmp_path / f"own-{domain}", {}, domain)
        assert (own[1] - own[0]) * math.sqrt(3) == pytest.approx(high - low, rel=0.1)


CURVE = {6: (1, "rl", 0.90), 10: (1, "opd", 0.96), 16: (2, "rl", 0.92), 20: (2, "opd", 0.91)}


#: How far below 1 a seed's curves are, of what is written: without spread nothing is decided.
FACTORS = {1: 0.9, 2: 1.0, 3: 1.1}


def times_factor(value: float) -> Any:
    """By seed, a difference of two points of one seed."""
    return pytest.approx({seed: factor * value for seed, factor in FACTORS.items()})


def curves(copd: dict[int, tuple[int, str, float]], expert: dict[int, float]) -> Any:
    def runs(study: Any) -> None:
        for seed in study.seeds:
            ours = {s: (cycle, phase, 1 - FACTORS[seed] * (1 - v)) for s, (cycle, phase, v) in copd.items()}
            write_run(study, "copd", seed, {"merged": {"text": scores()}}, ours)
            other = {step: (1, "rl", 1 - FACTORS[seed] * (1 - value)) for step, value in expert.items()}
            write_run(study, "expert", seed, {"average": {"text": scores()}}, other)

    return runs


def test_phases_count_their_own_changes(tmp_path: Path) -> None:
    # Phase I: .96 -> .92, without 1 -> .90 of equal models. Phase II: .90 -> .96, .92 -> .91: mean +.025.
    common = {"kind": "phase", "variant": "copd", "measure": "overlap"}
    falls = measured(tmp_path / "a", {**common, "phase": "rl", "direction": "falls"}, curves(CURVE, {}))
    rises = measured(tmp_path / "b", {**common, "phase": "opd", "direction": "rises"}, curves(CURVE, {}))
    assert falls.by_seed == times_factor(0.04)
    assert falls.note == "falls in 3 of 3 phases"
    assert rises.by_seed == times_factor(0.025)
    assert rises.note == "rises in 3 of 6 phases"
    assert (falls.outcome, rises.outcome) == ("holds", "holds")
    wrong = measured(tmp_path / "c", {**common, "phase": "rl", "direction": "rises"}, curves(CURVE, {}))
    assert wrong.outcome == "does not hold"
    first = {step: row for step, row in CURVE.items() if row[0] == 1}
    alone = measured(tmp_path / "d", {**common, "phase": "rl", "direction": "falls"}, curves(first, {}))
    assert (alone.outcome, alone.by_seed, alone.note) == ("not decided", {}, "no such phase was measured")


def test_above_and_stays_above_independent_experts(tmp_path: Path) -> None:
    """From the end of the first phase I on (step 6, where both are equal), at the steps that both have."""
    runs = curves(CURVE, {6: 0.90, 10: 0.90, 12: 0.1, 16: 0.93, 20: 0.80})
    common = {"variant": "copd", "measure": "overlap", "than": "expert"}
    above = measured(tmp_path / "a", {"kind": "above", **common}, runs)
    stays = measured(tmp_path / "b", {"kind": "stays_above", **common}, runs)
    assert above.by_seed == times_factor((0.06 - 0.01 + 0.11) / 3)
    assert stays.by_seed == times_factor(-0.01)
    assert above.note == stays.note == "above at 6 of 9 measurements"
    assert (above.outcome, stays.outcome) == ("holds", "does not hold")
    # The other way round it is the same steps: of independent experts all of cycle 1 is phase I.
    below = measured(tmp_path / "c", {"kind": "above", **common, "variant": "expert", "than": "copd"}, runs)
    assert below.by_seed == times_factor(-(0.06 - 0.01 + 0.11) / 3)
    assert (below.note, below.outcome) == ("above at 3 of 9 measurements", "does not hold")


def test_two_copd_runs_differ_from_the_first_end_of_a_phase_1_on(tmp_path: Path) -> None:
    long = {6: (1, "rl", 0.90), 10: (1, "rl", 0.85), 16: (1, "opd", 0.90), 20: (1, "opd", 0.90)}

    def runs(study: Any) -> None:
        for seed in study.seeds:
            for variant, curve in (("copd", CURVE), ("long", long)):
                write_run(study, variant, seed, {"merged": {"text": scores()}}, curve)

    claim = {"kind": "above", "measure": "overlap", "variant": "copd", "than": "long"}
    variants: dict[str, Any] = {"copd": {}, "long": {}}
    for ours, theirs, sign in (("copd", "long", 1), ("long", "copd", -1)):
        swapped = {**claim, "variant": ours, "than": theirs}
        found = measured(tmp_path / ours, swapped, runs, variants=variants)
        assert found.by_seed == pytest.approx(dict.fromkeys((1, 2, 3), sign * (0.11 + 0.02 + 0.01) / 3))
        assert found.outcome == "not decided"  # equal in all seeds


def test_stays_above_needs_every_seed(tmp_path: Path) -> None:
    """The interval of the minima, mean .04, is above 0 though one of them is not."""
    minima = dict(zip((1, 2, 3, 4, 5), (0.05, 0.051, 0.049, 0.05, -0.001), strict=True))

    def runs(study: Any) -> None:
        for seed in study.seeds:
            curve = {6: (1, "rl", 0.9 + minima[seed]), 10: (1, "opd", 0.99)}
            write_run(study, "copd", seed, {"merged": {"text": scores()}}, curve)

    claim = {"kind": "stays_above", "variant": "copd", "measure": "overlap", "level": 0.9}
    found = measured(tmp_path / "a", claim, runs, seeds=[1, 2, 3, 4, 5])
    assert found.by_seed == pytest.approx(minima)
    assert found.interval is not None
    assert found.interval.low > 0.01
    assert (found.outcome, found.survives_correction) == ("not decided", False)
    assert found.note == "above at 9 of 10 measurements"
    minima[5] = 0.048
    assert measured(tmp_path / "b", claim, runs, seeds=[1, 2, 3, 4, 5]).outcome == "holds"


def test_stays_above_a_level_at_every_measurement(tmp_path: Path) -> None:
    """The first phase I included: nothing is compared that is equal by construction."""
    common = {"kind": "stays_above", "variant": "copd", "measure": "overlap"}
    found = measured(tmp_path / "a", {**common, "level": 0.9}, curves(CURVE, {}))
    assert found.by_seed == pytest.approx({1: 0.01, 2: 0.0, 3: -0.01}, abs=1e-12)
    assert found.note == "above at 10 of 12 measurements"
    assert measured(tmp_path / "b", {**common, "level": 0.85}, curves(CURVE, {})).outcome == "holds"
    assert measured(tmp_path / "c", {**common, "level": 0.95}, curves(CURVE, {})).outcome == "does not hold"


PILOT = {"experts": "expert", "teacher": "image", "students": ["text"], "fractions": [0.5], "opd_steps": 1}


def test_the_pilots_correlation_by_seed(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    points = {seed: (x := rng.random(12), 0.3 * x + 0.02 * rng.normal(size=12)) for seed in (1, 2, 3)}

    def runs(study: Any) -> None:
        for seed, (x, y) in points.items():
            write_pilot(study, seed, list(x), list(y))

    found = measured(tmp_path, {"kind": "pilot"}, runs, pilot=PILOT)
    rs = {seed: np.corrcoef(x, y)[0, 1] for seed, (x, y) in points.items()}
    assert found.by_seed == pytest.approx(rs)
    assert found.interval is not None
    assert found.interval.value == pytest.approx(math.tanh(np.mean(np.arctanh(list(rs.values())))))
    assert found.outcome == "holds"
    pooled = np.corrcoef(*(np.concatenate([p[i] for p in points.values()]) for i in (0, 1)))[0, 1]
    p = stats.ttest_1samp(np.arctanh(list(rs.values())), 0).pvalue
    assert found.note == f"p = {p:.2g} over 3 seeds; all 36 points together: r = {pooled:.2f}"


def test_gain_per_headroom_is_another_number(tmp_path: Path) -> None:
    """Equal gains of other headrooms. The last two students are left out: one is as good as its teacher, one so little
    below that 400 prompts do not tell them apart, 2 * sqrt((.8 * .2 + .745 * .255) / 400) = .059."""

    def runs(study: Any) -> None:
        for seed in study.seeds:
            write_pilot(study, seed, [0.9, 0.7, 0.5, 0.1, 0.2], [0.1, 0.1, 0.1, 0.5, 0.5])
            file = study.output_dir / study.name / f"seed-{seed}" / "pilot" / "result.json"
            result = json.loads(file.read_text())
            for point, before in zip(result["points"], (0.3, 0.4, 0.5 + seed / 100, 0.8, 0.745), strict=True):
                point["before"] = before
            file.write_text(json.dumps(result))

    found = measured(tmp_path, {"kind": "pilot_headroom"}, runs, pilot=PILOT)
    for seed, r in found.by_seed.items():
        shares = [0.1 / 0.5, 0.1 / 0.4, 0.1 / (0.3 - seed / 100)]
        assert r == pytest.approx(np.corrcoef([0.9, 0.7, 0.5], shares)[0, 1])
    assert "all 9 points together" in found.note
    assert found.note.endswith("; 6 students near their teacher left out")
    assert found.outcome == "does not hold"
    assert "all 15 points together" in measured(tmp_path / "all", {"kind": "pilot"}, runs, pilot=PILOT).note


def test_a_students_headroom_is_counted_in_standard_errors_of_its_prompts(tmp_path: Path) -> None:
    """.08 below a teacher of .8 is 2.7 standard errors on 400 prompts and .9 on the 40 that its expert's row names."""
    study = study_of(tmp_path, pilot=PILOT)
    for seed in study.seeds:
        write_pilot(study, seed, [0.5], [0.05], teacher=0.38)
    for seed in (2, 3):
        write_run(study, "expert", seed, {"expert:image": {"image": scores()}})
    file = study.output_dir / study.name / "seed-3" / "expert" / "result.json"
    rows = json.loads(file.read_text())["rows"]
    file.write_text(json.dumps({"rows": [{**rows[0], "num_prompts": 40}]}))
    (one,), (two,), (three,) = (Results(study).pilot_points([seed]) for seed in study.seeds)
    assert (one.num_prompts, two.num_prompts, three.num_prompts) == (400, 400, 40)
    assert (one.has_headroom, three.has_headroom) == (True, False)
    assert three.gain_stderr == pytest.approx(math.sqrt((0.3 * 0.7 + 0.35 * 0.65) / 40))


def test_the_number_names_its_k(tmp_path: Path) -> None:
    run = {**RUN, "diagnostics": {"top_k": 3}}
    common = {"variant": "copd", "measure": "overlap"}
    variants = {"copd": {"changes": {"diagnostics": {"top_k": 2}}}, "expert": {"changes": {"method": "expert"}}}
    claims = [
        {"claim": "a", "kind": "stays_above", **common, "level": 0.9},
        {"claim": "b", "kind": "phase", **common, "phase": "rl", "direction": "falls"},
        {"claim": "c", "kind": "above", "variant": "expert", "measure": "overlap", "than": "copd"},
        {"claim": "d", "kind": "above", "variant": "expert", "measure": "sum_min", "than": "copd"},
        {"claim": "e", "kind": "pilot"},
    ]
    study = study_of(tmp_path, run=run, variants=variants, claims=claims, pilot=PILOT)
    numbers = [what_is_measured(m) for m in measure_claims(study, Results(study))]
    assert numbers == [
        "smallest of overlap (k = 2) of copd \N{MINUS SIGN} 0.9",
        "how far overlap (k = 2) of copd falls over a phase I but the first",
        "mean of overlap (k = 3) of expert \N{MINUS SIGN} copd",
        "mean of sum_min of expert \N{MINUS SIGN} copd",
        "r of gain and starting overlap (k = 3)",
    ]


def test_a_pilot_without_spread_decides_nothing(tmp_path: Path) -> None:
    def runs(study: Any) -> None:
        for seed in study.seeds:
            write_pilot(study, seed, [0.5, 0.5, 0.5], [0.1, 0.2, 0.3])

    found = measured(tmp_path, {"kind": "pilot"}, runs, pilot=PILOT)
    assert (found.outcome, found.by_seed) == ("not decided", {})
    assert found.note == "overlap or gain is the same for all students"


def test_seeds_that_are_missing_are_left_out_and_all_missing_is_said(tmp_path: Path) -> None:
    def runs(study: Any) -> None:
        for seed in (1, 3):
            write_run(study, "copd", seed, {"merged": {"text": scores(*range(10))}})
        for seed in (2, 3):
            write_run(study, "expert", seed, {"average": {"text": scores(0)}})

    found = measured(tmp_path / "a", {"better": "copd", "than": "expert"}, runs)
    assert found.by_seed == pytest.approx({3: 0.45})
    assert found.outcome == "not decided"
    assert (found.is_complete, found.num_seeds) == (False, 3)
    nothing = measured(tmp_path / "b", {"better": "copd", "than": "expert"}, lambda study: None)
    assert (nothing.outcome, nothing.interval) == ("missing", None)


def test_nothing_is_decided_before_all_seeds_are_there(tmp_path: Path) -> None:
    """Four of five seeds are far above 0."""

    def runs(study: Any, seeds: tuple[int, ...] = (1, 2, 4, 5)) -> None:
        for seed in seeds:
            write_run(study, "copd", seed, {"base": {"text": scores()}, "merged": {"text": scores(*range(10 + seed))}})

    claim = {"better": "copd", "than": "copd/base"}
    found = measured(tmp_path, claim, runs, seeds=[1, 2, 3, 4, 5])
    assert found.interval is not None
    assert found.interval.low > 0.4
    assert (found.outcome, found.survives_correction) == ("not decided", False)
    (cells,) = claims_table([found]).rows
    assert cells[2].startswith("+65.0 [+")
    assert cells[2].endswith("] (4 of 5 seeds)")
    assert cells[4] == "seed 1: +55.0, seed 2: +60.0, seed 4: +70.0, seed 5: +75.0"
    assert claims_note([found]).startswith(
        "0 of 1 claims were tested: 0 hold, 0 do not hold, 0 are not decided; 1 others have numbers of too few seeds. "
    )
    study = study_of(tmp_path, claims=[{"claim": "it is so", **claim}], seeds=[1, 2, 3, 4, 5])
    runs(study, (3,))
    (whole,) = measure_claims(study, Results(study))
    assert whole.outcome == "holds"
    (cells,) = claims_table([whole]).rows
    assert "seed" not in cells[2] + cells[4]
    assert claims_note([whole]).startswith("1 claims were tested: 1 hold")


def test_the_table_says_how_many_claims_were_tested(tmp_path: Path) -> None:
    """Three seeds with a spread of .01: half an interval is .025, with Bonferroni's correction for four claims .051."""
    spread = {1: -0.01, 2: 0.0, 3: 0.01}

    def write(study: Any) -> None:
        for seed in study.seeds:
            models = {name: {"text": [0.5 + above + spread[seed]] * 20} for name, above in differences.items()}
            write_run(study, "copd", seed, {"base": {"text": [0.5] * 20}, **models})

    differences = {"weak": 0.008, "middle": 0.035, "merged": 0.11}
    claims = [{"claim": f"{n} is above base", "better": f"copd/{n}", "than": "copd/base"} for n in differences]
    claims.append({"claim": "base is above merged", "better": "copd/base", "than": "copd"})
    study = study_of(tmp_path, claims=claims)
    write(study)
    found = measure_claims(study, Results(study))
    assert [m.outcome for m in found] == ["not decided", "holds", "holds", "does not hold"]
    assert [m.survives_correction for m in found] == [False, False, True, True]
    note = claims_note(found)
    assert "4 claims were tested: 2 hold, 1 do not hold, 1 are not decided" in note
    assert "of the 3 decided ones 2 (marked *) stay so with intervals at 98.75 %" in note
    rows = claims_table(found).rows
    assert rows[2][0] == "merged is above base"
    assert rows[2][2] == "+11.0 [+8.5, +13.5]"
    assert [row[-1] for row in rows] == ["not decided", "holds", "holds *", "does not hold *"]
