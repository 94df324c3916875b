"""What the compilers make of every kernel, on a machine without a GPU: ``python -m copd_kernels.gpu.report``.

Each registered kernel is compiled ahead of time for each target at production shapes, and its registers, spills, stack,
shared memory, tensor-core instructions and TMA loads are read from what was made. Exit status 1 if a kernel spills,
misses the instructions it was written for, or needs more shared memory than the target has.

Where the numbers come from. NVIDIA: registers and spills from ``ptxas -v`` with the flags that Triton gives ptxas
(without ``-lineinfo --regAllocOptLevel=2`` it allocates differently, and spills stay hidden), stack from ``cuobjdump
-res-usage``, instructions from ``nvdisasm``; all three come with Triton. AMD: the metadata at the end of the assembly.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.cache import get_cache_manager

from copd_kernels.gpu import advantages, configs, surrogate, topk
from copd_kernels.gpu.targets import TARGETS, CompileSpec, SpecBuilder, Target

# Qwen3-4B and Qwen3-8B.
HIDDEN_SIZES = (2560, 4096)
VOCAB_SIZE = 151_936
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
KERNELS: dict[str, SpecBuilder] = {
    **configs.KERNELS,
    **topk.KERNELS,
    **advantages.KERNELS,
    **surrogate.KERNELS,
}

_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# The instruction that each target multiplies tiles with, and the name people know it by. HMMA on sm_90 is not one:
# it would run at half of what HGMMA reaches.
_TENSOR_CORE = {
    "sm_80": (r"\bHMMA\b", "HMMA"),
    "sm_90": (r"\bHGMMA\b", "HGMMA"),
    "sm_100": (r"\bUTC\w*MMA\b", "tcgen05"),
    "gfx942": (r"\bv_s?mfma\w*", "MFMA"),
}
_TMA_LOAD = r"\bUTMALDG\b"
_LOCAL_MEMORY = {"cuda": r"\b(?:LDL|STL)\b", "hip": r"\bscratch_(?:load|store)\w*"}


class Row(NamedTuple):
    """One kernel on one target at one shape. Bytes are per thread but for shared memory, which is per program."""

    kernel: str
    target: str
    hidden_size: int
    num_warps: int
    registers: int
    spill_bytes: int
    stack_bytes: int
    num_local_accesses: int
    shared_bytes: int
    max_shared_bytes: int
    tensor_core: str  # the instruction found, or ""
    expects_tensor_core: bool
    tma: bool
    expects_tma: bool


def _run(program: str, *arguments: str) -> str:
    """stdout and stderr of one of the tools in Triton's wheel."""
    command = [str(_BIN / program), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with status {done.returncode}:\n{done.stdout}")
    return done.stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"the compiler's output has no match for {pattern!r}:\n{text[-2000:]}")
    return int(found.group(1))


def measure(name: str, spec: CompileSpec, target: Target, hidden_size: int) -> Row:
    """Compile one kernel ahead of time and read what came out."""
    printed = io.StringIO()
    with triton.knobs.nvidia.scope(), contextlib.redirect_stdout(printed):
        triton.knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(
            ASTSource(spec.fn, spec.signature, spec.constexprs, spec.attrs),
            target=GPUTarget(target.backend, target.arch, target.warp_size),
            options={"num_warps": spec.num_warps, "num_stages": spec.num_stages, "enable_fp_fusion": True},
        )
    if target.backend == "cuda":
        with tempfile.TemporaryDirectory() as folder:
            log = _ptxas_log(compiled, printed.getvalue(), target, Path(folder))
            cubin = Path(folder) / "kernel.cubin"
            cubin.write_bytes(compiled.asm["cubin"])
            stack_bytes = _number(r"STACK:(\d+)", _run("cuobjdump", "-res-usage", str(cubin)))
            code = _run("nvdisasm", "-c", str(cubin))
        registers = _number(r"Used (\d+) registers", log)
        spill_bytes = _number(r"(\d+) bytes spill stores", log) + _number(r"(\d+) bytes spill loads", log)
    else:
        code = compiled.asm["amdgcn"]
        registers, stack_bytes, vector, scalar = (
            _number(rf"\.{field}:\s+(\d+)", code)
            for field in ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count", "sgpr_spill_count")
        )
        spill_bytes = 4 * (vector + scalar)
    pattern, tensor_core = _TENSOR_CORE[target.name]
    return Row(
        kernel=name,
        target=target.name,
        hidden_size=hidden_size,
        num_warps=spec.num_warps,
        registers=registers,
        spill_bytes=spill_bytes,
        stack_bytes=stack_bytes,
        num_local_accesses=len(re.findall(_LOCAL_MEMORY[target.backend], code)),
        shared_bytes=compiled.metadata.shared,
        max_shared_bytes=target.max_shared_bytes,
        tensor_core=tensor_core if re.search(pattern, code) else "",
        expects_tensor_core=spec.expects_tensor_cores,
        tma=re.search(_TMA_LOAD, code) is not None,
        expects_tma=spec.expects_tma,
    )


def _ptxas_log(compiled: Any, printed: str, target: Target, folder: Path) -> str:
    """What ``ptxas -v`` said. Kept in Triton's cache beside the cubin, because a compilation found there is silent."""
    kept, name = get_cache_manager(compiled.hash), "ptxas.log"
    if "bytes spill stores" in printed:
        kept.put(printed, name, binary=False)
        return printed
    if path := kept.get_file(name):
        return Path(path).read_text()
    # Compiled by somebody else. As in triton.backends.nvidia.compiler: architecture-specific instructions from Hopper
    # on, a ptxas of its own from Blackwell on.
    ptx, arch = folder / "kernel.ptx", int(target.arch)
    ptx.write_text(compiled.asm["ptx"])
    flags = ["-lineinfo", "-v", "--regAllocOptLevel=2", f"--gpu-name=sm_{arch}{'a' if arch >= 90 else ''}"]
    log = _run("ptxas-blackwell" if arch >= 100 else "ptxas", *flags, str(ptx), "-o", str(folder / "again.cubin"))
    kept.put(log, name, binary=False)
    return log


def problems(rows: Iterable[Row]) -> list[str]:
    """A line for each thing that no kernel may do; empty if all is well."""
    lines = []
    for row in rows:
        at = f"{row.kernel} on {row.target}, D={row.hidden_size}:"
        if row.spill_bytes or row.num_local_accesses or row.stack_bytes:
            lines.append(
                f"{at} spills: {row.spill_bytes} bytes, {row.num_local_accesses} accesses to local memory, "
                f"{row.stack_bytes} bytes of stack, {row.registers} registers"
            )
        if row.expects_tensor_core and not row.tensor_core:
            lines.append(f"{at} no {_TENSOR_CORE[row.target][1]} instruction")
        if row.expects_tma and not row.tma:
            lines.append(f"{at} no TMA load (UTMALDG)")
        if row.shared_bytes > row.max_shared_bytes:
            lines.append(f"{at} {row.shared_bytes} bytes of shared memory, the target has {row.max_shared_bytes}")
    return lines


def _compile_one(job: tuple[str, str, int, torch.dtype]) -> Row:
    kernel, target_name, hidden_size, dtype = job
    target, begin = TARGETS[target_name], time.perf_counter()
    spec = KERNELS[kernel](target, hidden_size, VOCAB_SIZE, dtype)
    row = measure(kernel, spec, target, hidden_size)
    print(f"{kernel} {target_name} D={hidden_size}: {time.perf_counter() - begin:.1f} s", file=sys.stderr, flush=True)
    return row


def compile_report(
    kernels: Sequence[str] | None = None,
    targets: Sequence[str] | None = None,
    hidden_sizes: Sequence[int] = HIDDEN_SIZES,
    *,
    dtype: str = "bf16",
    num_processes: int = 1,
) -> list[Row]:
    """Rows of every kernel × target × D at V = 151,936, inputs of ``dtype``; a second run finds them in Triton's cache.

    Raises ValueError on an unknown kernel or target, and RuntimeError under TRITON_INTERPRET=1, which replaces every
    kernel by one that cannot be compiled.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: kernels were loaded for the interpreter and cannot be compiled")
    for name, chosen, known in (("kernels", kernels, KERNELS), ("targets", targets, TARGETS)):
        if unknown := set(chosen or ()) - set(known):
            raise ValueError(f"{name} must be among {', '.join(known)}, was {', '.join(sorted(unknown))}")
    jobs = list(itertools.product(kernels or KERNELS, targets or TARGETS, hidden_sizes, [DTYPES[dtype]]))
    if num_processes == 1:
        return [_compile_one(job) for job in jobs]
    with ProcessPoolExecutor(num_processes, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(_compile_one, jobs))


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a table; shapes that came out alike share a line."""
    merged: dict[Row, list[int]] = {}
    for row in rows:
        merged.setdefault(row._replace(hidden_size=0), []).append(row.hidden_size)
    lines = [
        "| kernel | target | D | warps | registers | spill B | stack B | shared KB | of | tensor core | TMA |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---|---|",
    ]
    for row, sizes in merged.items():
        lines.append(
            f"| {row.kernel} | {row.target} | {', '.join(map(str, sizes))} | {row.num_warps} | {row.registers} "
            f"| {row.spill_bytes} | {row.stack_bytes} | {row.shared_bytes / 1024:.1f} | {row.max_shared_bytes // 1024} "
            f"| {row.tensor_core or '-'} | {'UTMALDG' if row.tma else '-'} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 if there are problems."""
    description = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m copd_kernels.gpu.report", description=description)
    parser.add_argument("--kernels", nargs="+", metavar="NAME", help=f"of {', '.join(KERNELS)}; default: all")
    parser.add_argument("--targets", nargs="+", metavar="NAME", help=f"of {', '.join(TARGETS)}; default: all")
    parser.add_argument("--hidden-sizes", nargs="+", type=int, metavar="D", default=HIDDEN_SIZES)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of hidden states and weights")
    parser.add_argument("--processes", type=int, default=1, help="compile in this many processes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there as well")
    options = parser.parse_args(arguments)
    try:
        rows = compile_report(
            options.kernels,
            options.targets,
            options.hidden_sizes,
            dtype=options.dtype,
            num_processes=options.processes,
        )
    except (ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2
    if options.json:
        options.json.write_text(json.dumps([row._asdict() for row in rows], indent=1) + "\n")
    print(f"Triton {triton.__version__}, {options.dtype}, V = {VOCAB_SIZE:,}\n")
    print(markdown(rows))
    found = problems(rows)
    print(f"\n{len(found)} problems" + "".join(f"\n- {line}" for line in found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
