"""The sglang engine, full weights: the common suite, hazards of weight updates, faults. One engine for the module."""

from __future__ import annotations

from collections.abc import Iterator

import psutil
import pytest
import torch

from copd_engine.rollout import sglang_sync
from copd_engine.rollout.base import Sampling
from copd_engine.rollout.sglang_weights import as_payload, as_tensor, buckets, word_sum
from copd_engine.types import Rollout
from tests.rollout_suite import RolloutSuite, Subject, ids
from tests.sglang_setup import MARKS, check_recovery, sglang_subject

pytestmark = MARKS
QUERY = "model.language_model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def subject() -> Iterator[Subject]:
    subject = sglang_subject()
    yield subject
    subject.engine.close()


class TestSglang(RolloutSuite):
    pass


def some(subject: Subject, expert: str = "a") -> list[Rollout]:
    return subject.engine.generate(expert, subject.requests(1), Sampling(1.0, 12))


def test_an_expert_is_swapped_in_once_and_only_when_it_has_changed(subject: Subject) -> None:
    some(subject, "b")
    subject.engine.stats()
    for _ in range(2):
        some(subject, "a")
    stats = subject.engine.stats()
    size = sum(p.nbytes for p in subject.policies["a"].named_parameters().values())
    assert stats["num_swaps"] == 1
    assert size <= stats["swap_bytes"] < 1.1 * size
    assert 0 < stats["swap_s"] < stats["generate_s"]
    assert stats["num_rollouts"] == 2 * len(subject.prompts)
    assert subject.engine.stats()["num_swaps"] == 0


def test_weights_in_many_buckets(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject.engine._sender, "_bucket_bytes", 64 << 10)
    subject.change("a", 21)
    subject.check("a", some(subject))


def test_a_name_that_sglang_does_not_know_is_an_error_before_anything_is_sent(subject: Subject) -> None:
    # sglang itself says success.
    host = subject.engine._host
    host.call("begin_weight_update")
    host.call("update_weights_from_tensor", [("model.language_model.layers.0.nothing.weight", torch.zeros(3))])
    host.call("end_weight_update")

    tensors = dict(subject.policies["a"].named_parameters())
    before = ids(some(subject))
    subject.engine.stats()
    subject.engine.sync("typo", {**tensors, QUERY + "s": torch.zeros(3)}, 0)
    with pytest.raises(ValueError, match=rf"weights of 'typo': unknown name .*did you mean '{QUERY}'"):
        some(subject, "typo")
    subject.engine._sender._weights = None  # the first sync of all asks the engine itself
    with pytest.raises(ValueError, match=rf"sglang's model has no weight .*did you mean '{QUERY}'"):
        some(subject, "typo")
    subject.engine._sender.check(host, "a", tensors)
    subject.engine.sync("less", {name: t for name, t in tensors.items() if name != QUERY}, 0)
    with pytest.raises(ValueError, match=f"weights of 'less': '{QUERY}' is missing"):
        some(subject, "less")
    assert ids(some(subject)) == before
    assert subject.engine.stats()["swap_bytes"] == 0


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("shape", [(65, 64), (64, 64, 1), (32, 64)])
def test_a_wrong_shape_is_an_error_and_the_scheduler_lives(
    subject: Subject, first: bool, shape: tuple[int, ...]
) -> None:
    some(subject)
    pids = subject.engine._host.pids
    subject.engine._sender._weights = None
    if not first:
        subject.engine._sender.check(subject.engine._host, "a", subject.policies["a"].named_parameters())
    subject.engine.sync("wrong", {**subject.policies["a"].named_parameters(), QUERY: torch.zeros(shape)}, 0)
    with pytest.raises(ValueError, match=r"shape \[.*q_proj|q_proj.* shape \["):
        some(subject, "wrong")
    subject.check("a", some(subject))
    assert subject.engine._host.pids == pids
    assert all(psutil.Process(pid).is_running() for pid in pids)


def test_a_refusal_that_sglang_only_returns_is_raised(subject: Subject) -> None:
    host = subject.engine._host
    with pytest.raises(RuntimeError, match="refused end_weight_update: no weight-update session is open"):
        host.call("end_weight_update")
    payload = as_payload({"request": as_tensor({"operation": "sums", "reply": "/nowhere"})}, 1)
    with pytest.raises(RuntimeError, match=r"refused the weights: .*must run between begin_weight_update"):
        host.load(payload, "/nowhere")
    host.call("begin_weight_update")
    with pytest.raises(RuntimeError, match="refused begin_weight_update: a weight-update session is already open"):
        host.call("begin_weight_update")
    host.call("end_weight_update")
    subject.check("a", some(subject))


def test_weights_that_change_on_the_way_are_noticed(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """A buffer that is filled again while the engine still copies looks like this."""

    def overwritten(*args):
        for bucket in buckets(*args):
            bucket.flat[100] ^= 1
            yield bucket

    subject.change("a", 31)
    monkeypatch.setattr(sglang_sync, "buckets", overwritten)
    with pytest.raises(RuntimeError, match="weights of 'a' arrived at sglang with other values"):
        some(subject)
    monkeypatch.undo()
    subject.check("a", some(subject))


def test_a_parameter_that_does_not_hold_what_was_sent_is_noticed(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject.change("a", 32)
    ask = subject.engine._sender._ask

    def skipping(host, request, tensors=None, label=None):
        if request["operation"] == "load":  # pretend to have loaded what was never loaded
            entries = [entry for entry in request["tensors"] if entry[0] != QUERY]
            answers = ask(host, {**request, "tensors": entries}, tensors, label)
            answers[0]["sums"][QUERY] = sent[QUERY]
            return answers
        return ask(host, request, tensors, label)

    sent = {QUERY: word_sum(subject.policies["a"].named_parameters()[QUERY])}
    monkeypatch.setattr(subject.engine._sender, "_ask", skipping)
    with pytest.raises(RuntimeError, match=r"layers.0.self_attn.qkv_proj.weight' does not hold what was sent for 'a'"):
        some(subject)
    monkeypatch.undo()
    subject.check("a", some(subject))


def test_weights_that_changed_without_a_sync_are_not_sent(subject: Subject) -> None:
    some(subject, "b")
    with torch.no_grad():
        subject.policies["a"].named_parameters()[QUERY].add_(0.01)
    with pytest.raises(RuntimeError, match=f"'{QUERY}' of 'a' has changed since its sync as version"):
        some(subject)
    subject.change("a", 0, scale=0.0)
    subject.check("a", some(subject))


def test_tokens_of_an_unexpected_version_are_never_returned(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    some(subject)
    subject.engine.stats()
    version = subject.versions["a"]
    label = f"a:{version + 1}"
    monkeypatch.setitem(subject.engine._labels, "a", label)  # as if the new weights were there already
    subject.engine.sync("a", subject.policies["a"].named_parameters(), version + 1)
    assert some(subject) == []
    stats = subject.engine.stats()
    count = len(subject.prompts)
    assert (stats["num_stale"], stats["num_retried"], stats["num_dropped"]) == (2 * count, count, count)
    assert stats["num_skipped_groups"] == count
    monkeypatch.setattr(subject.engine, "_config", subject.engine._config.model_copy(update={"max_staleness": 1}))
    assert {rollout.weight_version for rollout in some(subject)} == {version}
    subject.engine.sync("a", subject.policies["a"].named_parameters(), version)


def test_a_request_that_takes_too_long_is_tried_again_and_then_dropped(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    some(subject)
    subject.engine.stats()
    config = subject.engine._config
    monkeypatch.setattr(subject.engine, "_config", config.model_copy(update={"request_timeout_s": 0.001}))
    asked = subject.requests(8)
    left = subject.engine.generate("a", asked, Sampling(1.0, 200))
    stats = subject.engine.stats()
    assert stats["num_dropped"] > 0
    assert stats["num_retried"] >= stats["num_dropped"]
    assert stats["num_rollouts"] == len(left) < len(asked)
    monkeypatch.setattr(subject.engine, "_config", config)
    subject.check("a", some(subject))


def test_a_caller_that_wants_no_more_stops_the_rest(subject: Subject) -> None:
    groups = subject.engine.generate_groups("a", subject.requests(4), Sampling(1.0, 200))
    next(groups)
    groups.close()
    subject.check("a", some(subject))


def test_an_engine_that_dies_is_replaced_and_the_step_goes_on(subject: Subject) -> None:
    """The host itself is killed in the middle of a call; its schedulers go with it."""
    check_recovery(subject, "a", subject.engine._host._process.pid)
