"""One expert's weights into a running sglang engine: begin, buckets, read back, end."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from copd_engine.rollout.sglang_process import Host
from copd_engine.rollout.sglang_weights import (
    KeptBuffers,
    WeightList,
    as_payload,
    as_tensor,
    buckets,
    checkpoint_shapes,
)


class WeightSender:
    """Sends full weights in place, in buckets of ``bucket_bytes``, to ``num_ranks`` tensor-parallel ranks.

    ``model``: the folder that the engine is started from.
    """

    def __init__(self, model: Path, bucket_bytes: int, num_ranks: int) -> None:
        self._model = model
        self._bucket_bytes = bucket_bytes
        self._num_ranks = num_ranks
        self._weights: WeightList | None = None
        self._buffers = KeptBuffers()
        self._folder = tempfile.TemporaryDirectory(prefix="copd-sglang-")
        self._numbers = itertools.count()

    def check(self, host: Host, expert: str, named_tensors: Mapping[str, torch.Tensor]) -> WeightList:
        """Compare names, shapes and dtypes with the engine's own list. ValueError for what it would not take."""
        if self._weights is None:
            shapes = [(name, list(tensor.shape)) for name, tensor in named_tensors.items()]
            host.call("begin_weight_update")
            try:
                answers = self._ask(host, {"operation": "describe", "tensors": shapes})
            finally:
                host.call("end_weight_update")
            self._weights = WeightList.from_answers(answers, named_tensors, checkpoint_shapes(self._model))
        self._weights.check(expert, named_tensors)
        return self._weights

    def send(self, host: Host, expert: str, named_tensors: Mapping[str, torch.Tensor], label: str) -> int:
        """Replace the engine's weights; from now on it stamps what it samples with ``label``. Returns bytes sent.

        RuntimeError when the engine refuses, or holds something else than was sent; its weights are then undefined.
        """
        weights = self.check(host, expert, named_tensors)  # before anything is sent
        num_bytes = 0
        sums: dict[str, int] = {}
        host.call("begin_weight_update")
        try:
            for bucket in buckets(named_tensors, weights, self._bucket_bytes, self._buffers):
                request = {"operation": "load", "tensors": bucket.entries}
                answers = self._ask(host, request, {"bucket": bucket.flat})
                if any(answer["sums"] != bucket.sums for answer in answers):
                    raise RuntimeError(f"weights of {expert!r} arrived at sglang with other values than were sent")
                num_bytes += bucket.flat.numel()
                sums |= bucket.sums
                if bucket.flat.is_cuda:
                    del bucket
                    torch.cuda.ipc_collect()
            held = self._ask(host, {"operation": "sums"}, label=label)
        finally:
            host.call("end_weight_update")
        self._compare(expert, weights.expected_sums(sums), held)
        return num_bytes

    def _compare(self, expert: str, expected: Mapping[str, int], answers: list[dict[str, Any]]) -> None:
        for parameter, value in expected.items():
            held = [answer["sums"].get(parameter, 0) for answer in answers]
            # A rank holds its part of a parameter or all of it.
            whole = all(part == value for part in held)
            if not whole and sum(held) % (1 << 64) != value and not self._replicated_in_part(parameter, answers):
                raise RuntimeError(f"sglang's {parameter!r} does not hold what was sent for {expert!r}")

    def _replicated_in_part(self, parameter: str, answers: list[dict[str, Any]]) -> bool:
        """With more ranks than key-value heads a fused projection is cut for the queries and copied for the rest."""
        return len(answers) > 1 and "qkv" in parameter

    def _ask(
        self,
        host: Host,
        request: dict[str, Any],
        tensors: Mapping[str, torch.Tensor] | None = None,
        label: str | None = None,
    ) -> list[dict[str, Any]]:
        """Answers by rank of the loader in the schedulers. With a ``label`` the caches of the old weights are dropped
        and the label becomes the weight version."""
        reply = str(Path(self._folder.name, str(next(self._numbers))))
        named = {"request": as_tensor(request | {"reply": reply}), **(tensors or {})}
        return host.load(as_payload(named, self._num_ranks), reply, label, label is not None)

    def close(self) -> None:
        self._folder.cleanup()
