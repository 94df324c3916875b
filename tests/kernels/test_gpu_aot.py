"""Ahead-of-time compilation of every Triton kernel, on a machine without a GPU: no spills, tensor cores, TMA, shared
memory within the target. In processes of their own: where TRITON_INTERPRET is set nothing can be compiled.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed (extra gpu)")
report = pytest.importorskip("copd_kernels.gpu.report")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, env=env)


def compile_rows(tmp_path: Path, *arguments: str) -> list[report.Row]:
    """Rows of ``python -m copd_kernels.gpu.report``, whose exit status must say what ``problems`` says."""
    done = run("-m", "copd_kernels.gpu.report", "--json", str(tmp_path / "rows.json"), *arguments)
    assert (tmp_path / "rows.json").exists(), done.stderr
    rows = [report.Row(**fields) for fields in json.loads((tmp_path / "rows.json").read_text())]
    assert done.returncode == bool(report.problems(rows)), done.stderr
    return rows


def check(rows: list[report.Row], num_targets: int, num_sizes: int) -> None:
    assert len(rows) == len(report.KERNELS) * num_targets * num_sizes
    assert not (lines := report.problems(rows)), "\n".join(lines)
    # The numbers were read, not missed by a pattern: registers of everything, and each kind of kernel is there.
    assert all(row.registers > 0 for row in rows)
    assert any(row.expects_tensor_core for row in rows)


@pytest.mark.timeout(1200)
def test_every_kernel_on_every_target_at_both_sizes(tmp_path: Path) -> None:
    """About a minute and a half on two cores, seconds where Triton's cache has them."""
    rows = compile_rows(tmp_path, "--processes", "2")
    check(rows, 4, 2)
    tensor_core = {row.target: row.tensor_core for row in rows if row.expects_tensor_core}
    assert tensor_core == {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "tcgen05", "gfx942": "MFMA"}
    assert {row.target for row in rows if row.tma} == {"sm_90", "sm_100"}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_inputs_of_16_bits(tmp_path: Path) -> None:
    check(compile_rows(tmp_path, "--processes", "2", "--dtype", "fp16"), 4, 2)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_inputs_of_32_bits(tmp_path: Path) -> None:
    """In full precision, so without tensor cores: they spill no more than the others."""
    rows = compile_rows(tmp_path, "--processes", "2", "--dtype", "fp32")
    assert len(rows) == len(report.KERNELS) * 4 * 2
    assert not (lines := report.problems(rows)), "\n".join(lines)


# Kernels spoilt on purpose, and the gate has to say so. `spoil` changes the spec of a good kernel.
SPOILT = """
import json, sys, torch
from copd_kernels.gpu import report, topk
from copd_kernels.gpu.targets import TARGETS

def spoil(kernel, target, constants={}, **fields):
    spec = report.KERNELS[kernel](TARGETS[target], 2560, report.VOCAB_SIZE, torch.bfloat16)
    return spec._replace(constexprs=spec.constexprs | constants, **fields)

spec = CASE
row = report.measure("spoilt", spec, TARGETS[TARGET], 2560)
print(json.dumps([row._asdict(), report.problems([row])]))
"""
CASES = {
    "a tile too large for the registers": (
        "spoil('topk_candidates_10', 'sm_80', {'BLOCK_V': 256})",
        "sm_80",
        r"spoilt on sm_80, D=2560: spills: [1-9]\d* bytes, [1-9]\d* accesses to local memory, [1-9]\d* bytes of stack",
    ),
    "the same on AMD": (
        "spoil('topk_candidates_10', 'gfx942', {'BLOCK_T': 128, 'BLOCK_V': 256})",
        "gfx942",
        r"spoilt on gfx942, D=2560: spills: [1-9]\d* bytes, [1-9]\d* accesses to local memory, [1-9]\d* bytes of stack",
    ),
    "no dot": ("spoil('surrogate', 'sm_90', expects_tensor_cores=True)", "sm_90", "no HGMMA instruction"),
    "a dot in fp32": (
        "spoil('topk_candidates_10', 'sm_80', {'WIDEN': True, 'PRECISION': 'ieee', 'BLOCK_D': 32, 'BLOCK_T': 64})",
        "sm_80",
        "no HMMA instruction",
    ),
    "no descriptors": ("spoil('surrogate', 'sm_90', expects_tma=True)", "sm_90", r"no TMA load \(UTMALDG\)"),
    "too many stages": (
        "spoil('topk_candidates_10', 'sm_80', num_stages=12)",
        "sm_80",
        r"\d{6} bytes of shared memory, the target has 166912",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_spoilt_kernel_is_a_problem(case: str) -> None:
    spec, target, expected = CASES[case]
    done = run("-c", SPOILT.replace("CASE", spec).replace("TARGETS[TARGET]", f"TARGETS[{target!r}]"))
    assert done.returncode == 0, done.stderr
    _, lines = json.loads(done.stdout)
    assert len(lines) == 1, lines
    assert re.search(expected, lines[0]), lines[0]


def test_under_the_interpreter_the_report_says_so() -> None:
    done = run("-m", "copd_kernels.gpu.report", TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET is set" in done.stderr


def test_unknown_names_are_refused() -> None:
    done = run("-m", "copd_kernels.gpu.report", "--targets", "sm_70")
    assert done.returncode == 2
    assert "targets must be among sm_80, sm_90, sm_100, gfx942, was sm_70" in done.stderr
