"""The kernel benchmark's own parts. Nothing here asserts a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench_kernels, measure, problem, tables
from benchmarks.peers import OURS, PEERS, YARDSTICK, select
from benchmarks.worker import PeerError, Worker

SHAPE = (64, 48, 384)
# They need nothing but torch.
AT_HAND = ("copd", "naive", "torch-lce")
# bf16: the naive form rounds its logits.
BOUNDS = {"fp32": 5e-5, "bf16": 0.1}


@pytest.mark.parametrize("dtype", problem.DTYPES)
@pytest.mark.parametrize(
    ("task", "name"), [(task, name) for task in problem.TASKS for name in AT_HAND if task in PEERS[name].tasks]
)
def test_adapter_agrees_with_fp64(task: str, name: str, dtype: str) -> None:
    inputs = problem.make(task, SHAPE, problem.DTYPES[dtype])
    call = PEERS[name].tasks[task](inputs)
    for _ in range(2):  # a second call sees nothing that the first left behind
        outputs = call()
        errors = {
            key: problem.relative_error(found.detach(), exact)
            for key, found, exact in zip(problem.OUTPUTS[task], outputs, problem.truth(inputs), strict=True)
            if found is not None
        }
        assert errors
        assert max(errors.values()) < BOUNDS[dtype], errors


def test_yardstick_takes_every_product_of_all_tokens() -> None:
    # More than one chunk of 512, the last one short.
    inputs = problem.make("grpo", (1032, 16, 40), torch.float32)
    grad_hidden_TD, grad_weight_VD = PEERS[YARDSTICK].tasks["grpo"](inputs)()
    hidden_TD, weight_VD = inputs.hidden_TD.detach(), inputs.weight_VD.detach()
    logits_TV = hidden_TD @ weight_VD.T
    torch.testing.assert_close(grad_hidden_TD, logits_TV @ weight_VD, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grad_weight_VD, logits_TV.T @ hidden_TD, rtol=1e-4, atol=1e-3)


def test_truth_of_grpo_is_the_surrogate_in_fp64() -> None:
    inputs = problem.make("grpo", SHAPE, torch.float32)
    hidden_TD = inputs.hidden_TD.detach().double().requires_grad_()
    weight_VD = inputs.weight_VD.detach().double().requires_grad_()
    logp_T = (hidden_TD @ weight_VD.T).log_softmax(-1).gather(-1, inputs.target_T[:, None])[:, 0]
    loss = problem.surrogate(logp_T, inputs)
    for found, exact in zip(torch.autograd.grad(loss, (hidden_TD, weight_VD)), problem.truth(inputs), strict=True):
        assert problem.relative_error(found, exact) < 1e-6


def test_inputs_have_the_gap_asked_for_and_some_clipped_tokens(tmp_path: Path) -> None:
    inputs = problem.make("reverse_kl", (64, 256, 2048), torch.float32, gap=0.1)
    student_TV = inputs.hidden_TD.detach() @ inputs.weight_VD.detach().T
    teacher_TV = inputs.teacher[0] @ inputs.teacher[1].T
    assert float((student_TV - teacher_TV).std()) == pytest.approx(0.1, rel=0.1)

    inputs = problem.make("grpo", (512, 64, 512), torch.float32)
    inputs.save(tmp_path / "problem.pt")
    inputs = problem.load(tmp_path / "problem.pt")
    logp_T = (inputs.hidden_TD @ inputs.weight_VD.T).log_softmax(-1).gather(-1, inputs.target_T[:, None])[:, 0]
    ratio_T = (logp_T - inputs.policy[1]).exp()
    outside_T = (ratio_T < 0.8) | (ratio_T > 1.28)
    assert 0.1 < float(outside_T.float().mean()) < 0.3
    assert not bool(((ratio_T > 0.75) & (ratio_T < 0.85)).any())
    assert not bool(((ratio_T > 1.2) & (ratio_T < 1.4)).any())


def test_memory_sees_a_buffer_that_is_kept_and_one_that_is_freed() -> None:
    size = 64 * measure.MIB
    kept, extra, _ = measure.extra_bytes(lambda: torch.ones(size, dtype=torch.uint8))
    assert kept.numel() == size
    assert 0.9 * size < extra < 1.5 * size
    freed, extra, method = measure.extra_bytes(lambda: float(torch.ones(size // 4).sum()))
    assert freed == size // 4
    # The fall-back knows the process's peak only, which the first buffer has set already.
    assert 0.9 * size < extra < 1.5 * size or method != "VmHWM"


@pytest.fixture
def problem_file(tmp_path: Path) -> Path:
    path = tmp_path / "problem.pt"
    problem.make("reverse_kl", SHAPE, torch.float32).save(path)
    return path


@pytest.fixture
def workers() -> Iterator[list[Worker]]:
    started: list[Worker] = []
    yield started
    for worker in started:
        worker.close()


def test_peer_that_fails_hangs_or_is_killed_is_an_error_with_its_reason(
    problem_file: Path, workers: list[Worker]
) -> None:
    # CCE has no reverse KL.
    workers.append(Worker("cce", problem_file, threads=1, device="cpu", limit_s=60))
    with pytest.raises(PeerError, match="KeyError: 'reverse_kl'"):
        workers[0].ask(do="check", truth=None)
    workers.append(Worker("naive", problem_file, threads=1, device="cpu", limit_s=0.01))
    with pytest.raises(PeerError, match="took longer than 0 s"):
        workers[1].ask(do="check", truth=None)
    workers.append(Worker("naive", problem_file, threads=1, device="cpu", limit_s=60))
    workers[2].process.kill()
    with pytest.raises(PeerError, match="killed, out of memory"):
        workers[2].ask(do="check", truth=None)


def test_unknown_peer_is_named_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert select([]) == list(PEERS)
    assert select(["trl", "naive", "trl"]) == ["trl", "naive"]
    with pytest.raises(ValueError, match=r"no peer 'ligr': choose from .*; did you mean 'liger'"):
        select(["ligr"])
    with pytest.raises(SystemExit):
        bench_kernels.main(["--peers", "ligr"])
    assert "no peer 'ligr'" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_cuda_without_a_gpu_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench_kernels.main(["--device", "cuda"])
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("bench_kernels: --device cuda needs a CUDA GPU")
    assert error.count("\n") == 1


def _row(peer: str, seconds: list[float], **fields: Any) -> dict[str, Any]:
    return {"peer": peer, "version": "1", "seconds": seconds, "extra_bytes": 50 * 10**6, "errors": {}, **fields}


def _record(**fields: Any) -> dict[str, Any]:
    rows = [
        _row(YARDSTICK, [2.0, 1.0, 9.0]),
        _row(OURS, [1.0, 1.2, 0.8], errors={"dH": 1.7e-3, "dW": 1.6e-3}, close_errors={"dH": 1.8e-3}),
        _row("naive", [4.0, 4.0, 4.0], errors={"dH": 5e-2, "dW": 5e-2}, close_errors={"dH": 0.6}),
        {"peer": "liger", "version": None, "failure": "liger-kernel is not installed"},
        {"peer": "cce", "version": "2", "failure": "not its task: x | y"},
    ]
    table = {"task": "reverse_kl", "dtype": "bf16", "shape": [2048, 1024, 32768], "rows": rows}
    table |= {"floor": {"dH": 1.6e-3}, "close_floor": {}}
    record = {"command": "the command", "by": "make it", "date": "2026-01-01", "machine": "a machine", "device": "cpu"}
    record |= {"threads": 2, "amx": True, "versions": {"torch": "2"}, "repeats": 3, "gap": 0.5, "close_gap": 0.02}
    record |= {"memory_method": "VmHWM", "tables": [table], "memory": [], "large": []}
    return record | fields


def _line(text: str, start: str) -> list[str]:
    [line] = [line for line in text.splitlines() if line.startswith(f"| {start}")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_ratios_are_of_medians() -> None:
    [table] = _record()["tables"]
    assert tables.ratio(table, OURS, YARDSTICK) == pytest.approx(0.5)
    assert tables.ratio(table, "naive", OURS) == pytest.approx(4.0)
    assert tables.ratio(table, "liger", OURS) is None
    assert tables.ratio(table, "verl", OURS) is None


def test_tables_hold_figures_ratios_bounds_and_reasons() -> None:
    record = _record()
    text = tables.render(json.loads(json.dumps(record)))
    assert "Written by `make it` on 2026-01-01" in text
    # median, min, max, / yardstick, / ours, memory, dH and dW error, the same when close
    ours = _line(text.partition("N=2,048")[2].partition("## Memory")[0], "copd_kernels")
    assert ours[2:8] == ["1.000", "0.800", "1.200", "0.50", "1.00", "48"]
    assert ours[8:] == ["1.7e-03", "1.6e-03", "1.8e-03"]
    assert _line(text, "exact result rounded to bf16")[8:10] == ["1.6e-03", "-"]
    assert "- Liger, eager: liger-kernel is not installed" in text
    assert "- Apple CCE (torch_compile on CPU): not its task: x | y" in text
    bound = _line(text, "Reverse KL, forward and backward, bf16 / yardstick")
    assert bound[1:] == ["0.50", "≤ 0.8", "≤ 0.55", "aim", "yes"]
    assert _line(text, "dH error, bf16")[1:5] == ["1.7e-03", "≤ 0.002", "≤ 0.001", "must"]
    assert _line(text, "memory, largest of all tasks, V=32,768")[1:5] == ["50", "≤ 160", "≤ 64", "aim"]
    assert _line(text, "GRPO, forward and backward, fp32 / yardstick")[4] == "not measured"

    record["tables"][0]["rows"][0]["energy_j"] = 2048 * 0.0125
    first = record["tables"][0]["rows"][0]["peer"]
    text = tables.render(record)
    measured = _line(text.partition("N=2,048")[2].partition("## Memory")[0], tables.PEERS[first].label)
    assert measured[8] == "12.5"
    assert _line(text, "exact result rounded to bf16")[9:11] == ["1.6e-03", "-"]

    without_amx = tables.render(_record(amx=False))
    assert _line(without_amx, "Reverse KL, forward and backward, bf16")[5].startswith("no: without AMX")
    assert _line(without_amx, "Reverse KL, forward and backward, fp32")[5] == "yes"


def test_large_run_stands_beside_the_naive_need() -> None:
    shape = [4096, 2560, 151936]
    run = {"peer": OURS, "version": "1", "dtype": "bf16", "shape": shape}
    done = run | {"task": "reverse_kl", "seconds": 61.5, "extra_bytes": 50 * 10**6, "peak_bytes": 3 * 2**30}
    failed = run | {"task": "grpo", "failure": "killed"}
    text = tables.render(_record(tables=[], large=[done, failed]))
    need = f"{20 * 4096 * 151936 / 2**20:,.0f}"
    assert _line(text, "Reverse KL")[1:] == ["61.5", "48", "3,072", need]
    assert _line(text, "GRPO")[1] == "killed"


def test_one_command_from_inputs_to_markdown(tmp_path: Path) -> None:
    markdown, figures = tmp_path / "RESULTS.md", tmp_path / "figures.json"
    words = "--tasks grpo --dtypes fp32 --shape 64 32 256 --peers yardstick copd --repeats 2 --threads 1"
    bench_kernels.main([*words.split(), "--json", str(figures), "--markdown", str(markdown)])
    [table] = json.loads(figures.read_text())["tables"]
    rows = {row["peer"]: row for row in table["rows"]}
    for name in ("yardstick", "copd"):
        assert len(rows[name]["seconds"]) == 2
        assert rows[name]["extra_bytes"] >= 0
    assert rows["yardstick"]["errors"] == {}
    assert max(rows["copd"]["errors"].values()) < BOUNDS["fp32"]
    text = markdown.read_text()
    assert "## GRPO, forward and backward, fp32" in text
    assert "copd_kernels" in text
