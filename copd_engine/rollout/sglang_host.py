"""The real ``sglang.Engine`` object, hosted in this process so that its failures stay its own.

sglang assumes that it owns the process: its shutdown kills every child of the caller, a dying scheduler sends SIGQUIT
to its parent, whose handler then kills the whole tree. The host ends only sglang's own processes, by their ids, and
takes that signal.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import json
import logging
import multiprocessing
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from copd_engine.rollout.sglang_jobs import Answer, EngineDiedError, Job
from copd_engine.types import UserError

LOADER = "copd_engine.rollout.sglang_worker.load"
HEARTBEAT_S = 0.5


class EngineHost:
    """Starts ``sglang.Engine`` with ``arguments`` under ``environment``; UserError where sglang is not installed.

    Must live in a main thread: only there can the signal of a dying scheduler be taken.
    """

    def __init__(self, arguments: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise UserError("rollout.isolate = false: sglang can run in the main thread only; set it to true")
        os.environ.update(environment)
        signals = {number: signal.getsignal(number) for number in (signal.SIGQUIT, signal.SIGTERM, signal.SIGINT)}
        try:
            from sglang.srt.entrypoints.engine import Engine
        except ImportError as error:
            raise UserError(f"rollout.engine = 'sglang': {error}; install the extra 'sglang'") from None
        import psutil
        from sglang.srt.managers.io_struct import FreezeGCReq, GenerateReqInput, UpdateWeightsFromTensorReqInput

        from copd_engine.rollout.sglang_worker import OurDraws, run_scheduler

        class EngineWithOurSampler(Engine):  # the attribute is sglang's own door for this
            run_scheduler_process_func = staticmethod(run_scheduler)

        self._generate_request = GenerateReqInput
        self._update_request = UpdateWeightsFromTensorReqInput
        self._draws = OurDraws.to_str()
        self._psutil = psutil
        self._closed = False
        before = {child.pid for child in psutil.Process().children()}
        try:
            self._engine = EngineWithOurSampler(**arguments, custom_sigquit_handler=_scheduler_died)
        except BaseException:
            kill_trees([child for child in psutil.Process().children() if child.pid not in before])
            raise
        finally:
            self._restore(signals)
        # Its handlers would end this process: sglang's shutdown and SIGQUIT both kill all children, anybody's.
        atexit.unregister(self._engine.shutdown)
        atexit.register(self.close)
        self._engine.loop.run_until_complete(self._start_listening())
        # On a CPU every flush collects garbage, which without this walks all of sglang's modules; as its server does.
        self._engine.tokenizer_manager._dispatch_to_scheduler(FreezeGCReq())
        self._restore(signals)
        signal.signal(signal.SIGQUIT, _scheduler_died)
        self._signals = signals
        self._processes = [psutil.Process(pid) for pid in self._engine.get_all_child_pids()]
        self._num_ranks = int(arguments.get("tp_size", 1))

    async def _start_listening(self) -> None:
        """Start sglang's reader of answers, which installs handlers of its own for signals, and take those away."""
        self._engine.tokenizer_manager.auto_create_handle_loop()
        for number in (signal.SIGQUIT, signal.SIGTERM):
            # uvloop removes them only while it runs, and says so in a return value
            if not asyncio.get_running_loop().remove_signal_handler(number):
                raise RuntimeError(f"sglang's handler of {signal.Signals(number).name} cannot be removed")

    @staticmethod
    def _restore(signals: Mapping[signal.Signals, Any]) -> None:
        for number, handler in signals.items():
            signal.signal(number, handler)

    @property
    def pids(self) -> list[int]:
        """Ids of sglang's own processes."""
        return [process.pid for process in self._processes]

    def check_alive(self) -> None:
        """EngineDiedError when one of sglang's processes has ended."""
        for process in self._processes:
            with suppress(self._psutil.NoSuchProcess):
                if process.is_running() and process.status() != self._psutil.STATUS_ZOMBIE:
                    continue
            raise EngineDiedError(f"process {process.pid} of sglang has ended")

    def call(self, method: str, *args: Any, **kwargs: Any) -> None:
        """A method of ``sglang.Engine``. RuntimeError where it answers that it failed, EngineDiedError when it is gone.

        sglang answers ``(False, message)``, with more values after them in some calls, or an object with ``success``.
        """
        answer = self._run(lambda: getattr(self._engine, method)(*args, **kwargs))
        success, message = True, ""
        if isinstance(answer, tuple) and answer and isinstance(answer[0], bool):
            success, message = answer[0], str(answer[1])
        elif hasattr(answer, "success"):
            success, message = bool(answer.success), str(getattr(answer, "error_message", None) or answer)
        if not success:
            raise RuntimeError(f"sglang refused {method}: {message}")

    def load(
        self, payload: Sequence[bytes], reply: str, weight_version: str | None = None, flush: bool = False
    ) -> list[dict[str, Any]]:
        """Hand tensors to the loader in the schedulers; its answers by rank. RuntimeError where it failed.

        ``reply``: path of the files that the loader writes, to which it appends the rank.
        """
        request = self._update_request(
            serialized_named_tensors=list(payload), load_format=LOADER, flush_cache=flush, weight_version=weight_version
        )
        manager = self._engine.tokenizer_manager
        success, message = self._run(
            lambda: self._engine.loop.run_until_complete(manager.update_weights_from_tensor(request, None))
        )
        if not success:
            raise RuntimeError(f"sglang refused the weights: {message}")
        answers = []
        for rank in range(self._num_ranks):
            path = Path(f"{reply}.{rank}")
            answers.append(json.loads(path.read_text()))
            path.unlink()
            if "error" in answers[-1]:
                raise RuntimeError(f"sglang could not load the weights: {answers[-1]['error']}")
        return answers

    def generate(self, jobs: Sequence[Job], timeout_s: float) -> Iterator[Answer | None]:
        """Answers as they come, and None now and then while there are none.

        sglang goes on sampling between the calls of ``next``. EngineDiedError when a process of sglang has ended; what
        has no answer by then has none. A job that takes longer than ``timeout_s`` from now is aborted and fails.
        """
        loop = self._engine.loop
        ids = {job.index: uuid.uuid4().hex for job in jobs}
        tasks = {loop.create_task(self._sample(job, ids[job.index])): job.index for job in jobs}
        deadline = time.monotonic() + timeout_s
        try:
            while tasks:
                self.check_alive()
                wait = asyncio.wait(tasks, timeout=HEARTBEAT_S, return_when=asyncio.FIRST_COMPLETED)
                done, _ = self._run(functools.partial(loop.run_until_complete, wait))
                if not done:
                    yield None
                for task in done:
                    yield self._answer(tasks.pop(task), task)
                if time.monotonic() > deadline:
                    for index in self._abort(tasks, ids):
                        yield Answer(index, failure=f"no answer within {timeout_s:g} s")
        finally:
            if tasks:
                self._abort(tasks, ids)

    async def _sample(self, job: Job, request_id: str) -> dict[str, Any]:
        request = self._generate_request(
            input_ids=job.input_ids,
            sampling_params=dict(job.sampling),
            image_data=_processed(job.images),
            video_data=_processed(job.videos),
            return_logprob=True,
            custom_logit_processor=self._draws,
            lora_path=job.lora,
            rid=request_id,
        )
        return await anext(self._engine.tokenizer_manager.generate_request(request, None))

    @staticmethod
    def _answer(index: int, task: asyncio.Task[dict[str, Any]]) -> Answer:
        error = task.exception()
        if error is not None:
            return Answer(index, failure=f"{type(error).__name__}: {error}")
        output = task.result()
        meta = output["meta_info"]
        if meta["finish_reason"]["type"] == "abort":
            return Answer(index, failure=str(meta["finish_reason"].get("message", "aborted")))
        spans = tuple((span["version"], span["start"], span["end"]) for span in meta["weight_versions"])
        logp = [entry[0] for entry in meta["output_token_logprobs"]]
        return Answer(index, list(output["output_ids"]), logp, meta["finish_reason"]["type"], spans)

    def _abort(self, tasks: dict[asyncio.Task[dict[str, Any]], int], ids: Mapping[int, str]) -> list[int]:
        """Stop what is running; empties ``tasks`` and returns the indices they had."""
        indices = list(tasks.values())
        for task, index in tasks.items():
            self._engine.tokenizer_manager.abort_request(rid=ids[index])
            task.cancel()
        with suppress(RuntimeError):  # the loop stops when the engine is dead
            self._engine.loop.run_until_complete(asyncio.wait(tasks, timeout=HEARTBEAT_S))
        tasks.clear()
        return indices

    def _run(self, function: Callable[[], Any]) -> Any:
        """``function``, which runs sglang's event loop. The loop is stopped when a process of sglang ends: no answer
        would ever come."""
        self.check_alive()
        watch = self._engine.loop.create_task(self._watch())
        try:
            return function()
        except RuntimeError:
            self.check_alive()
            raise
        finally:
            watch.cancel()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            try:
                self.check_alive()
            except EngineDiedError:
                self._engine.loop.stop()
                return

    def close(self) -> None:
        """End sglang's own processes, by their ids, and nobody else's; put the signal handlers back."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        manager = self._engine.tokenizer_manager
        manager._subprocess_watchdog.stop()
        self._engine.send_to_rpc.close(linger=0)
        kill_trees(self._processes)
        for task in manager.asyncio_tasks:
            task.cancel()
        with suppress(RuntimeError):
            self._engine.loop.run_until_complete(asyncio.sleep(0))
        if manager.mm_processor is not None:
            manager.mm_processor.shutdown()
        self._restore(self._signals)


def kill_trees(processes: Sequence[Any]) -> None:
    """Kill these psutil processes and what they started, and wait until they are gone."""
    import psutil

    doomed = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            doomed += [process, *process.children(recursive=True)]
    for process in doomed:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    multiprocessing.active_children()  # collects those that are our children
    psutil.wait_procs(doomed, timeout=60)


def _processed(arrays: Mapping[str, np.ndarray] | None) -> list[dict[str, Any]] | None:
    """Pixel inputs in the form in which sglang takes them as they are, without decoding or resizing anything."""
    if arrays is None:
        return None
    return [{"format": "processor_output", **{name: torch.from_numpy(array) for name, array in arrays.items()}}]


def _scheduler_died(signum: int, frame: object) -> None:
    """For SIGQUIT, which a failing scheduler sends to its parent. The host finds out by its processes."""
    logging.getLogger(__name__).error("a process of sglang failed")
