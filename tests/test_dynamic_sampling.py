"""Groups without variance are replaced by others, up to a number of rounds; what is trained on stays as large."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from copd_engine.algorithms import Assignment
from copd_engine.config import build_config
from copd_engine.dynamic_sampling import RewardedRollouts, chosen, joined, num_missing
from copd_engine.metrics import step_tokens
from copd_engine.objectives import groups_with_variance
from copd_engine.rewards import RewardScore
from copd_engine.step import Timer
from copd_engine.trainer import Trainer
from tests.small_run import small_config, write_base, write_data
from tests.test_objectives import rollout


def group(number: int, *rewards: float) -> RewardedRollouts:
    return [rollout(r, number) for r in rewards], [RewardScore(r, {"verifier": r}) for r in rewards]


FLAT = [group(n, 1, 1) for n in range(4)]
LIVE = [group(10 + n, 1, 0) for n in range(4)]


@pytest.mark.parametrize(
    ("groups", "num_prompts", "expected", "missing"),
    [
        ([FLAT[0], LIVE[0], FLAT[1], LIVE[1]], 2, [LIVE[0], LIVE[1]], 0),
        ([FLAT[0], LIVE[0], LIVE[1], LIVE[2]], 2, [LIVE[0], LIVE[1]], 0),
        ([FLAT[0], LIVE[0], FLAT[1], FLAT[2]], 3, [FLAT[0], LIVE[0], FLAT[1]], 2),
        ([FLAT[0], FLAT[1]], 2, [FLAT[0], FLAT[1]], 2),
        ([LIVE[0]], 2, [LIVE[0]], 1),  # the engine has lost one
        ([], 2, [], 2),
    ],
)
def test_groups_with_variance_come_first_and_others_fill_up(groups, num_prompts, expected, missing):
    assert chosen(groups, num_prompts) == expected
    assert num_missing(num_prompts, groups) == missing


def test_variance_is_that_of_the_fp32_rewards():
    assert groups_with_variance([*group(3, 0.1, 0.1 + 1e-12)[0], *group(4, 0.1, 0.1001)[0]]) == {4}
    assert joined([FLAT[0], LIVE[1]]) == (FLAT[0][0] + LIVE[1][0], FLAT[0][1] + LIVE[1][1])


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("material")
    return write_base(folder / "base"), write_data(folder / "data")


def drawn(
    material: tuple[Path, Path], folder: Path, max_rounds: int, step: int = 3
) -> tuple[Trainer, dict[Assignment, Any]]:
    """Rollouts of a step with native and cross batches. Four responses of at most 8 tokens: some groups are flat."""
    config = small_config(*material, folder, objective={"dynamic_sampling": {"max_rounds": max_rounds}})
    trainer = Trainer(build_config(config), folder / "run")
    return trainer, trainer.steps.roll_out(trainer.schedule.plan(step), Timer())


def num_live(found: RewardedRollouts) -> int:
    return len(groups_with_variance(found[0]))


def test_rounds_replace_grpos_groups_alone(material, tmp_path):
    plain, once = drawn(material, tmp_path / "plain", 0)
    one, one_round = drawn(material, tmp_path / "one", 1)
    many, all_live = drawn(material, tmp_path / "many", 50)
    assert any(num_live(once[a]) < a.num_prompts for a in once if a.teacher is None)
    num_drawn = Counter[str]()
    for assignment, found in all_live.items():
        num_drawn[assignment.student] += assignment.num_prompts + many.steps.num_resampled[assignment]
        if assignment.teacher is not None:
            # Another assignment's further rounds change nothing here.
            assert [r.response_ids_N.tolist() for r in found[0]] == [
                r.response_ids_N.tolist() for r in once[assignment][0]
            ]
            assert many.steps.num_resampled[assignment] == 0
            continue
        assert num_live(found) == assignment.num_prompts
        assert len(found[0]) == len(found[1]) == 4 * assignment.num_prompts
        missing = assignment.num_prompts - num_live(once[assignment])
        assert one.steps.num_resampled[assignment] == missing
        assert many.steps.num_resampled[assignment] >= missing
        assert num_live(one_round[assignment]) >= num_live(once[assignment])
        assert len(one_round[assignment][0]) == 4 * assignment.num_prompts
        # What had variance at once is kept, before what was drawn later.
        kept = groups_with_variance(once[assignment][0])
        first = [r.response_ids_N.tolist() for r in once[assignment][0] if r.request.group in kept]
        assert [r.response_ids_N.tolist() for r in found[0]][: len(first)] == first
        groups = [r.request.group for r in found[0]]
        assert groups == sorted(groups)
        assert len({r.request.seed for r in found[0]}) == len(groups)
    assert set(plain.steps.num_resampled.values()) == {0}
    assert {student: 4 * count for student, count in num_drawn.items()} == dict(many.steps.rollouts_drawn)


def test_a_step_trains_on_the_replacements_and_counts_them(material, tmp_path, monkeypatch):
    config = small_config(*material, tmp_path, objective={"dynamic_sampling": {"max_rounds": 50}})
    trainer = Trainer(build_config(config), tmp_path / "run")
    plan = trainer.schedule.plan(3)
    generate, sampled = trainer.engine.generate_mixed, []

    def counted(*args: Any) -> Iterator[Any]:
        for student, rollouts in generate(*args):
            sampled.extend(rollout.num_tokens for rollout in rollouts)
            yield student, rollouts

    monkeypatch.setattr(trainer.engine, "generate_mixed", counted)
    metrics = trainer.steps.run(plan, Timer())
    packed = sum(branch["num_packed_tokens"] for branch in metrics.values())
    trained_on = sum(
        part["num_rollouts"] * part["response_tokens_mean"] for b in metrics.values() for part in b["rollout"].values()
    )
    assert step_tokens(metrics) == packed + sum(sampled) > packed + trained_on
    for assignment in plan.assignments:
        stats = metrics[assignment.student]["rollout"][assignment.source]
        if assignment.teacher is None:
            assert stats["zero_variance_groups"] == 0
            assert stats["num_groups"] == assignment.num_prompts
            assert stats["num_resampled_groups"] == trainer.steps.num_resampled[assignment]
        else:
            assert "num_resampled_groups" not in stats
    assert sum(trainer.steps.num_resampled.values()) > 0
