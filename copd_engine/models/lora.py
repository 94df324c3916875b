"""LoRA (arXiv 2106.09685) through peft: adapters on the decoder's linear layers, folded in for all others to read.

The field's choices: the base is frozen in its own dtype; the adapters are fp32 and are computed in fp32 beside a bf16
base (peft's default); B starts at 0, so the model starts as the base. ``lm_head``, the embedding, norms and the vision
tower get none. In mixture-of-experts models the attention and dense MLPs get adapters; the experts, which transformers
keeps as stacked tensors and not as linear layers, and the routers stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from copd_engine.config import LoraConfig
from copd_engine.types import UserError, suggest

ADAPTER = "default"  # peft's name of a model's only adapter


def add_adapters(module: nn.Module, backbone: nn.Module, config: LoraConfig) -> None:
    """Give the linear layers of ``backbone``, a part of ``module``, trainable adapters; all else is frozen.

    A is drawn from a fixed seed. UserError when peft is missing or ``target_modules`` names no linear layer.
    """
    try:
        from peft import LoraConfig as PeftConfig
        from peft import inject_adapter_in_model
    except ImportError:
        raise UserError("model.lora needs the package peft: install the extra 'lora'") from None
    targets = _targets(module, backbone, config.target_modules)
    peft_config = PeftConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # annotated int, used as a factor
        lora_dropout=0.0,
        bias="none",
        target_modules=targets,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inject_adapter_in_model(peft_config, module, ADAPTER)
    for name, parameter in module.named_parameters():
        if _is_adapter(name):
            parameter.data = parameter.data.float()


def _targets(module: nn.Module, backbone: nn.Module, wanted: str | tuple[str, ...]) -> list[str]:
    """Full names of the linear layers that get an adapter."""
    inside = {id(part) for part in backbone.modules()}
    linears = [name for name, part in module.named_modules() if isinstance(part, nn.Linear) and id(part) in inside]
    if wanted == "all-linear":
        return linears
    for ending in wanted:
        if not any(f".{name}".endswith(f".{ending}") for name in linears):
            near = suggest(ending, {name.rpartition(".")[2] for name in linears})
            raise UserError(
                f"model.lora.target_modules: no linear layer of the language model is called {ending!r}{near}"
            )
    return [name for name in linears if any(f".{name}".endswith(f".{ending}") for ending in wanted)]


def _is_adapter(name: str) -> bool:
    return ".lora_" in name


def plain_name(name: str) -> str | None:
    """The name of a parameter in the model without adapters; None for an adapter's own."""
    return None if _is_adapter(name) else name.replace(".base_layer.", ".")


class FoldedParameters(Mapping[str, torch.Tensor]):
    """All weights of the model without adapters, by its names, detached, in ``dtype`` (None: each in its own).

    A weight with an adapter, ``W + alpha / rank * B @ A``, is computed in fp32 each time it is asked for, so reading
    all in turn never holds a second model. Other weights in their own dtype are the module's storage.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype | None = None) -> None:
        self._parameters: dict[str, nn.Parameter] = {}
        self._layers: dict[str, Any] = {}
        self._dtype = dtype
        for name, parameter in module.named_parameters():
            plain = plain_name(name)
            if plain is not None:
                self._parameters[plain] = parameter
                if name.endswith(".base_layer.weight"):
                    self._layers[plain] = module.get_submodule(name.removesuffix(".base_layer.weight"))

    @torch.no_grad()
    def __getitem__(self, name: str) -> torch.Tensor:
        weight = self._parameters[name].detach()
        dtype = self._dtype or weight.dtype
        if name in self._layers:
            weight = weight.float() + self._layers[name].get_delta_weight(ADAPTER)
        return weight.to(dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)


def remove_adapters(module: nn.Module) -> None:
    """Put the plain linear layers back, without what the adapters have learnt."""
    for name, part in list(module.named_modules()):
        if hasattr(part, "lora_A"):
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, part.base_layer)
    if hasattr(module, "peft_config"):
        del module.peft_config
