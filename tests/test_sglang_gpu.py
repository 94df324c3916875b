"""What only a GPU can show of the sglang engine: CUDA IPC, the memory saver, deterministic kernels, tensor parallelism.

Not run yet.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from copd_engine.rollout.base import Sampling
from tests.rollout_suite import RolloutSuite, Subject, ids
from tests.sglang_setup import LORA, MARKS, sglang_subject

pytestmark = [*MARKS, pytest.mark.gpu]
BF16_TOLERANCE = 0.15  # of a log-prob, against fp32 arithmetic on the same bf16 weights


@pytest.fixture(scope="module")
def subject() -> Iterator[Subject]:
    subject = sglang_subject(device="cuda", dtype="bfloat16", deterministic=True, memory_fraction=0.3)
    subject.tolerance = BF16_TOLERANCE
    yield subject
    subject.engine.close()


class TestSglangOnGpu(RolloutSuite):
    """Weights travel as CUDA IPC handles; deterministic kernels make a draw independent of the batch."""


def test_sleep_gives_the_gpu_memory_back(subject: Subject) -> None:
    before = ids(subject.engine.generate("a", subject.requests(), Sampling(1.0, 20)))
    awake, total = torch.cuda.mem_get_info()
    subject.engine.sleep()
    asleep, _ = torch.cuda.mem_get_info()
    assert asleep - awake > 0.2 * total  # of the 0.3 that the engine may take
    assert ids(subject.engine.generate("a", subject.requests(), Sampling(1.0, 20))) == before


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("lora", [None, LORA])
def test_two_ranks_sample_the_same_policy(lora) -> None:
    subject = sglang_subject(lora, device="cuda", dtype="bfloat16", tensor_parallel=2, memory_fraction=0.3)
    subject.tolerance = BF16_TOLERANCE
    try:
        for seed in (1, 2):
            subject.change("a", seed)
            subject.check("a", subject.engine.generate("a", subject.requests(), Sampling(1.0, 20)))
    finally:
        subject.engine.close()
