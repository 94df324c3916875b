"""Merging Hugging Face folders of safetensors block by block: memory does not grow with the model, nor with K.

A safetensors file is the length of its header (8 bytes), the header (JSON: dtype, shape and place of each tensor) and
the tensors. Sizes are known before anything is computed, so the header is written first and the tensors follow as they
are merged. Files are read with plain reads: pages of a memory map would count as memory.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from copd_engine.config import MergeConfig
from copd_engine.merge.methods import BLOCK, check_branches, check_same_model, merged_blocks
from copd_engine.models.folder import HUB_FILES, find_folder, read_config
from copd_engine.types import UserError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9
#: Where the head is tied, some folders keep a copy of the embedding under this name and some do not.
TIED_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file; ``offset`` in bytes from the file's begin."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def num_bytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def read(self, begin: int, end: int) -> torch.Tensor:
        """Entries ``begin`` to ``end`` of the flattened tensor."""
        content = bytearray((end - begin) * self.dtype.itemsize)
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.offset + begin * self.dtype.itemsize)
            view = memoryview(content)
            while view:
                count = file.readinto(view)
                if not count:
                    raise UserError(f"{self.file} ended while it was read")
                view = view[count:]
        return torch.frombuffer(content, dtype=self.dtype)


def weight_folder(path: str) -> Path | None:
    """The folder of ``path`` (a folder, a hub id, ``testbed``) if its weights are safetensors, else None.

    UserError as for ``model.path``: no such folder, pickles, quantised weights.
    """
    if path == "smollm2":
        return None
    folder = find_folder(path)
    if list(folder.glob("*.gguf")):
        return None
    read_config(folder, path)
    return folder if (folder / WEIGHTS).is_file() or (folder / INDEX).is_file() else None


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a folder by name, from the headers of its files. UserError for damaged or missing files."""
    if (folder / WEIGHTS).is_file():  # transformers' own order
        return _header(folder / WEIGHTS)
    index = folder / INDEX
    try:
        files: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = {name: _header(folder / name) for name in sorted(set(files.values()))}
        return {name: shards[file][name] for name, file in files.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is no index of weights: {error}") from None
    except KeyError as error:
        raise UserError(f"{index}: {error} is missing") from None


def _header(file: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(file, "pt"):  # checks the header and the file's length
            pass
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header: dict[str, Any] = json.loads(stream.read(length))
    except (SafetensorError, OSError) as error:
        raise UserError(f"the weights {file} cannot be read: {' '.join(str(error).split())}") from None
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise UserError(f"{file}: {name} is {entry['dtype']}; {', '.join(DTYPES)} can be merged")
        begin = 8 + length + entry["data_offsets"][0]
        found[name] = StoredTensor(file, DTYPES[entry["dtype"]], tuple(entry["shape"]), begin)
    return found


def merge_folders(
    base: Path,
    branches: Mapping[str, Path],
    out: Path,
    recipe: MergeConfig,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Merge the weights of folders into ``out``, which must not exist, with all other files of the base's model.

    As :func:`copd_engine.merge.merge`, with the numbers of the files: branches may be fp32 and the base bf16. A tied
    head is not written, and must be the embedding wherever it is stored. One or several shards as transformers writes
    them. Written beside ``out`` and renamed: ``out`` is never half a model.
    """
    check_branches(recipe, branches)
    start, ends = stored_tensors(base), {branch: stored_tensors(folder) for branch, folder in branches.items()}
    if _is_tied(base):
        for folder, tensors in ((base, start), *((branches[branch], tensors) for branch, tensors in ends.items())):
            _drop_tied_head(folder, tensors)
    for branch, tensors in ends.items():
        check_same_model(start, branch, tensors)
    with written_beside(out) as aside:
        _copy_other_files(base, aside)
        _write_shards(start, ends, aside, recipe, max_shard_bytes)


@contextmanager
def written_beside(out: Path) -> Iterator[Path]:
    """A folder to write, renamed to ``out``, which must not exist, unless an exception ends the block."""
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".{out.name}.writing")
    shutil.rmtree(aside, ignore_errors=True)  # of a merge that was killed
    aside.mkdir()
    try:
        yield aside
        os.rename(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _is_tied(folder: Path) -> bool:
    config = read_config(folder, str(folder))
    return bool(config.get("tie_word_embeddings") or (config.get("text_config") or {}).get("tie_word_embeddings"))


def _drop_tied_head(folder: Path, tensors: dict[str, StoredTensor]) -> None:
    """Take a stored head out: the merged embedding stands for it. UserError where it is not equal to the embedding, or
    to any tensor of its shape, whatever that is called: what was trained of it would be lost."""
    head = tensors.pop(TIED_HEAD, None)
    if head is not None and not any(_are_equal(head, other) for other in tensors.values()):
        raise UserError(
            f"{folder}: {TIED_HEAD} is not its embedding, but the base's config.json has tie_word_embeddings: the "
            "merged model would have no head of its own; set it to false in the base, with a head in every folder"
        )


def _are_equal(one: StoredTensor, other: StoredTensor) -> bool:
    """Compared as the merge reads them, in blocks."""
    if one.shape != other.shape:
        return False
    spans = ((begin, min(begin + BLOCK, one.numel)) for begin in range(0, one.numel, BLOCK))
    return all(torch.equal(one.read(*span).double(), other.read(*span).double()) for span in spans)


def _copy_other_files(base: Path, out: Path) -> None:
    """Config, tokenizer, processor: what a hub model needs beside its weights."""
    for file in sorted({file for pattern in HUB_FILES for file in base.glob(pattern)}):
        if file.suffix != ".safetensors" and file.name != INDEX:
            shutil.copyfile(file, out / file.name)


def _write_shards(
    start: Mapping[str, StoredTensor],
    ends: Mapping[str, Mapping[str, StoredTensor]],
    out: Path,
    recipe: MergeConfig,
    max_shard_bytes: int,
) -> None:
    shards = _shards(start, max_shard_bytes)
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = [WEIGHTS]
    for file, names in zip(files, shards, strict=True):
        with (out / file).open("wb") as stream:
            stream.write(_header_bytes({name: start[name] for name in names}))
            for name in names:
                readers = {branch: tensors[name].read for branch, tensors in ends.items()}
                tensor = start[name]
                for block in merged_blocks(name, tensor.numel, tensor.read, readers, recipe):
                    stream.write(block.to(tensor.dtype).view(torch.uint8).numpy().data)
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        total = sum(tensor.num_bytes for tensor in start.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (out / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(tensors: Mapping[str, StoredTensor], max_bytes: int) -> list[list[str]]:
    """Names per file, in the base's order; within a file as safetensors itself orders them: wide numbers first."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, tensor in tensors.items():
        if shards[-1] and used + tensor.num_bytes > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += tensor.num_bytes
    return [sorted(names, key=lambda name: (-tensors[name].dtype.itemsize, name)) for names in shards]


def _header_bytes(tensors: Mapping[str, StoredTensor]) -> bytes:
    """Length and header of a file that holds these tensors in this order; padded, so that they are aligned."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, tensor in tensors.items():
        offsets = [position, position + tensor.num_bytes]
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        position = offsets[1]
    content = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    content += b" " * (-len(content) % 8)
    return len(content).to_bytes(8, "little") + content
