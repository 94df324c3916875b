"""A step's rollouts: verified beside generation to the same numbers, one call of the engine, asleep after."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest

from copd_engine.config import build_config
from copd_engine.objectives import TrainSample
from copd_engine.rollout.base import RolloutEngine, Sampling
from copd_engine.step import Timer
from copd_engine.trainer import Trainer
from copd_engine.types import Rollout, RolloutRequest, UserError
from copd_engine.verifiers import shared_pool
from tests.small_run import small_config, write_base, write_data

#: Comparisons in worker processes and in this process, summed.
REWARD = [
    {"kind": "verifier"},
    {"kind": "format", "pattern": "[12]+", "weight": 0.5},
    {"kind": "verifier", "name": "tests.test_step:own", "weight": 0.25},
]
#: One response of each branch to the probes.
PROBES = ["generate text", "generate image", "generate video"]
calls: list[threading.Thread] = []


def own(response: str, example: object) -> float:
    calls.append(threading.current_thread())
    return float("1" in response)


def failing(response: str, example: object) -> float:
    raise ValueError("on purpose")


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("material")
    return write_base(folder / "base"), write_data(folder / "data")


def trainer_of(material: tuple[Path, Path], output_dir: Path) -> Trainer:
    config = small_config(*material, output_dir, schedule={"cycles": 1, "rl_steps": 1, "opd_steps": 1})
    config["branches"] = [branch | {"reward": REWARD} for branch in config["branches"]]
    return Trainer(build_config(config), output_dir / "run")


class Shuffled(RolloutEngine):
    """Another engine's groups, all experts' mixed, in an order of its own; counts the calls."""

    def __init__(self, engine: RolloutEngine) -> None:
        self.engine = engine
        self.calls: list[str] = []

    def sync(self, *args) -> None:
        self.engine.sync(*args)

    def generate(self, expert, requests, sampling) -> list[Rollout]:
        self.calls.append(f"generate {expert}")
        return self.engine.generate(expert, requests, sampling)

    def generate_mixed(self, requests, sampling):
        self.calls.append("generate " + " ".join(requests))
        groups = sorted(self.engine.generate_mixed(requests, sampling), key=lambda found: -found[1][0].request.group)
        yield from groups

    def sleep(self) -> None:
        self.calls.append("sleep")

    def close(self) -> None:
        self.engine.close()


def test_groups_in_any_order_are_rewarded_as_one_after_the_other(material, tmp_path) -> None:
    trainer = trainer_of(material, tmp_path)
    plan = trainer.schedule.plan(2)
    assert len(plan.assignments) > len(trainer.branches)  # native and cross batches
    streams = {key: stream.state_dict() for key, stream in trainer.steps.streams.items()}
    drawn = trainer.steps.roll_out(plan, Timer())
    for key, stream in trainer.steps.streams.items():
        stream.load_state_dict(streams[key])
    trainer.steps.engine = engine = Shuffled(trainer.engine)
    again = trainer.steps.roll_out(plan, Timer())
    assert engine.calls == ["generate text image video", "sleep"]
    assert list(again) == list(drawn) == list(plan.assignments)
    rewards = set()
    for assignment, (rollouts, scores) in drawn.items():
        assert scores == trainer.steps.rewards[assignment.source].score(rollouts)
        assert [r.reward for r in rollouts] == [score.total for score in scores]
        assert again[assignment][1] == scores
        groups = [r.request.group for r in rollouts]
        assert groups == sorted(groups)
        assert list(Counter(groups).values()) == [4] * assignment.num_prompts
        for one, two in zip(rollouts, again[assignment][0], strict=True):
            assert one.response_ids_N.tolist() == two.response_ids_N.tolist()
            assert one.request.seed == two.request.seed
            assert one.request.prompt.example.name == two.request.prompt.example.name
        rewards |= {score.total for score in scores}
    assert len(rewards) > 3


def test_mixed_rlvr_is_normalised_over_the_responses_of_all_sources(material, tmp_path, monkeypatch) -> None:
    """With a KL all responses are forwarded: token_mean makes one mean over the tokens of all three domains."""
    objective = {"loss_aggregation": "token_mean", "kl": {"weight": 0.1}}
    config = small_config(*material, tmp_path, method="mixed", objective=objective, rollout={"prompts_per_step": 4})
    trainer = Trainer(build_config(config), tmp_path / "run")
    seen: list[TrainSample] = []
    branch = trainer.branches["mixed"]
    monkeypatch.setattr(branch, "update", lambda samples: seen.extend(samples) or {})
    trainer.steps.run(trainer.schedule.plan(1), Timer())
    assert sorted(a.num_prompts for a in trainer.schedule.plan(1).assignments) == [1, 1, 2]
    num_tokens = sum(s.rollout.num_tokens for s in seen)
    assert [s.token_weight for s in seen] == pytest.approx([1 / num_tokens] * 16)


def test_verification_goes_on_while_the_engine_samples(material, tmp_path, monkeypatch) -> None:
    """The engine holds its last group back until the workers have scored the first."""
    trainer = trainer_of(material, tmp_path)
    submitted = []
    submit = shared_pool().submit
    monkeypatch.setattr(shared_pool(), "submit", lambda jobs: submitted.append(submit(jobs)) or submitted[-1])
    generate = trainer.engine.generate_mixed

    def waiting(requests: Mapping[str, Sequence[RolloutRequest]], sampling: Sampling) -> Iterator:
        for number, found in enumerate(generate(requests, sampling)):
            if number == 5:
                assert len(submitted[0].result(timeout=60)) == 4
            yield found

    monkeypatch.setattr(trainer.engine, "generate_mixed", waiting)
    calls.clear()
    trainer.steps.roll_out(trainer.schedule.plan(1), Timer())
    assert len(submitted) == 6  # the format terms of two groups of three students
    assert set(calls) == {threading.main_thread()}  # a user's own verifier may need it


def test_a_verifier_that_fails_leaves_the_engine_idle(material, tmp_path, monkeypatch) -> None:
    trainer = trainer_of(material, tmp_path)
    monkeypatch.setattr("tests.test_step.own", failing)
    with pytest.raises(UserError, match=r"tests\.test_step:own.*on purpose") as error:
        trainer.steps.roll_out(trainer.schedule.plan(1), Timer())
    trainer.engine.sleep()  # RuntimeError while it samples
    del error  # whose frames would have kept the generator alive


@pytest.mark.parametrize(
    ("sampled_with", "allowed", "fails"), [(4, 0, True), (4, 1, False), (3, 1, True), (6, 1, True)]
)
def test_tokens_of_an_unexpected_version_are_not_trained_on(material, tmp_path, sampled_with, allowed, fails) -> None:
    """The embedded engine is told version ``sampled_with`` while the branches are at 5."""
    trainer = trainer_of(material, tmp_path)
    trainer.steps.config = trainer.config.model_copy(
        update={"rollout": trainer.config.rollout.model_copy(update={"max_staleness": allowed})}
    )
    for branch in trainer.branches.values():
        branch.version = sampled_with
    trainer.steps.sync()
    for branch in trainer.branches.values():
        branch.version = 5
    expected = pytest.raises(RuntimeError, match=f"sampled with version {sampled_with} of 'text', the trainer is at 5")
    with expected if fails else nullcontext():
        trainer.steps.roll_out(trainer.schedule.plan(1), Timer())


def test_the_engine_sleeps_after_it_was_woken_to_measure(material, tmp_path) -> None:
    """Or a merge and its evaluation would share the GPU with it."""
    trainer = trainer_of(material, tmp_path)
    trainer.config = trainer.config.model_copy(update={"eval": trainer.config.eval.model_copy(update={"every": 1})})
    trainer.engine = trainer.steps.engine = engine = Shuffled(trainer.engine)
    trainer.run_dir.mkdir()
    trainer._base_record()
    assert engine.calls == ["generate text"] * 3 + [*PROBES, "sleep"]  # three domains; the branches are still equal
    engine.calls.clear()
    record = trainer.step(trainer.schedule.plan(1))
    assert record["diagnostics"] is not None
    assert record["evaluate"] is not None
    step = ["generate text image video", "sleep"]
    evaluations = [f"generate {name}" for name in ("text", "image", "video") for _ in range(3)]
    assert engine.calls == [*step, *PROBES, *evaluations, "sleep"]
