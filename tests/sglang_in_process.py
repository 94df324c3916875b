"""``rollout.isolate: false`` in a process of its own, for test_sglang_process.py: prints what happened as JSON.

A bystander, a child that sglang knows nothing of, stands for the trainer's own workers.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import torch

from copd_engine.rollout.base import Sampling
from tests.rollout_suite import ids
from tests.sglang_setup import sglang_subject


def main() -> None:
    torch.set_num_threads(1)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGQUIT, signal.SIGTERM, signal.SIGINT)}
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    subject = sglang_subject(isolate=False)
    asked = subject.requests(8)
    seen = {"during": all(signal.getsignal(n) is handlers[n] for n in (signal.SIGTERM, signal.SIGINT))}
    expected = ids(subject.engine.generate("a", asked, Sampling(1.0, 100)))
    old = subject.engine._host.pids
    found = {}
    for number, group in enumerate(subject.engine.generate_groups("a", asked, Sampling(1.0, 100))):
        if number == 0:
            os.kill(old[0], signal.SIGKILL)
        found[group[0].request.group] = group
    seen["bystander_after_the_scheduler_died"] = bystander.poll() is None
    rollouts = [rollout for number in sorted(found) for rollout in found[number]]
    seen["same_tokens"] = ids(rollouts) == expected
    seen["worst"] = subject.check("a", rollouts)
    seen["num_starts"] = subject.engine.stats()["num_starts"]
    pids = old + subject.engine._host.pids
    subject.engine.close()
    seen["gone"] = not any(os.path.exists(f"/proc/{pid}") for pid in pids)
    seen["bystander_after_close"] = bystander.poll() is None
    seen["after"] = all(signal.getsignal(number) is handler for number, handler in handlers.items())
    bystander.kill()
    print(json.dumps(seen))
