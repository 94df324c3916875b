"""From ``model.path`` to a folder on disk, and what can be said of a folder before its weights are read."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from copd_engine.types import UserError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
#: What a model folder needs; never pickles, nothing of other frameworks, nothing below the top folder.
HUB_FILES = ("*.json", "*.jinja", "*.txt", "*.model")
HUB_WEIGHTS = ("*.safetensors",)


def find_folder(path: str, with_weights: bool = True) -> Path:
    """The local folder of ``model.path``: a folder, ``testbed``, or a hub id by way of the hub's own cache.

    Of a hub model without ``with_weights`` only config, tokenizer and processor are fetched. Offline
    (``HF_HUB_OFFLINE=1``) the cache alone is read. UserError for a path that is neither.
    """
    if path == "testbed":
        return Path(str(files("copd_engine") / "testbed" / "base"))
    if Path(path).is_dir():
        return Path(path)
    if not HUB_ID.fullmatch(path):
        raise UserError(
            f"model.path = {path!r}: no such folder (a Hugging Face folder, a hub id, 'testbed' or 'smollm2')"
        )
    return _hub_folder(path, HUB_FILES + HUB_WEIGHTS if with_weights else HUB_FILES)


def _hub_folder(name: str, patterns: Sequence[str]) -> Path:
    where = f"model.path = {name!r}: no such folder, and"
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns), ignore_patterns=["*/*"]))
    except GatedRepoError:
        raise UserError(
            f"{where} this hub model asks for consent: accept its terms on its page, then `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{where} the hub has no model of this name that you may read (a private one needs `hf auth login`)"
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        cause = str(error.__cause__ or error).strip().partition("\n")[0]
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"the hub cannot be reached ({cause})"
        raise UserError(
            f"{where} {reason} and the cache {constants.HF_HUB_CACHE} has no copy: "
            f"run `hf download {name}` where there is a network, or give a local folder"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        raise UserError(f"{where} the hub answered: {' '.join(str(error).split())}") from None


def read_config(folder: Path, path: str) -> dict[str, Any]:
    """``config.json`` of a model whose weights can be read: dense, in safetensors.

    UserError for a folder that is no Hugging Face model, whose weights are pickles (none is ever loaded) or quantised.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"model.path = {path!r}: the folder has no config.json, so it is no Hugging Face model")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"model.path = {path!r}: the model cannot be read: config.json is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"model.path = {path!r}: the model cannot be read: config.json is no mapping")
    if "quantization_config" in config:
        raise UserError(f"model.path = {path!r}: the weights are quantised; training needs the dense model")
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    if pickles and not list(folder.glob("*.safetensors")):
        raise UserError(
            f"model.path = {path!r}: the weights are pickles ({pickles[0]}), which can run code and are never loaded: "
            "convert them to safetensors (save_pretrained in transformers does)"
        )
    return config
