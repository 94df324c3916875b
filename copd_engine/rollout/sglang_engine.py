"""The sglang engine: one ``sglang.Engine`` for all experts, its weights swapped in place, or one adapter per expert."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from copd_engine.config import LoraConfig, RolloutConfig
from copd_engine.models.base import PromptEncoder
from copd_engine.rollout.base import RolloutEngine, Sampling
from copd_engine.rollout.sglang_arguments import engine_arguments
from copd_engine.rollout.sglang_experts import split_experts
from copd_engine.rollout.sglang_host import EngineHost
from copd_engine.rollout.sglang_jobs import Answer, EngineDiedError
from copd_engine.rollout.sglang_lora import adapter_config, adapter_tensors, base_weights
from copd_engine.rollout.sglang_process import Host, IsolatedHost
from copd_engine.rollout.sglang_requests import Batch, Entry
from copd_engine.rollout.sglang_sync import WeightSender
from copd_engine.types import Rollout, RolloutRequest

logger = logging.getLogger(__name__)
IDLE_TIMEOUT_S = 60.0
SLEEP_TAGS = ["kv_cache", "weights", "cuda_graph"]
COUNTS = (
    "num_rollouts",
    "num_tokens",
    "num_swaps",
    "swap_bytes",
    "swap_s",
    "generate_s",
    "num_starts",
    "start_s",
    "num_failed",
    "num_retried",
    "num_stale",
    "num_dropped",
    "num_skipped_groups",
)


@dataclass(frozen=True)
class _Weights:
    """An expert's tensors as they were synced; ``changes``: how often each had been written to by then."""

    named_tensors: Mapping[str, torch.Tensor]
    version: int
    changes: tuple[int, ...]

    def check_unchanged(self, expert: str) -> None:
        """RuntimeError when the trainer has written to a tensor since; it would be sent under the wrong version."""
        for (name, tensor), changes in zip(self.named_tensors.items(), self.changes, strict=True):
            if tensor._version != changes:
                raise RuntimeError(f"{name!r} of {expert!r} has changed since its sync as version {self.version}")


class SglangEngine(RolloutEngine):
    """Implements :class:`copd_engine.rollout.base.RolloutEngine` with the package sglang.

    ``folder``: the base model in Hugging Face format, or a hub id, in whose names experts are synced. Without ``lora``
    an expert's weights are swapped in when it is its turn, and ``sync`` only remembers them; with it ``sync`` takes the
    adapters' tensors, and the experts share batches. ``partly_frozen``: not all weights are synced.
    """

    def __init__(
        self,
        folder: Path | str,
        encoder: PromptEncoder,
        config: RolloutConfig,
        dtype: str = "float32",
        device: str = "cpu",
        lora: LoraConfig | None = None,
        num_experts: int = 1,
        partly_frozen: bool = False,
    ) -> None:
        self._encoder = encoder
        self._config = config
        self._lora = lora
        self._device = device
        self._arguments, self._environment = engine_arguments(
            folder, config, dtype, device, lora, num_experts, keep_weights=partly_frozen or lora is not None
        )
        self._sender = WeightSender(Path(folder), config.bucket_mb << 20, config.tensor_parallel)
        self._experts: dict[str, _Weights] = {}
        self._counts: dict[str, float] = dict.fromkeys(COUNTS, 0)
        self._num_failed_starts = 0
        self._forget()
        self._host = self._start()

    # Weights

    def sync(self, expert: str, named_tensors: Mapping[str, torch.Tensor], version: int) -> None:
        """Remember the tensors, without a copy. They must stay as they are until the next sync of ``expert``."""
        tensors = split_experts(named_tensors)
        self._experts[expert] = _Weights(tensors, version, tuple(t._version for t in tensors.values()))

    def _place(self, experts: Sequence[str]) -> None:
        """Bring the engine to the current version of these experts: one, or any number of adapters."""
        for expert in experts:
            weights = self._expert(expert)
            weights.check_unchanged(expert)
            label = f"{expert}:{weights.version}"
            if self._labels.get(expert) == label:
                continue
            begin = time.perf_counter()
            if self._lora is None:
                self._sender.check(self._host, expert, weights.named_tensors)
                self._wait_until_idle()
                self._labels.clear()  # undefined until all is sent
                num_bytes = self._sender.send(self._host, expert, weights.named_tensors, label)
            else:
                num_bytes = self._load_adapter(expert, weights, label, self._lora)
            self._labels[expert] = label
            self._count(num_swaps=1, swap_bytes=num_bytes, swap_s=time.perf_counter() - begin)

    def _load_adapter(self, expert: str, weights: _Weights, label: str, lora: LoraConfig) -> int:
        self._sender.check(self._host, expert, base_weights(weights.named_tensors))
        tensors = adapter_tensors(weights.named_tensors)
        self._host.call("load_lora_adapter_from_tensors", label, tensors, adapter_config(lora))
        if expert in self._labels:
            self._host.call("unload_lora_adapter", self._labels.pop(expert))
        return sum(tensor.nbytes for tensor in tensors.values())

    def _expert(self, expert: str) -> _Weights:
        if expert not in self._experts:
            raise ValueError(f"no expert {expert!r} was synced (known: {', '.join(sorted(self._experts))})")
        return self._experts[expert]

    # Sampling

    def generate(self, expert: str, requests: Sequence[RolloutRequest], sampling: Sampling) -> list[Rollout]:
        found: dict[int, Rollout] = {}
        for group in self._sample({expert: requests}, sampling):
            found |= {entry.index: rollout for entry, rollout in group}
        return [found[index] for index in sorted(found)]

    def generate_mixed(
        self, requests: Mapping[str, Sequence[RolloutRequest]], sampling: Sampling
    ) -> Generator[tuple[str, list[Rollout]], None, None]:
        """Groups of several experts as they finish. With adapters all experts are sampled in one running batch."""
        turns = [requests] if self._lora is not None else [{expert: asked} for expert, asked in requests.items()]
        for turn in turns:
            for group in self._sample(turn, sampling):
                yield group[0][0].expert, [rollout for _, rollout in group]

    def _sample(
        self, requests: Mapping[str, Sequence[RolloutRequest]], sampling: Sampling
    ) -> Iterator[list[tuple[Entry, Rollout]]]:
        """Groups as they finish. An engine that dies on the way is started again with the current weights."""
        batch = Batch(requests, sampling, self._encoder)
        begin = time.perf_counter()
        while batch.waiting:
            try:
                self.wake()
                self._place(list(requests))
                lora = self._labels if self._lora is not None else {}
                for answer in self._host.generate(batch.jobs(lora), self._config.request_timeout_s):
                    if answer is not None:
                        self._num_failed_starts = 0
                        yield from batch.settle(answer, self._rollout(batch, answer))
            except EngineDiedError as error:
                self._restart(error)
        self._count(generate_s=time.perf_counter() - begin, **batch.counts)

    def _rollout(self, batch: Batch, answer: Answer) -> Rollout | None:
        """None for an answer that failed or that comes from weights older than ``max_staleness`` allows."""
        entry = batch.entries[answer.index]
        if answer.failure:
            logger.warning("sglang: a request of %s failed: %s", entry.expert, answer.failure)
            self._count(num_failed=1)
            return None
        current = self._experts[entry.expert].version
        spans: tuple[tuple[int, int, int], ...]
        if self._lora is not None:
            spans = ((current, 0, len(answer.token_ids)),)  # by the adapter's name, which holds its version
        else:
            labels = [label.rpartition(":") for label, _, _ in answer.version_spans]
            known = all(expert == entry.expert and version.isdecimal() for expert, _, version in labels)
            spans = tuple(
                (int(label[2]) if known else -1, start, end)
                for label, (_, start, end) in zip(labels, answer.version_spans, strict=True)
            )
        oldest = min(version for version, _, _ in spans)
        if not current - self._config.max_staleness <= oldest <= current:
            logger.warning("sglang: sampled with %s instead of version %d", answer.version_spans, current)
            self._count(num_stale=1)
            return None
        return batch.rollout(answer, spans)

    # Life of the engine

    def _start(self) -> Host:
        begin = time.perf_counter()
        self._free_cached()
        host: Host
        if self._config.isolate:
            host = IsolatedHost(self._arguments, self._environment, self._config.start_timeout_s)
        else:
            host = EngineHost(self._arguments, self._environment)
        self._count(num_starts=1, start_s=time.perf_counter() - begin)
        return host

    def _restart(self, error: EngineDiedError) -> None:
        """RuntimeError when the engine has died too often without an answer in between."""
        self._num_failed_starts += 1
        if self._num_failed_starts > self._config.max_restarts:
            raise RuntimeError(f"sglang died {self._num_failed_starts} times in a row: {error}") from error
        logger.warning("sglang: %s; starting it again", error)
        self._host.close()
        self._forget()
        try:
            self._host = self._start()
        except EngineDiedError as again:
            self._restart(again)

    def _forget(self) -> None:
        """What the engine held is gone."""
        self._labels: dict[str, str] = {}  # of what the engine holds: one expert's weights, or adapters
        self._asleep = False

    def sleep(self) -> None:
        """On a CPU the memory is kept; the caches are emptied."""
        while not self._asleep:
            try:
                self._wait_until_idle()
                self._host.call("release_memory_occupation", SLEEP_TAGS)
                self._asleep = True
            except EngineDiedError as error:
                self._restart(error)

    def _wait_until_idle(self) -> None:
        """sglang is busy for a moment after its last answer, and longer with what was aborted; a scheduler that is told
        to sleep meanwhile dies, and weights that are replaced meanwhile leave the old ones' cache."""
        deadline = time.monotonic() + IDLE_TIMEOUT_S
        while True:
            try:
                return self._host.call("flush_cache")  # refused while anything runs
            except EngineDiedError:
                raise
            except RuntimeError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def wake(self) -> None:
        if not self._asleep:
            return
        self._free_cached()
        try:
            self._host.call("resume_memory_occupation", SLEEP_TAGS)
            for label in self._labels.values() if self._lora is not None else ():
                self._host.call("unload_lora_adapter", label)
        except EngineDiedError as error:
            self._restart(error)
        self._forget()  # the weights' memory comes back without their values

    def _free_cached(self) -> None:
        """The engine cannot use memory that the trainer's allocator keeps for itself."""
        if torch.device(self._device).type == "cuda":
            torch.cuda.empty_cache()

    def stats(self) -> dict[str, float]:
        """Counts (``num_``), bytes and seconds since the last call."""
        counts, self._counts = self._counts, dict.fromkeys(COUNTS, 0)
        return counts

    def _count(self, **values: float) -> None:
        for name, value in values.items():
            self._counts[name] += value

    def close(self) -> None:
        self._host.close()
        self._sender.close()
        self._experts.clear()
