"""The process in which answers are compared: ``python -m copd_engine.verifiers.worker FD PARENT LIMITS``.

It imports neither torch nor transformers. It ends when its parent does: idle, it reads the end of the socket (or sees
that it has another parent, where a fork still holds the socket); while it computes, the kernel's timers end it. Those
need no help from Python, which a long integer power never gives a turn.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import resource
import signal
import sys
import traceback
from multiprocessing.connection import Connection

import psutil

from copd_engine.verifiers.pool import BEGIN, OUT_OF_MEMORY

_PARENT_CHECK_S = 1.0


def main(arguments: list[str]) -> None:
    fd, parent, memory_bytes = int(arguments[0]), int(arguments[1]), int(arguments[2])
    cpu_s, wall_s = float(arguments[3]), float(arguments[4])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C belongs to the parent
    for name in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(name, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(ValueError, OSError):  # macOS knows no such limit
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    connection, own = Connection(fd), psutil.Process()
    # A scorer or a warning may print; from here on an error travels through the connection.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            while not connection.poll(_PARENT_CHECK_S):
                if os.getppid() != parent:
                    return
            reply = _compare(connection, connection.recv_bytes(), cpu_s, wall_s)
            connection.send_bytes(json.dumps(reply).encode())
            # sympy keeps what it computed. Leaving is safe here: the parent starts a new worker for the next job.
            # Not ru_maxrss: a process begins with that of its parent, and a trainer's is large.
            if own.memory_info().rss > memory_bytes / 2:
                return


def _compare(connection: Connection, job: bytes, cpu_s: float, wall_s: float) -> dict[str, object]:
    try:
        prepare, function, call = pickle.loads(job)
        if prepare is not None:
            prepare(*call)
        connection.send_bytes(BEGIN)
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        signal.setitimer(signal.ITIMER_REAL, wall_s)
        try:
            return {"score": float(function(*call))}
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0.0)
            signal.setitimer(signal.ITIMER_REAL, 0.0)
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    except Exception:
        # Verifiers turn what a policy wrote into a score; what they do raise is a mistake of ours or of the data.
        return {"error": traceback.format_exc()}


if __name__ == "__main__":
    main(sys.argv[1:])
