"""Checks of arguments, shared by the operations: a ValueError with the argument, its value and its bound."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

from copd_kernels._types import Head

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_head(head: Head, vocab_size: int | None, *, prefix: str = "") -> None:
    """Raise unless hidden states, weight and bias make logits. ``prefix`` as in ``student_hidden_TD``."""
    hidden_TD, weight_VD, bias_V = head
    hidden, weight, bias = f"{prefix}hidden_TD", f"{prefix}weight_VD", f"{prefix}bias_V"
    if hidden_TD.dim() != 2:
        raise ValueError(f"{hidden} must be [T, D], was {list(hidden_TD.shape)}")
    if hidden_TD.dtype not in DTYPES:
        raise ValueError(f"{hidden} must be fp32, bf16, fp16 or fp64, was {hidden_TD.dtype}")
    if weight_VD.dim() != 2 or weight_VD.shape[1] != hidden_TD.shape[1]:
        raise ValueError(f"{weight} must be [V, D] with D = {hidden_TD.shape[1]}, was {list(weight_VD.shape)}")
    if weight_VD.shape[0] == 0:
        raise ValueError(f"{weight} must have at least one row, was {list(weight_VD.shape)}")
    if weight_VD.dtype != hidden_TD.dtype:
        raise ValueError(f"{weight} must be {hidden_TD.dtype} like {hidden}, was {weight_VD.dtype}")
    if weight_VD.device != hidden_TD.device:
        raise ValueError(f"{weight} must be on {hidden_TD.device} like {hidden}, was on {weight_VD.device}")
    if vocab_size is not None and not 1 <= vocab_size <= weight_VD.shape[0]:
        raise ValueError(f"vocab_size must lie in 1..{weight_VD.shape[0]} (rows of {weight}), was {vocab_size}")
    # The operations would drop a tangent and return a derivative of 0. Dynamo cannot trace the question.
    for name, tensor in zip((hidden, weight, bias), () if torch.compiler.is_compiling() else head, strict=False):
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise ValueError(f"{name} must not carry a forward-mode tangent: differentiate in reverse mode")
    if bias_V is None:
        return
    if bias_V.shape != weight_VD.shape[:1]:
        raise ValueError(f"{bias} must be [V] with V = {weight_VD.shape[0]}, was {list(bias_V.shape)}")
    if not bias_V.is_floating_point():
        raise ValueError(f"{bias} must be a floating dtype, was {bias_V.dtype}")
    if bias_V.device != hidden_TD.device:
        raise ValueError(f"{bias} must be on {hidden_TD.device} like {hidden}, was on {bias_V.device}")


def check_pair(student: Head, teacher: Head, vocab_size: int | None) -> int:
    """Raise unless the heads can be compared; the number of vocabulary entries that both have."""
    check_head(student, vocab_size, prefix="student_")
    check_head(teacher, vocab_size, prefix="teacher_")
    num_tokens = student.hidden_TD.shape[0]
    if teacher.hidden_TD.shape[0] != num_tokens:
        raise ValueError(
            f"teacher_hidden_TD must have the student's T = {num_tokens}, was {teacher.hidden_TD.shape[0]}"
        )
    if teacher.hidden_TD.device != student.hidden_TD.device:
        raise ValueError(
            f"teacher_hidden_TD must be on the student's {student.hidden_TD.device}, was on {teacher.hidden_TD.device}"
        )
    sizes = student.weight_VD.shape[0], teacher.weight_VD.shape[0]
    if vocab_size is None and sizes[0] != sizes[1]:
        raise ValueError(
            f"teacher_weight_VD must have the student's V = {sizes[0]}, was {sizes[1]}; if the rows differ by padding "
            "alone, give vocab_size, the number of real entries"
        )
    return sizes[0] if vocab_size is None else vocab_size


def check_target(target_T: torch.Tensor, hidden_TD: torch.Tensor) -> None:
    if target_T.shape != hidden_TD.shape[:1]:
        raise ValueError(f"target_T must be [T] with T = {hidden_TD.shape[0]}, was {list(target_T.shape)}")
    if target_T.dtype != torch.int64:
        raise ValueError(f"target_T must be int64, was {target_T.dtype}")
    if target_T.device != hidden_TD.device:
        raise ValueError(f"target_T must be on {hidden_TD.device}, was on {target_T.device}")


def check_mask(mask_T: torch.Tensor | None, hidden_TD: torch.Tensor) -> None:
    if mask_T is None:
        return
    if mask_T.shape != hidden_TD.shape[:1] or mask_T.dtype != torch.bool:
        raise ValueError(
            f"mask_T must be bool [T] with T = {hidden_TD.shape[0]}, was {mask_T.dtype} {list(mask_T.shape)}"
        )
    if mask_T.device != hidden_TD.device:
        raise ValueError(f"mask_T must be on {hidden_TD.device}, was on {mask_T.device}")


def check_per_token(name: str, values_T: torch.Tensor, hidden_TD: torch.Tensor) -> None:
    if values_T.shape != hidden_TD.shape[:1]:
        raise ValueError(f"{name} must be [T] with T = {hidden_TD.shape[0]}, was {list(values_T.shape)}")
    if not values_T.is_floating_point():
        raise ValueError(f"{name} must be a floating dtype, was {values_T.dtype}")
    if values_T.requires_grad:
        raise ValueError(f"{name} must not require grad: the loss has no gradient with respect to it")
    if values_T.device != hidden_TD.device:
        raise ValueError(f"{name} must be on {hidden_TD.device}, was on {values_T.device}")


def check_scale(temperature: float, softcap: float | None) -> None:
    for name, value, bound in (("temperature", temperature, "> 0"), ("softcap", softcap, "> 0 or None")):
        # Written so that NaN fails too.
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be {bound}, was {value}")
        if value == float("inf"):
            raise ValueError(f"{name} must be finite, was {value}")


def check_chunk_tokens(chunk_tokens: int | None) -> None:
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be >= 1, was {chunk_tokens}")


def check_top_k(top_k: int, vocab_size: int) -> None:
    if not 1 <= top_k <= vocab_size:
        raise ValueError(f"top_k must lie in 1..{vocab_size} (the vocabulary), was {top_k}")


def check_jsd_beta(jsd_beta: float) -> None:
    if not 0 < jsd_beta < 1:
        raise ValueError(f"jsd_beta must lie inside (0, 1), was {jsd_beta}; at 0 and 1 the JSD is 0")


# What only the values show. These run inside the operations, so that torch.compile does not stop at them.


def check_target_values(target_T: torch.Tensor, vocab_size: int) -> None:
    if target_T.numel() == 0:
        return
    low, high = (int(bound) for bound in target_T.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"target_T must lie in 0..{vocab_size - 1} (the vocabulary), was {low}..{high}")


def check_shard_target_values(target_T: torch.Tensor) -> None:
    """Indices into a vocabulary whose size a shard does not know."""
    if target_T.numel() and (low := int(target_T.min())) < -1:
        raise ValueError(f"target_T must be >= 0, or -1 for none, was {low}")


def check_finite(name: str, hidden_TD: torch.Tensor) -> None:
    """NaN or infinity in hidden states. Costs one pass on a CPU; on a GPU the answer would stall the stream, so there
    NaN goes through to every number of its token."""
    if hidden_TD.device.type != "cpu" or hidden_TD.numel() == 0:
        return
    # One number per row, to spare a mask of [T, D]. A sum of finite fp64 numbers may overflow: only then look closer.
    suspects_T = ~torch.isfinite(hidden_TD.sum(-1, dtype=torch.float64))
    for row in suspects_T.nonzero()[:, 0].tolist():
        values_D = hidden_TD[row]
        broken = values_D[~values_D.isfinite()]
        if broken.numel():
            raise ValueError(f"{name} must be finite, row {row} (of the tokens that count) holds {broken[:1].tolist()}")
