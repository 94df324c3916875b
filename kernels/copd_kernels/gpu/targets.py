"""The GPUs that kernels are compiled for, and what a compilation needs besides the kernel."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from copd_kernels._types import Head


class Target(NamedTuple):
    """A GPU architecture as ``triton.backends.compiler.GPUTarget`` takes it, and the shared memory of one program."""

    name: str
    backend: str  # "cuda" or "hip"; "interpreter" runs the kernels on the CPU, for tests.
    arch: int | str
    warp_size: int
    max_shared_bytes: int

    @property
    def has_tma(self) -> bool:
        """Whether tiles are fetched by the tensor memory accelerator (descriptors) or by pointers."""
        return self.backend == "cuda" and int(self.arch) >= 90


SM_80 = Target("sm_80", "cuda", 80, 32, 163 * 1024)
SM_90 = Target("sm_90", "cuda", 90, 32, 227 * 1024)
SM_100 = Target("sm_100", "cuda", 100, 32, 227 * 1024)
GFX942 = Target("gfx942", "hip", "gfx942", 64, 64 * 1024)
INTERPRETER = Target("interpreter", "interpreter", "cpu", 1, 0)

# What the ahead-of-time report compiles for.
TARGETS = {target.name: target for target in (SM_80, SM_90, SM_100, GFX942)}


class CompileSpec(NamedTuple):
    """Everything ``triton.compile(ASTSource(fn, signature, constexprs, attrs), ...)`` takes for one kernel and target.

    ``signature`` names every parameter of ``fn`` in order ("constexpr" for those in ``constexprs``); ``attrs`` is
    ``{(index,): [["tt.divisibility", 16]]}`` for pointers and sizes that are multiples of 16.
    """

    fn: Any
    signature: dict[str, str]
    constexprs: dict[str, object]
    attrs: dict[tuple[int, ...], list[list[object]]]
    num_warps: int
    num_stages: int
    expects_tensor_cores: bool
    expects_tma: bool


# Target, D, V and the dtype of hidden states and weights.
SpecBuilder = Callable[[Target, int, int, torch.dtype], CompileSpec]

# Triton's names of the dtypes in a signature.
TYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def target_of(device: torch.device) -> Target:
    """The table's target for a device; the CPU is Triton's interpreter. Raises ValueError for GPUs before Ampere."""
    if device.type == "cpu":
        return INTERPRETER
    if torch.version.hip:
        return GFX942
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise ValueError(f"the kernels need compute capability 8.0 (Ampere) or higher, was {major}.{minor}")
    # 12.x, consumer Blackwell, has neither Hopper's nor sm_100's matrix instructions and 99 KiB of shared memory.
    return {9: SM_90, 10: SM_100}.get(major, SM_80)


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Where Triton launches: on the current device, which need not be that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def check_dtypes(*heads: Head) -> None:
    """Raise ValueError for heads that no kernel takes."""
    for head in heads:
        if head.hidden_TD.dtype not in TYPE_NAMES:
            raise ValueError(
                f"hidden states and weights must be float32, bfloat16 or float16 on a GPU, were {head.hidden_TD.dtype}"
            )


def fits_tma(tensor: torch.Tensor) -> bool:
    """Descriptors ask for a base and for rows that begin at multiples of 16 bytes."""
    return tensor.data_ptr() % 16 == 0 and tensor.shape[1] * tensor.element_size() % 16 == 0
