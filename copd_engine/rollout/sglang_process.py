"""The engine's host in a thin process of its own: whatever sglang does to its process, the trainer lives on."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, Protocol

from copd_engine.rollout.sglang_host import EngineHost, kill_trees
from copd_engine.rollout.sglang_jobs import Answer, EngineDiedError, Job
from copd_engine.types import UserError


class Host(Protocol):
    """What the rollout engine needs of a host; :class:`EngineHost` says what each call does."""

    @property
    def pids(self) -> list[int]: ...

    def call(self, method: str, *args: Any, **kwargs: Any) -> None: ...

    def load(
        self, payload: Sequence[bytes], reply: str, weight_version: str | None = None, flush: bool = False
    ) -> list[dict[str, Any]]: ...

    def generate(self, jobs: Sequence[Job], timeout_s: float) -> Iterator[Answer | None]: ...

    def close(self) -> None: ...


class IsolatedHost:
    """An :class:`EngineHost` in a child process. The same calls and errors; EngineDiedError too when the child ends.

    Tensors do not pass through the child: what it forwards are handles of shared memory, which the schedulers open.
    """

    def __init__(self, arguments: Mapping[str, Any], environment: Mapping[str, str], start_timeout_s: float) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, dict(arguments), dict(environment)))
        self._process.start()
        theirs.close()
        atexit.register(self.close)  # before multiprocessing's own, which waits for children to end
        self._closed = False
        self.pids: list[int] = []
        try:
            self.pids = self._receive(start_timeout_s)
        except BaseException:
            self.close()
            raise

    def call(self, method: str, *args: Any, **kwargs: Any) -> None:
        self._send(("call", (method, *args), kwargs))
        self._receive()

    def load(
        self, payload: Sequence[bytes], reply: str, weight_version: str | None = None, flush: bool = False
    ) -> list[dict[str, Any]]:
        self._send(("load", (list(payload), reply, weight_version, flush), {}))
        answers: list[dict[str, Any]] = self._receive()
        return answers

    def generate(self, jobs: Sequence[Job], timeout_s: float) -> Iterator[Answer | None]:
        self._send(("generate", (list(jobs), timeout_s), {}))
        running = True
        try:
            while running:
                answer = self._receive()
                running = answer is not _END
                if running:
                    yield answer
        except (EngineDiedError, RuntimeError):
            running = False
            raise
        finally:
            if running:  # the caller wants no more
                with suppress(EngineDiedError):
                    self._send(("stop", (), {}))
                    while self._receive() is not _END:
                        pass

    def _send(self, message: object) -> None:
        try:
            self._connection.send(message)
        except OSError:
            raise EngineDiedError(self._end()) from None

    def _receive(self, timeout_s: float | None = None) -> Any:
        """The result of the child's next message; raises the error that it holds."""
        begin = time.monotonic()
        try:
            while not self._connection.poll(1.0):
                if timeout_s is not None and time.monotonic() - begin > timeout_s:
                    raise EngineDiedError(f"sglang did not start within {timeout_s:g} s")
            kind, value = self._connection.recv()
        except (EOFError, OSError):
            raise EngineDiedError(self._end()) from None
        if kind == "result":
            return value
        if kind == "end":
            return _END
        raise _ERRORS[kind](value)

    def _end(self) -> str:
        self._process.join(5)
        return f"the process of sglang ended with code {self._process.exitcode}"

    def close(self) -> None:
        """End the child and, where it cannot do so itself, sglang's processes, by their ids."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        import psutil

        owned = []
        for pid in (self._process.pid, *self.pids):
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                if pid == self._process.pid or process.ppid() in (self._process.pid, 1):
                    owned.append(process)
        self._connection.close()  # the child closes its host at the end of the connection
        self._process.join(10)
        kill_trees(owned)
        self._process.join(10)


class _End:
    pass


_END = _End()
_ERRORS: dict[str, type[Exception]] = {"died": EngineDiedError, "refused": RuntimeError, "user": UserError}


def _serve(connection: Connection, arguments: dict[str, Any], environment: dict[str, str]) -> None:
    """The child: one host, one call at a time, until the connection ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's to handle
    host: EngineHost | None = None
    try:
        try:
            host = EngineHost(arguments, environment)
        except UserError as error:
            connection.send(("user", str(error)))
            return
        except Exception as error:
            connection.send(("died", f"sglang did not start: {error}"))
            return
        connection.send(("result", host.pids))
        while True:
            method, args, kwargs = connection.recv()
            try:
                if method == "generate":
                    for answer in host.generate(*args):
                        connection.send(("result", answer))
                        if connection.poll():
                            connection.recv()  # "stop"
                            break
                    connection.send(("end", None))
                elif method != "stop":  # one that came after the last answer
                    connection.send(("result", getattr(host, method)(*args, **kwargs)))
            except EngineDiedError as error:
                connection.send(("died", str(error)))
            except Exception as error:
                connection.send(("refused", str(error)))
    except (EOFError, OSError):
        pass  # the trainer has closed, or is gone
    finally:
        if host is not None:
            host.close()
        os._exit(0)  # whatever threads sglang has left behind
