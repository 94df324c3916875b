"""Top-k overlap of two policies alone, for diagnostics."""

from __future__ import annotations

from typing import Any

import torch

from copd_kernels import _backend, _checks
from copd_kernels._types import Head


@torch.library.custom_op("copd_kernels::topk_overlap", mutates_args=())
def _topk_overlap(
    student_hidden_TD: torch.Tensor,
    student_weight_VD: torch.Tensor,
    student_bias_V: torch.Tensor | None,
    teacher_hidden_TD: torch.Tensor,
    teacher_weight_VD: torch.Tensor,
    teacher_bias_V: torch.Tensor | None,
    mask_T: torch.Tensor | None,
    vocab_size: int,
    top_k: int,
    chunk_tokens: int,
) -> torch.Tensor:
    tokens = _backend.Tokens(mask_T)
    student = tokens.head(
        Head(student_hidden_TD, student_weight_VD, student_bias_V), vocab_size, name="student_hidden_TD"
    )
    teacher = tokens.head(
        Head(teacher_hidden_TD, teacher_weight_VD, teacher_bias_V), vocab_size, name="teacher_hidden_TD"
    )
    overlap_T = _backend.driver(student_hidden_TD.device).topk_overlap(
        student, teacher, top_k=top_k, chunk_tokens=chunk_tokens
    )
    return tokens.put(overlap_T)


@_topk_overlap.register_fake
def _(student_hidden_TD: torch.Tensor, *_: Any) -> torch.Tensor:
    return student_hidden_TD.new_empty(student_hidden_TD.shape[0], dtype=torch.float32)


def topk_overlap(
    student_hidden_TD: torch.Tensor,
    student_weight_VD: torch.Tensor,
    teacher_hidden_TD: torch.Tensor,
    teacher_weight_VD: torch.Tensor,
    *,
    top_k: int = 10,
    student_bias_V: torch.Tensor | None = None,
    teacher_bias_V: torch.Tensor | None = None,
    mask_T: torch.Tensor | None = None,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
) -> torch.Tensor:
    """|TopK(student) ∩ TopK(teacher)| / k per token, (OVERLAP), arXiv 2604.27083: fp32 ``[T]``, without grad.

    Arguments as in :func:`copd_kernels.linear_divergence`; temperature and softcap do not change the order of logits.
    Ties go to the lower index. NaN in a row of logits gives NaN. 0 for masked tokens.

    Raises ValueError as :func:`copd_kernels.linear_divergence` does.
    """
    heads = (
        Head(student_hidden_TD, student_weight_VD, student_bias_V),
        Head(teacher_hidden_TD, teacher_weight_VD, teacher_bias_V),
    )
    student, teacher = (
        _backend.autocast_head(Head(*(None if x is None else x.detach() for x in head)))  # type: ignore[arg-type]
        for head in heads
    )
    common = _checks.check_pair(student, teacher, vocab_size)
    _checks.check_mask(mask_T, student_hidden_TD)
    _checks.check_top_k(top_k, common)
    _checks.check_chunk_tokens(chunk_tokens)
    return _topk_overlap(*student, *teacher, mask_T, common, top_k, chunk_tokens or 0)
