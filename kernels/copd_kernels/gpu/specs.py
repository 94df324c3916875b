"""How a kernel's module says what it is compiled with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from copd_kernels.gpu.targets import CompileSpec


def compile_spec(
    fn: Any,
    types: Mapping[str, str],
    constants: Mapping[str, object],
    *,
    num_warps: int,
    num_stages: int = 1,
    divisible: Iterable[str] = (),
    tensor_cores: bool = False,
    tma: bool = False,
) -> CompileSpec:
    """The spec of ``fn``: ``types`` of its runtime parameters, ``constants`` the others.

    Pointers are taken as 16-byte aligned, as torch allocates them, and the sizes in ``divisible`` as multiples of 16.
    A launch finds both out by itself and compiles the same code.
    """
    signature = {name: "constexpr" if name in constants else types[name] for name in fn.arg_names}
    aligned = {name for name, kind in signature.items() if kind.startswith("*")} | set(divisible)
    attrs: dict[tuple[int, ...], list[list[object]]] = {
        (index,): [["tt.divisibility", 16]] for index, name in enumerate(fn.arg_names) if name in aligned
    }
    return CompileSpec(fn, signature, dict(constants), attrs, num_warps, num_stages, tensor_cores, tma)
