"""What the engine asks of its host and in which order, with a host that follows a script instead of sglang."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from copd_engine.config import RolloutConfig
from copd_engine.rollout import sglang_engine
from copd_engine.rollout.base import Sampling
from copd_engine.rollout.sglang_engine import SglangEngine
from copd_engine.rollout.sglang_jobs import Answer, EngineDiedError, Job
from copd_engine.rollout.sglang_sync import WeightSender
from copd_engine.types import Rollout, RolloutRequest
from tests.helpers import prompts_of_all_domains, tiny_model


class ScriptedHost:
    """``busy``: how often it refuses to be idle. ``answers``: what each call of ``generate`` gives by job index: a
    text for a failure, None for a token of the current version, an exception that ends the call."""

    def __init__(self, busy: int, answers: list[dict[int, str | EngineDiedError | None]], calls: list[str]) -> None:
        self.busy, self.answers, self.calls = busy, answers, calls
        self.pids: list[int] = []

    def call(self, method: str, *args: Any, **kwargs: Any) -> None:
        self.calls.append(method)
        if method == "flush_cache" and self.busy:
            self.busy -= 1
            raise RuntimeError("refused: requests are running")

    def generate(self, jobs: Sequence[Job], timeout_s: float) -> Iterator[Answer | None]:
        self.calls.append(f"generate {sorted(job.index for job in jobs)}")
        for index, answer in self.answers.pop(0).items():
            yield None
            if isinstance(answer, EngineDiedError):
                raise answer
            if answer is None:
                yield Answer(index, [7], [-1.0], "length", (("a:3", 0, 1),))
            else:
                yield Answer(index, failure=answer)

    def close(self) -> None:
        self.calls.append("close")


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """An engine over hosts that follow a script, its calls, and requests of groups of 3."""

    def build(*answers, busy: int = 0, max_restarts: int = 2):
        calls: list[str] = []
        script = list(answers)
        monkeypatch.setattr(sglang_engine, "IsolatedHost", lambda *args: ScriptedHost(busy, script, calls))
        monkeypatch.setattr(WeightSender, "check", lambda *args: None)
        monkeypatch.setattr(WeightSender, "send", lambda *args: calls.append("send") or 8)
        _, encoder = tiny_model()
        engine = SglangEngine(tmp_path, encoder, RolloutConfig(max_restarts=max_restarts))
        engine.sync("a", {}, 3)
        prompts = prompts_of_all_domains(encoder, 1)
        return engine, calls, [RolloutRequest(prompts[i // 3], i, i // 3) for i in range(6)]

    return build


def generated(engine: SglangEngine, requests: list[RolloutRequest]) -> list[int]:
    rollouts: list[Rollout] = engine.generate("a", requests, Sampling(1.0, 1))
    assert all(rollout.weight_version == 3 for rollout in rollouts)
    return [requests.index(rollout.request) for rollout in rollouts]


def test_sleep_and_new_weights_wait_until_the_scheduler_is_idle(make) -> None:
    """It is busy for a moment after its last answer; told to sleep in that moment it would die."""
    engine, calls, requests = make(dict.fromkeys(range(6)), busy=2)
    engine.sleep()
    assert calls == ["flush_cache"] * 3 + ["release_memory_occupation"]
    calls.clear()
    engine._host.busy = 1
    assert generated(engine, requests) == list(range(6))
    order = ["resume_memory_occupation", "flush_cache", "flush_cache", "send", "generate [0, 1, 2, 3, 4, 5]"]
    assert calls == order


def test_a_failed_request_is_tried_once_more_and_then_dropped_from_its_group(make) -> None:
    first = dict.fromkeys(range(6)) | {1: "out of memory", 4: "too long", 5: "too long"}
    engine, calls, requests = make(first, {1: None, 4: "too long", 5: "too long"})
    assert generated(engine, requests) == [0, 1, 2]  # of the second group one member is left
    assert calls[2:] == ["generate [0, 1, 2, 3, 4, 5]", "generate [1, 4, 5]"]
    stats = engine.stats()
    counts = {name: stats[name] for name in ("num_failed", "num_retried", "num_dropped", "num_skipped_groups")}
    assert counts == {"num_failed": 5, "num_retried": 3, "num_dropped": 2, "num_skipped_groups": 1}
    assert (stats["num_rollouts"], stats["num_tokens"]) == (3, 3)


def test_a_group_of_one_is_kept(make) -> None:
    engine, _, requests = make({0: None})
    assert generated(engine, requests[:1]) == [0]


def test_what_had_no_answer_when_the_engine_died_is_asked_again_after_the_weights(make) -> None:
    engine, calls, requests = make({0: None, 3: None, 1: EngineDiedError("gone")}, {1: None, 2: None, 4: None, 5: None})
    assert generated(engine, requests) == list(range(6))
    assert calls[-4:] == ["close", "flush_cache", "send", "generate [1, 2, 4, 5]"]
    assert engine.stats()["num_starts"] == 2


def test_an_engine_that_dies_again_and_again_ends_the_run(make) -> None:
    died = [{0: EngineDiedError("gone")} for _ in range(3)]
    engine, _, requests = make(*died)
    with pytest.raises(RuntimeError, match="sglang died 3 times in a row: gone"):
        generated(engine, requests)
    engine, _, requests = make(
        {0: None, 1: died[0][0]}, {1: None, 2: died[0][0]}, {2: None, 3: None, 4: None, 5: None}, max_restarts=1
    )
    assert generated(engine, requests) == list(range(6))  # an answer in between starts the count anew
