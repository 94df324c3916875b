"""Weights on their way to sglang: checks against the engine's own list, flattened buckets, sums read back.

sglang answers success to names that it does not know, dies of a wrong shape and reports failures in a return value that
nothing obliges one to read. So names and shapes are asked of the engine before anything is sent, each answer is
checked, and afterwards every parameter is compared with what was sent.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from copd_engine.types import suggest

#: Buckets are cut at tensors, whose first byte stands at a multiple of this.
ALIGNMENT = 64
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def word_sum(tensor: torch.Tensor) -> int:
    """Sum modulo 2^64 of a tensor's elements taken as integers of the same bits.

    It is the same for a tensor and for the sum of its parts, so fused and separate weights can be compared, and zeros
    of padding add nothing.
    """
    words = tensor.detach().contiguous().view(-1).view(_WORDS[tensor.element_size()])
    if words.device.type == "cpu":
        return int(words.numpy().sum(dtype=np.int64)) % (1 << 64)  # torch would write all words as int64 first
    return int(words.sum(dtype=torch.int64)) % (1 << 64)


@dataclass(frozen=True)
class WeightList:
    """The engine's own list, by transformers' names: the name that it takes each tensor under (``sent_as``), and which
    of its parameters that goes to, in which dtype; ``parameters_of`` is by the names that are sent."""

    sent_as: Mapping[str, str]
    parameters_of: Mapping[str, tuple[str, ...]]
    dtype_of: Mapping[str, torch.dtype]
    shape_of: Mapping[str, tuple[int, ...]]

    @classmethod
    def from_answers(
        cls,
        answers: Sequence[Mapping[str, Any]],
        named_tensors: Mapping[str, torch.Tensor],
        checkpoint: Mapping[str, tuple[int, ...]],
    ) -> WeightList:
        """From the ranks' answers about ``named_tensors``; ValueError for a name or shape that the engine refuses.

        ``checkpoint``: shapes of the tensors that the engine was started from, by name. sglang pads some weights, and
        on a CPU pads whatever is too small.
        """
        answer = answers[0]
        found: Mapping[str, Mapping[str, Any]] = answer["tensors"]
        for name, tensor in named_tensors.items():
            if name not in found:
                raise ValueError(
                    f"sglang's model has no weight {name!r}{suggest(name, {*found, *answer['parameters']})}"
                )
            if "error" in found[name]:
                shape = list(tensor.shape)
                raise ValueError(f"sglang does not take {name!r} of shape {shape}: {found[name]['error']}")
            shape_on_disk = checkpoint.get(found[name]["as"], tuple(tensor.shape))
            if shape_on_disk != tuple(tensor.shape):
                raise ValueError(
                    f"{name!r} has the shape {list(tensor.shape)}, in the model that sglang started from "
                    f"{list(shape_on_disk)}"
                )
        return cls(
            {name: entry["as"] for name, entry in found.items()},
            {entry["as"]: tuple(entry["parameters"]) for entry in found.values()},
            {name: getattr(torch, entry["dtype"]) for name, entry in found.items()},
            {name: tuple(tensor.shape) for name, tensor in named_tensors.items()},
        )

    def check(self, expert: str, named_tensors: Mapping[str, torch.Tensor]) -> None:
        """ValueError unless these are the list's names, all of them, in its shapes and in dtypes that can be cast.

        All experts must bring the same names: a weight that one of them lacks would stay another's.
        """
        where = f"weights of {expert!r}"
        for name in named_tensors:
            if name not in self.shape_of:
                raise ValueError(f"{where}: unknown name {name!r}{suggest(name, self.shape_of)}")
        for name, shape in self.shape_of.items():
            if name not in named_tensors:
                raise ValueError(f"{where}: {name!r} is missing")
            tensor, dtype = named_tensors[name], self.dtype_of[name]
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{where}: {name!r} has the shape {list(tensor.shape)}, the engine's {list(shape)}")
            if tensor.dtype != dtype and not (tensor.is_floating_point() and dtype.is_floating_point):
                raise ValueError(f"{where}: {name!r} is {dtype_name(tensor.dtype)}, the engine's {dtype_name(dtype)}")

    def expected_sums(self, sums: Mapping[str, int]) -> dict[str, int]:
        """The sum of each engine parameter from the sums of the tensors that were sent."""
        expected: dict[str, int] = {}
        for name, value in sums.items():
            for parameter in self.parameters_of[name]:
                expected[parameter] = (expected.get(parameter, 0) + value) % (1 << 64)
        return expected


def checkpoint_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a folder's safetensors files, by the names there; their headers alone are read."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return shapes


@dataclass(frozen=True)
class Bucket:
    """Some tensors in one flat uint8 buffer; ``entries``: (name, shape, dtype, first byte, last byte + 1) of each."""

    flat: torch.Tensor
    entries: tuple[tuple[str, tuple[int, ...], str, int, int], ...]
    sums: Mapping[str, int]


def new_buffer(number: int, size: int, device: torch.device) -> torch.Tensor:
    """Memory of ``size`` bytes for a bucket; on a CPU it is shared memory."""
    flat = torch.empty(size, dtype=torch.uint8, device=device)
    return flat.share_memory_() if device.type == "cpu" else flat


class KeptBuffers:
    """On a CPU, the buffers of one swap for the next, whose buckets are the same: to map as much shared memory anew
    takes several times as long as to copy the weights into it. A GPU's allocator keeps memory by itself."""

    def __init__(self) -> None:
        self._buffers: dict[int, torch.Tensor] = {}

    def __call__(self, number: int, size: int, device: torch.device) -> torch.Tensor:
        if device.type != "cpu":
            return new_buffer(number, size, device)
        if number not in self._buffers or self._buffers[number].numel() != size:
            self._buffers[number] = new_buffer(number, size, device)
        return self._buffers[number]


def buckets(
    named_tensors: Mapping[str, torch.Tensor],
    weights: WeightList,
    max_bytes: int,
    buffer: Callable[[int, int, torch.device], torch.Tensor] = new_buffer,
) -> Iterator[Bucket]:
    """The tensors in the engine's dtypes, in order, in buckets of at most ``max_bytes``, or of one larger tensor.

    Every bucket is memory of its own: the receiver's copy may still be running when the next one is filled. ``buffer``
    gives it, by number of the bucket, bytes and device.
    """
    names: list[str] = []
    size = number = 0
    for name in named_tensors:
        num_bytes = _padded_bytes(name, weights)
        if names and size + num_bytes > max_bytes:
            yield _fill(names, buffer(number, size, named_tensors[name].device), named_tensors, weights)
            names, size, number = [], 0, number + 1
        names.append(name)
        size += num_bytes
    if names:
        yield _fill(names, buffer(number, size, named_tensors[names[0]].device), named_tensors, weights)


def _padded_bytes(name: str, weights: WeightList) -> int:
    num_bytes = torch.Size(weights.shape_of[name]).numel() * weights.dtype_of[name].itemsize
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


@torch.no_grad()
def _fill(names: list[str], flat: torch.Tensor, tensors: Mapping[str, torch.Tensor], weights: WeightList) -> Bucket:
    entries = []
    sums = {}
    start = 0
    for name in names:
        tensor = tensors[name]
        dtype, shape = weights.dtype_of[name], weights.shape_of[name]
        end = start + tensor.numel() * dtype.itemsize
        view = flat[start:end].view(dtype).view(shape)
        view.copy_(tensor)
        sent = weights.sent_as[name]
        entries.append((sent, shape, dtype_name(dtype), start, end))
        sums[sent] = word_sum(tensor.to(dtype))
        start += _padded_bytes(name, weights)
    return Bucket(flat, tuple(entries), sums)


def as_payload(named: Mapping[str, torch.Tensor], num_ranks: int) -> list[bytes]:
    """One serialised handle per tensor-parallel rank: CUDA IPC, or shared memory on a CPU. Each rank opens its own."""
    return [_pickled(list(named.items())) for _ in range(num_ranks)]


def as_tensor(request: Mapping[str, Any]) -> torch.Tensor:
    """A request to the loader in the scheduler, JSON as uint8."""
    return torch.frombuffer(bytearray(json.dumps(request).encode()), dtype=torch.uint8)


def _pickled(value: object) -> bytes:
    buffer = io.BytesIO()
    ForkingPickler(buffer).dump(value)
    return buffer.getvalue()
