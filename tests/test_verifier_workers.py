"""Workers that can be killed: limits of time and memory, crashes, threads, forks, and the end of the parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from copd_engine.types import Example
from copd_engine.verifiers import Failures, Limits, WorkerPool, shared_pool, verify_all
from copd_engine.verifiers.pool import Job

sys.path.append(str(Path(__file__).parent))
import worker_jobs as jobs

#: What a load of the machine may add to a time limit.
SLACK_S = 3.0


@pytest.fixture
def pool() -> Iterator[WorkerPool]:
    pool = WorkerPool(2, Limits(cpu_s=0.5, wall_s=1.0))
    yield pool
    pool.close()
    assert pool.pids == []


def echoes(n: int) -> list[Job]:
    return [Job(jobs.echo, (index / 100,)) for index in range(n)]


def row(answer: str, verifier: str = "math") -> Example:
    return Example(uid="row-1", prompt="?", answer=answer, verifier=verifier)


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return condition()


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_scores_come_in_order_and_workers_stay(pool: WorkerPool) -> None:
    assert pool.run([]) == []
    assert pool.pids == []  # started when needed
    assert pool.run(echoes(1)) == [0.0]
    assert len(pool.pids) == 1  # and no more than needed
    assert pool.run(echoes(50)) == [index / 100 for index in range(50)]
    pids = pool.pids
    assert len(pids) == 2
    assert pool.run(echoes(50)[::-1]) == [index / 100 for index in range(50)][::-1]
    assert pool.pids == pids
    assert pool.failures == Failures()


def test_workers_stay_however_large_their_parent_is() -> None:
    """A process begins with its parent's peak of memory; only its own counts."""
    limit = 256 << 20
    ballast = b"x" * limit  # beside what the tests have imported
    assert psutil.Process().memory_info().rss > limit
    pool = WorkerPool(1, Limits(memory_bytes=2 * limit))
    try:
        assert pool.run(echoes(1)) == [0.0]
        pids = pool.pids
        assert pool.run(echoes(3)) == [0.0, 0.01, 0.02]
        assert pool.pids == pids != []
    finally:
        pool.close()
    assert len(ballast) == limit


@pytest.mark.parametrize(
    "job", [Job(jobs.spin, ()), Job(jobs.sleep, (60.0,)), Job(jobs.long_power, ()), Job(jobs.stop_me, ())]
)
def test_a_job_out_of_time_costs_its_own_score_only(pool: WorkerPool, job: Job) -> None:
    pool.run(echoes(4))
    begin = time.monotonic()
    assert pool.run([*echoes(10)[1:], job, *echoes(10)[1:]]) == [*[i / 100 for i in range(1, 10)], 0.0] + [
        i / 100 for i in range(1, 10)
    ]
    assert time.monotonic() - begin < 1.0 + SLACK_S
    assert pool.failures == Failures(timeouts=1)
    assert pool.run(echoes(4)) == [0.0, 0.01, 0.02, 0.03]


def test_what_is_prepared_does_not_count_as_time() -> None:
    pool = WorkerPool(1, Limits(cpu_s=0.3, wall_s=0.3))
    assert pool.run([Job(jobs.echo, (1.0,), prepare=jobs.prepare_slowly)]) == [1.0]
    assert pool.failures == Failures()
    pool.close()


def test_equal_jobs_are_run_once(pool: WorkerPool) -> None:
    assert pool.run([Job(jobs.spin, ()), *echoes(3), Job(jobs.spin, ())]) == [0.0, 0.0, 0.01, 0.02, 0.0]
    assert pool.failures == Failures(timeouts=1)


def test_memory_is_limited(pool: WorkerPool) -> None:
    assert pool.run([Job(jobs.address_space_limit, ()), Job(jobs.core_limit, ())]) == [2 << 30, 0.0]
    assert pool.run([Job(jobs.allocate, (8 << 30,)), *echoes(3)]) == [0.0, 0.0, 0.01, 0.02]
    assert pool.failures == Failures(out_of_memory=1)
    assert pool.run([Job(jobs.allocate, (1 << 20,))]) == [1.0]


def test_a_worker_that_has_grown_is_replaced() -> None:
    pool = WorkerPool(1, Limits(memory_bytes=1 << 30))
    first = pool.run([Job(jobs.pid, ())])
    assert pool.run([Job(jobs.grow, (600 << 20,)), Job(jobs.echo, (0.5,))]) == [1.0, 0.5]
    assert pool.run([Job(jobs.pid, ())]) != first
    assert pool.failures == Failures()
    pool.close()


def test_a_job_that_crashes_gets_one_more_worker(pool: WorkerPool) -> None:
    begin = time.monotonic()
    assert pool.run([Job(jobs.leave, (7,)), Job(jobs.kill_me, ()), *echoes(4)]) == [0.0, 0.0, 0.0, 0.01, 0.02, 0.03]
    assert time.monotonic() - begin < 2 * SLACK_S
    assert pool.failures == Failures(crashes=2)
    assert pool.run(echoes(3)) == [0.0, 0.01, 0.02]


def test_workers_killed_in_between(pool: WorkerPool) -> None:
    pool.run(echoes(10))
    for pid in pool.pids:
        os.kill(pid, signal.SIGKILL)
    assert pool.run(echoes(10)) == [index / 100 for index in range(10)]
    assert pool.failures == Failures()


def test_a_worker_killed_while_it_works() -> None:
    pool = WorkerPool(1, Limits(cpu_s=5.0, wall_s=5.0))
    pool.run(echoes(1))
    first = pool.pids
    killer = threading.Timer(0.3, os.kill, (first[0], signal.SIGKILL))
    killer.start()
    assert pool.run([Job(jobs.sleep, (0.8,))]) == [1.0]
    assert pool.pids != first
    assert pool.failures == Failures()
    pool.close()


def test_an_exception_of_a_job_is_ours_to_see(pool: WorkerPool) -> None:
    with pytest.raises(RuntimeError, match="ZeroDivisionError: on purpose"):
        pool.run([*echoes(3), Job(jobs.fail, ()), Job(jobs.sleep, (0.9,))])
    assert pool.run(echoes(3)) == [0.0, 0.01, 0.02]  # and not what was left of the batch before


def test_workers_that_cannot_start(pool: WorkerPool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho No module named copd_engine >&2\nexit 4\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(RuntimeError, match=r"ended before it was ready \(status 4\): No module named copd_engine"):
        pool.run(echoes(4))
    monkeypatch.undo()
    assert pool.run(echoes(4)) == [0.0, 0.01, 0.02, 0.03]


def test_ctrl_c_is_the_parents(pool: WorkerPool) -> None:
    assert pool.run([Job(jobs.interrupt_me, ())]) == [1.0]
    # The terminal signals the foreground process group; no worker is in it.
    assert all(os.getpgid(pid) != os.getpgid(0) for pid in pool.pids)


def test_a_batch_that_is_interrupted_leaves_the_pool_usable(pool: WorkerPool) -> None:
    pool.run(echoes(4))
    timer = threading.Timer(0.2, signal.raise_signal, (signal.SIGINT,))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        pool.run([Job(jobs.sleep, (0.9,)), Job(jobs.sleep, (0.8,))])
    assert pool.run(echoes(4)) == [0.0, 0.01, 0.02, 0.03]


def test_workers_import_neither_torch_nor_transformers() -> None:
    pytest.importorskip("math_verify")
    reasoning_gym = pytest.importorskip("reasoning_gym")
    entry = reasoning_gym.create_dataset("simple_integration", size=1, seed=0)[0]
    gym = Example(
        uid="g",
        prompt="?",
        answer=entry["answer"],
        verifier="reasoning_gym",
        metadata={"reasoning_gym": {"task": "simple_integration", "task_config": {}, "entry": entry}},
    )
    shared_pool().close()
    assert verify_all([(r"\boxed{1+x}", row("x+1"))]) == verify_all([(entry["answer"], gym)]) == [1.0]
    assert len(shared_pool().pids) == 1
    for name, there in (("math_verify", 1.0), ("reasoning_gym", 1.0), ("torch", 0.0), ("transformers", 0.0)):
        assert shared_pool().run([Job(jobs.has_module, (name,))]) == [there], name
    assert len(shared_pool().pids) == 1


HOSTILE = {
    "tower": "9**9**9**9",
    "tower in LaTeX": r"\boxed{9^{9^{9^{9}}}}",
    "tower of letters": r"\boxed{(x+1)^{(x+2)^{999}}}",
    "long exponent": r"\boxed{9^{999999999}}",
    "expands": r"\boxed{(x+y+z)^{997}(x-y)^{991}-1}",
    "factorial": r"\boxed{(99999999)!}",
    "100 kB of LaTeX": r"\boxed{" + r"\frac{1}{2}+" * 9000 + "1}",
    "100 kB of LaTeX, unmarked": "$" + r"\frac{x}{2}+" * 9000 + "1$",
    "nested": r"\boxed{" + "{" * 400 + "1" + "}" * 400 + "}",
    "nested roots": r"\boxed{" + r"\sqrt{" * 140 + "x" + "}" * 140 + "}",
    "brackets": "(" * 50_000 + "1" + ")" * 50_000,
    "dollars": "$" * 100_000,
    "open boxes": r"\boxed{" * 15_000,
    "digits": "9" * 100_000,
    "integral": r"\boxed{\int_0^\infty \frac{x^{30}\sin(x^3)}{e^{x^2}+\log(x+\tan x)} dx}",
    "sum": r"\boxed{\sum_{n=1}^{99999999} \frac{1}{n^{1.37}}}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_answers_are_wrong_within_five_seconds(name: str) -> None:
    pytest.importorskip("math_verify")
    verify_all([(r"\boxed{1+x}", row("x+1"))])
    begin = time.monotonic()
    assert verify_all([(HOSTILE[name], row("16"))]) == [0.0]
    assert time.monotonic() - begin < 5.0
    begin = time.monotonic()
    assert verify_all([(HOSTILE[name], row("x+1"))]) == [0.0]
    assert time.monotonic() - begin < 5.0
    assert verify_all([(r"\boxed{2+x}", row("x+2"))]) == [1.0]


@pytest.fixture
def short_limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Limits]:
    """Of the shared pool, so that a test of many timeouts does not take a minute."""
    limits = Limits(cpu_s=0.4, wall_s=1.5)
    monkeypatch.setattr(shared_pool(), "limits", limits)
    shared_pool().close()
    yield limits
    shared_pool().close()


def test_sixteen_hostile_answers_cost_the_others_nothing(short_limits: Limits) -> None:
    pytest.importorskip("math_verify")
    batch: list[tuple[str, Example]] = []
    for index in range(64):
        batch.append((rf"so \boxed{{{index}+x}}", row(f"x+{index}")))
        if index % 4 == 0:
            batch.append((rf"\boxed{{(x+y+z)^{{{997 + index}}}(x-y)^{{991}}-1}}", row("x+1")))
    before = shared_pool().failures.timeouts
    begin = time.monotonic()
    scores = verify_all(batch)
    assert sum(scores) == 64
    assert [score for score, (text, _) in zip(scores, batch, strict=True) if "991" in text] == [0.0] * 16
    # All of them take all their time on one worker, which starts again for each.
    assert time.monotonic() - begin < 16 * (short_limits.wall_s + SLACK_S)
    assert shared_pool().failures.timeouts - before <= 16


def test_threads_share_the_pool(pool: WorkerPool) -> None:
    scores: dict[int, list[float]] = {}
    threads = [
        threading.Thread(
            target=lambda n=n: scores.update({n: pool.run([Job(jobs.echo, (n + i / 10,)) for i in range(9)])})
        )
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert scores == {n: [n + i / 10 for i in range(9)] for n in range(4)}
    # Those that a thread started outlive it.
    assert pool.run(echoes(4)) == [0.0, 0.01, 0.02, 0.03]


def test_submitted_batches_are_run_together_beside_the_caller(
    pool: WorkerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that waits for the first is run as one. Equal answers of a batch are compared once, not those of two: which
    batches meet is chance."""
    pool.run(echoes(2))
    sizes = []
    run = pool._run
    monkeypatch.setattr(pool, "_run", lambda payloads: sizes.append(len(payloads)) or run(payloads))
    first = pool.submit([Job(jobs.sleep, (0.5,))])
    assert wait_until(lambda: sizes == [1], 60)
    spins = [Job(jobs.spin, ())]
    later = [pool.submit(batch) for batch in (spins * 2, echoes(3), [], spins)]
    assert not first.done()
    assert [future.result() for future in (first, *later)] == [[1.0], [0.0, 0.0], [0.0, 0.01, 0.02], [], [0.0]]
    assert pool.failures == Failures(timeouts=2)
    assert sizes == [1, 1 + 3 + 1]


def test_a_failure_is_told_to_who_submitted(pool: WorkerPool) -> None:
    with pytest.raises(RuntimeError, match="ZeroDivisionError: on purpose"):
        pool.submit([Job(jobs.fail, ())]).result()
    assert pool.submit(echoes(2)).result() == [0.0, 0.01]


def test_closing_does_not_wait_for_what_was_submitted(pool: WorkerPool) -> None:
    first = pool.submit([Job(jobs.sleep, (0.3 + n / 1000,)) for n in range(200)])
    assert wait_until(lambda: len(pool.pids) == 2, 60)
    second = pool.submit(echoes(2))
    pool.close()
    assert pool.pids == []
    with pytest.raises(RuntimeError, match="workers were ended"):
        first.result(timeout=10)
    assert second.cancelled()
    assert pool.submit(echoes(2)).result() == [0.0, 0.01]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_child_process_has_a_pool_of_its_own(method: str) -> None:
    pytest.importorskip("math_verify")
    verify_all([(r"\boxed{1+x}", row("x+1"))])
    pids = shared_pool().pids
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    child = context.Process(target=jobs.verify_in_child, args=(theirs,))
    child.start()
    assert ours.poll(60)
    its_pids, scores = ours.recv()
    assert scores == [1.0, 0.0]
    assert its_pids
    assert not set(its_pids) & set(pids)
    child.join(30)
    assert child.exitcode == 0
    assert shared_pool().pids == pids
    assert not any(gone(pid) for pid in pids)
    assert verify_all([(r"\boxed{3+x}", row("x+3"))]) == [1.0]


PARENT = """
import sys, time
sys.path.append({tests!r})
from copd_engine.verifiers import shared_pool
from copd_engine.verifiers.pool import Job
import worker_jobs as jobs
pool = shared_pool()
pool.num_workers = 2
pool.run([Job(jobs.echo, (0.1 * i,)) for i in range(8)] + [Job(jobs.sleep, (0.2,)), Job(jobs.sleep, (0.21,))])
print(*pool.pids, flush=True)
{then}
"""


def parent(then: str) -> tuple[subprocess.Popen[str], list[int]]:
    """A process with two workers."""
    script = PARENT.format(tests=str(Path(__file__).parent), then=then)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pids = [int(word) for word in process.stdout.readline().split()]
    assert len(pids) == 2
    assert not any(gone(pid) for pid in pids)
    return process, pids


def test_workers_end_with_their_parent() -> None:
    process, pids = parent("time.sleep(0.5)")
    assert process.wait(30) == 0
    assert wait_until(lambda: all(gone(pid) for pid in pids), 5.0)


@pytest.mark.parametrize(
    "then",
    ["time.sleep(60)", "pool.run([Job(jobs.long_power, ()), Job(jobs.sleep, (60.0,))])"],
    ids=["idle", "busy"],
)
def test_workers_end_when_their_parent_is_killed(then: str) -> None:
    process, pids = parent(then)
    time.sleep(0.5)
    process.kill()
    process.wait()
    # Those at work are ended by their own timers.
    assert wait_until(lambda: all(gone(pid) for pid in pids), Limits().wall_s + SLACK_S)


def test_workers_end_although_a_fork_of_the_dead_parent_holds_their_sockets() -> None:
    process, pids = parent("import os\nchild = os.fork()\nif child: print(child, flush=True)\ntime.sleep(20)")
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.kill()
    process.wait()
    assert wait_until(lambda: all(gone(pid) for pid in pids), 3.0 + SLACK_S)
    assert not gone(child)
    os.kill(child, signal.SIGKILL)
