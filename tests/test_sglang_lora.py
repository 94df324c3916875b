"""The sglang engine with adapters: the common suite, and experts in one running batch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from copd_engine.rollout.base import Sampling
from tests.rollout_suite import RolloutSuite, Subject
from tests.sglang_setup import LORA, MARKS, check_recovery, sglang_subject

pytestmark = MARKS


@pytest.fixture(scope="module")
def subject() -> Iterator[Subject]:
    subject = sglang_subject(LORA)
    yield subject
    subject.engine.close()


class TestSglangLora(RolloutSuite):
    pass


def test_experts_share_one_running_batch(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    host, calls = subject.engine._host, []
    generate = host.generate
    monkeypatch.setattr(host, "generate", lambda jobs, timeout_s: calls.append(jobs) or generate(jobs, timeout_s))
    asked = subject.requests()
    for name, group in subject.engine.generate_mixed({"a": asked, "b": asked[::-1]}, Sampling(1.0, 20)):
        subject.check(name, group)
    assert len(calls) == 1
    assert len({job.lora for job in calls[0]}) == 2


def test_only_the_adapters_travel_and_old_ones_go(subject: Subject) -> None:
    subject.change("a", 41)
    subject.engine.stats()
    subject.check("a", subject.engine.generate("a", subject.requests(), Sampling(1.0, 20)))
    stats = subject.engine.stats()
    assert stats["num_swaps"] == 1
    assert stats["swap_bytes"] == sum(p.nbytes for p in subject.policies["a"].named_parameters().values())
    with pytest.raises(RuntimeError, match="refused unload_lora_adapter"):
        subject.engine._host.call("unload_lora_adapter", f"a:{subject.versions['a'] - 1}")


def test_an_adapter_that_fits_no_layer_is_an_error_before_anything_is_sent(subject: Subject) -> None:
    subject.engine._sender._weights = None
    tensors = dict(subject.policies["a"].named_parameters())
    layer = "model.language_model.layers.9.self_attn.q_proj"
    wrong = {f"{layer}.lora_A.default.weight": torch.zeros(4, 64), f"{layer}.lora_B.default.weight": torch.zeros(64, 4)}
    subject.engine.sync("wrong", tensors | wrong, 0)
    with pytest.raises(ValueError, match=f"sglang.* '{layer}.weight'"):
        subject.engine.generate("wrong", subject.requests(1), Sampling(1.0, 4))
    subject.engine._sender._weights = None
    subject.engine.sync("wrong", {**tensors, "lm_head.weight": torch.zeros(2, 2)}, 0)
    with pytest.raises(ValueError, match=r"only adapters are synced to sglang, not 'lm_head\.weight'"):
        subject.engine.generate("wrong", subject.requests(1), Sampling(1.0, 4))
    subject.check("a", subject.engine.generate("a", subject.requests(), Sampling(1.0, 20)))


def test_adapters_are_loaded_again_after_a_scheduler_has_died(subject: Subject) -> None:
    check_recovery(subject, "a", subject.engine._host.pids[0])
    subject.check("b", subject.engine.generate("b", subject.requests(), Sampling(1.0, 20)))
