"""Functions that tests send to verifier workers, which find them by the name of this module.

It is no part of ``tests``: other packages have installed a package of that name.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time

from copd_engine.types import Example
from copd_engine.verifiers import shared_pool, verify_all


def echo(value: float) -> float:
    return value


def has_module(*names: str) -> float:
    return float(any(name in sys.modules for name in names))


def sleep(seconds: float) -> float:
    time.sleep(seconds)
    return 1.0


def prepare_slowly(value: float) -> None:
    time.sleep(0.8)


def spin() -> float:
    while True:
        pass


def long_power() -> float:
    """One operation in C that holds the interpreter's lock."""
    return float(len(str(9**9**9 % 7)))


def allocate(num_bytes: int) -> float:
    return float(len(bytearray(num_bytes)) > 0)


kept: list[bytearray] = []


def grow(num_bytes: int) -> float:
    """Touches the memory and keeps it, as sympy keeps what it computed."""
    kept.append(bytearray(b"x") * num_bytes)
    return float(kept[-1][-1] == ord("x"))


def address_space_limit() -> float:
    return float(resource.getrlimit(resource.RLIMIT_AS)[0])


def core_limit() -> float:
    return float(resource.getrlimit(resource.RLIMIT_CORE)[0])


def pid() -> float:
    return float(os.getpid())


def leave(status: int) -> float:
    os._exit(status)


def kill_me() -> float:
    os.kill(os.getpid(), signal.SIGKILL)
    return 1.0


def stop_me() -> float:
    """A stopped process has no timers that could end it."""
    os.kill(os.getpid(), signal.SIGSTOP)
    return 1.0


def fail() -> float:
    raise ZeroDivisionError("on purpose")


def interrupt_me() -> float:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.05)
    return 1.0


def verify_in_child(connection: object) -> None:
    """For a forked or spawned process: the pids of its own workers, and what they say."""
    row = Example(uid="row", prompt="?", answer="x+1", verifier="math")
    scores = verify_all([(r"\boxed{1+x}", row), (r"\boxed{2+x}", row)])
    connection.send((shared_pool().pids, scores))  # type: ignore[attr-defined]
