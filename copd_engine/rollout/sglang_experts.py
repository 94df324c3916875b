"""Mixtures of experts for sglang: transformers keeps a layer's experts as two tensors, sglang takes them one by one."""

from __future__ import annotations

from collections.abc import Mapping

import torch

_FUSED, _DOWN = ".mlp.experts.gate_up_proj", ".mlp.experts.down_proj"


def split_experts(named_tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same weights under the names of Qwen3-MoE's checkpoints on the hub, which sglang's models take; views.

    ``LAYER.mlp.experts.gate_up_proj`` ``[E, 2 I, D]`` becomes ``LAYER.mlp.experts.N.gate_proj.weight`` and
    ``up_proj.weight``, ``[I, D]`` each, ``down_proj`` ``[E, D, I]`` becomes ``N.down_proj.weight`` ``[D, I]``. Other
    tensors, and all of a model without experts, stay as they are.
    """
    split: dict[str, torch.Tensor] = {}
    for name, tensor in named_tensors.items():
        if name.endswith(_FUSED):
            experts = name.removesuffix("gate_up_proj")
            for number, gate_up in enumerate(tensor.detach().unbind()):
                gate, up = gate_up.chunk(2)
                split |= {f"{experts}{number}.gate_proj.weight": gate, f"{experts}{number}.up_proj.weight": up}
        elif name.endswith(_DOWN):
            experts = name.removesuffix("down_proj")
            split |= {f"{experts}{n}.down_proj.weight": down for n, down in enumerate(tensor.detach().unbind())}
        else:
            split[name] = tensor
    return split
