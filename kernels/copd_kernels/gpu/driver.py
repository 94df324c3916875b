"""The operations on a GPU: chunks of tokens, and for each the kernels and the matrix products in their order.

Two plans. The default stores a chunk's logits, fp16 and centred, so that statistics and gradient cost one product per
head: 4 bytes · chunk · V for two heads. ``recompute`` stores none and makes them again for the gradient, one slice of
the vocabulary after another. Backward functions that start from statistics have no logits to read and always do that,
with the whole vocabulary as one slice unless ``recompute`` asks for less.

Inputs are validated and compacted, bf16, fp16 or fp32, on one GPU (on the CPU in Triton's interpreter: tests).
Statistics fp32; gradients: hidden in the dtype of the inputs, weight and bias fp32 (summed over all tokens).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from copd_kernels._types import Gradients, Head, Wanted
from copd_kernels.gpu import launch
from copd_kernels.gpu.launch import Launcher, Scale, Stored
from copd_kernels.gpu.targets import target_of
from copd_kernels.gpu.topk import topk_overlap

__all__ = ["dual_gradient", "dual_statistics", "fused", "single_gradient", "single_statistics", "topk_overlap"]

CHUNK_TOKENS = 4096
# Slices of the vocabulary in the low-memory plan: 128 MiB of bf16 gradient for a whole chunk of tokens.
SLICE_ENTRIES = 16_384

Coefficients = Callable[[slice, torch.Tensor, torch.Tensor | None], torch.Tensor]


def _chunks(size: int, chunk: int) -> Iterator[slice]:
    for begin in range(0, size, chunk):
        yield slice(begin, min(begin + chunk, size))


def _contiguous(head: Head) -> Head:
    if head.hidden_TD.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"hidden states must be bfloat16, float16 or float32 on a GPU, were {head.hidden_TD.dtype}")
    bias_V = None if head.bias_V is None else head.bias_V.float().contiguous()
    return Head(head.hidden_TD.contiguous(), head.weight_VD.contiguous(), bias_V)


def _targets(target_T: torch.Tensor | None, hidden_TD: torch.Tensor) -> torch.Tensor:
    """int32 ``[T]``: half the registers of an int64; -1, which no entry is, without targets."""
    if target_T is None:
        return torch.full((hidden_TD.shape[0],), -1, dtype=torch.int32, device=hidden_TD.device)
    return target_T.to(torch.int32)


def _launcher(scale: Scale, use_tma: bool | None, *heads: Head) -> Launcher:
    return Launcher(target_of(heads[0].hidden_TD.device), scale, tuple(map(_contiguous, heads)), use_tma=use_tma)


class _Backward:
    """Gradients of hidden, weight and bias, summed over chunks of tokens and slices of the vocabulary."""

    def __init__(self, head: Head, wanted: Wanted, *, sliced: bool) -> None:
        self._head, self._wanted = head, wanted
        like = head.hidden_TD
        # Slices of the vocabulary add up in it.
        self._hidden_dtype = torch.float32 if sliced else like.dtype
        self.hidden_TD = torch.empty_like(like) if wanted[0] else None
        self.weight_VD = like.new_zeros(head.weight_VD.shape, dtype=torch.float32) if wanted[1] else None
        self.bias_V = like.new_zeros(head.weight_VD.shape[0], dtype=torch.float32) if wanted[2] else None

    def add(self, tokens: slice, columns: slice, grad_CV: torch.Tensor, hidden_CD: torch.Tensor | None) -> torch.Tensor | None:
        """Add one block; returns the gradient of the hidden states so far, to be passed on with the next slice."""
        head = self._head
        if self.weight_VD is not None:
            _add_product(self.weight_VD[columns], grad_CV.T, head.hidden_TD[tokens])
        if self.bias_V is not None:
            self.bias_V[columns] += grad_CV.sum(0, dtype=torch.float32)
        if self.hidden_TD is None:
            return None
        if self._hidden_dtype == grad_CV.dtype and hidden_CD is None:
            return grad_CV @ head.weight_VD[columns]
        if hidden_CD is None:
            hidden_CD = torch.zeros_like(self.hidden_TD[tokens], dtype=torch.float32)
        _add_product(hidden_CD, grad_CV, head.weight_VD[columns])
        return hidden_CD

    def finish(self, tokens: slice, hidden_CD: torch.Tensor | None) -> None:
        if self.hidden_TD is not None and hidden_CD is not None:
            self.hidden_TD[tokens] = hidden_CD

    @property
    def gradients(self) -> Gradients:
        return self.hidden_TD, self.weight_VD, self.bias_V


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b, fp32: thousands of bf16 additions would lose the sum."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())


def _statistics(
    launcher: Launcher,
    target_T: torch.Tensor,
    second_beta: float | None,
    *,
    chunk_tokens: int,
    recompute: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    num_tokens, num_rows = target_T.shape[0], 4 if len(launcher.heads) == 1 else 12
    stats_FT = torch.empty((num_rows, num_tokens), dtype=torch.float32, device=target_T.device)
    second_3T = None if second_beta is None else torch.empty_like(stats_FT[:3])
    stored = None
    if second_beta is not None and not recompute and num_tokens:
        stored = launch.new_stored(min(chunk_tokens, num_tokens), launcher.heads)
    for tokens in _chunks(num_tokens, chunk_tokens):
        stats_FC, second_3C, _ = _chunk_statistics(launcher, tokens, target_T[tokens], second_beta, stored)
        stats_FT[:, tokens] = stats_FC
        if second_3T is not None and second_3C is not None:
            second_3T[:, tokens] = second_3C
    return stats_FT, second_3T


def _chunk_statistics(
    launcher: Launcher, tokens: slice, target_C: torch.Tensor, second_beta: float | None, stored: Stored | None
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Statistics, second pass and partial statistics of a chunk."""
    partial = launcher.statistics(tokens, target_C, stored)
    stats_FC = launcher.merge(partial)
    if second_beta is None:
        return stats_FC, None, partial
    params, num_tokens = launch.dual_params(stats_FC), target_C.shape[0]
    if stored is None:
        return stats_FC, launcher.second(tokens, params, num_tokens, second_beta), partial
    return stats_FC, launcher.second_of_stored(stored, partial, params, num_tokens, second_beta), partial


def _add_chunk(
    launcher: Launcher,
    backward: _Backward,
    tokens: slice,
    params: torch.Tensor,
    target_C: torch.Tensor,
    beta: float | None,
    slice_entries: int,
) -> None:
    """Make the logits of a chunk again, slice by slice, and add its gradients."""
    hidden_CD = None
    for columns in _chunks(launcher.heads[0].weight_VD.shape[0], slice_entries):
        grad_CV = launcher.gradient(tokens, columns, params, target_C, beta)
        hidden_CD = backward.add(tokens, columns, grad_CV, hidden_CD)
    backward.finish(tokens, hidden_CD)


def _gradient(
    launcher: Launcher,
    target_T: torch.Tensor,
    params_of: Callable[[slice], torch.Tensor],
    beta: float | None,
    wanted: Wanted,
    chunk_tokens: int,
    slice_entries: int,
) -> Gradients:
    vocab_size = launcher.heads[0].weight_VD.shape[0]
    backward = _Backward(launcher.heads[0], wanted, sliced=slice_entries < vocab_size)
    if any(wanted):
        for tokens in _chunks(target_T.shape[0], chunk_tokens):
            _add_chunk(launcher, backward, tokens, params_of(tokens), target_T[tokens], beta, slice_entries)
    return backward.gradients


def _slice_entries(head: Head, recompute: bool) -> int:
    return SLICE_ENTRIES if recompute else head.weight_VD.shape[0]


def single_statistics(
    head: Head,
    target_T: torch.Tensor,
    *,
    temperature: float,
    softcap: float,
    chunk_tokens: int = CHUNK_TOKENS,
    use_tma: bool | None = None,
) -> torch.Tensor:
    """Statistics fp32 ``[4, T]`` of one head (copd_kernels/statistics.py); ``target_T`` int64, -1 for none."""
    launcher = _launcher(Scale(temperature, softcap), use_tma, head)
    targets = _targets(target_T, head.hidden_TD)
    return _statistics(launcher, targets, None, chunk_tokens=chunk_tokens, recompute=True)[0]


def dual_statistics(
    student: Head,
    teacher: Head,
    target_T: torch.Tensor | None,
    *,
    temperature: float,
    softcap: float,
    second_beta: float | None,
    top_k: int,
    chunk_tokens: int = CHUNK_TOKENS,
    recompute: bool = False,
    use_tma: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Statistics fp32 ``[12, T]``; with ``second_beta`` (sum min(p, q), JSD_beta, E_p[log(p / m)]) ``[3, T]``; with
    ``top_k`` > 0 the share of the top k that both have in common, ``[T]``."""
    launcher = _launcher(Scale(temperature, softcap), use_tma, student, teacher)
    targets = _targets(target_T, student.hidden_TD)
    stats, second = _statistics(launcher, targets, second_beta, chunk_tokens=chunk_tokens, recompute=recompute)
    return stats, second, topk_overlap(student, teacher, top_k=top_k) if top_k else None


def single_gradient(
    head: Head,
    target_T: torch.Tensor,
    stats_4T: torch.Tensor,
    coefs_3T: torch.Tensor,
    *,
    temperature: float,
    softcap: float,
    wanted: Wanted,
    chunk_tokens: int = CHUNK_TOKENS,
    recompute: bool = False,
    use_tma: bool | None = None,
) -> Gradients:
    """Gradients of hidden, weight and bias for p (a + e (log p + H)) + o [v = target], ``coefs_3T`` = (a, e, o)."""
    launcher = _launcher(Scale(temperature, softcap), use_tma, head)

    def params_of(tokens: slice) -> torch.Tensor:
        return launch.single_params(stats_4T[:, tokens], coefs_3T[:, tokens])

    targets = _targets(target_T, head.hidden_TD)
    return _gradient(launcher, targets, params_of, None, wanted, chunk_tokens, _slice_entries(head, recompute))


def dual_gradient(
    student: Head,
    teacher: Head,
    target_T: torch.Tensor | None,
    stats_12T: torch.Tensor,
    second_3T: torch.Tensor | None,
    coefs_6T: torch.Tensor,
    *,
    beta: float,
    temperature: float,
    softcap: float,
    wanted: Wanted,
    chunk_tokens: int = CHUNK_TOKENS,
    recompute: bool = False,
    use_tma: bool | None = None,
) -> Gradients:
    """Gradients of the student's hidden, weight and bias; ``coefs_6T`` = (a, e, o, reverse, forward, jsd).

    Without ``second_3T`` the last coefficient counts as 0.
    """
    launcher = _launcher(Scale(temperature, softcap), use_tma, student, teacher)

    def params_of(tokens: slice) -> torch.Tensor:
        second_3C = None if second_3T is None else second_3T[:, tokens]
        return launch.dual_params(stats_12T[:, tokens], second_3C, coefs_6T[:, tokens])

    targets = _targets(target_T, student.hidden_TD)
    jsd_beta = None if second_3T is None else beta
    return _gradient(launcher, targets, params_of, jsd_beta, wanted, chunk_tokens, _slice_entries(student, recompute))


def fused(
    student: Head,
    teacher: Head | None,
    target_T: torch.Tensor,
    *,
    coefficients: Coefficients,
    second_beta: float | None,
    temperature: float,
    softcap: float,
    wanted: Wanted,
    chunk_tokens: int = CHUNK_TOKENS,
    recompute: bool = False,
    use_tma: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Statistics, second pass and the gradients of hidden, weight and bias, chunk after chunk.

    ``coefficients(tokens, stats_FC, second_3C)`` gives the rows of ``single_gradient`` or ``dual_gradient``.
    """
    heads = (student,) if teacher is None else (student, teacher)
    launcher = _launcher(Scale(temperature, softcap), use_tma, *heads)
    targets, num_tokens, vocab_size = _targets(target_T, student.hidden_TD), target_T.shape[0], len(student.weight_VD)
    slice_entries = _slice_entries(student, recompute)
    backward = _Backward(launcher.heads[0], wanted, sliced=slice_entries < vocab_size)
    stats_FT = torch.empty((4 if teacher is None else 12, num_tokens), dtype=torch.float32, device=targets.device)
    second_3T = None if second_beta is None else torch.empty_like(stats_FT[:3])
    needs_stored = not recompute and num_tokens > 0 and (any(wanted) or second_beta is not None)
    stored = launch.new_stored(min(chunk_tokens, num_tokens), launcher.heads) if needs_stored else None
    for tokens in _chunks(num_tokens, chunk_tokens):
        target_C = targets[tokens]
        stats_FC, second_3C, partial = _chunk_statistics(launcher, tokens, target_C, second_beta, stored)
        stats_FT[:, tokens] = stats_FC
        if second_3T is not None and second_3C is not None:
            second_3T[:, tokens] = second_3C
        if not any(wanted):
            continue
        coefs = coefficients(tokens, stats_FC, second_3C)
        if teacher is None:
            params = launch.single_params(stats_FC, coefs)
        else:
            params = launch.dual_params(stats_FC, second_3C, coefs)
        if stored is None:
            _add_chunk(launcher, backward, tokens, params, target_C, second_beta, slice_entries)
            continue
        grad_CV = launcher.gradient_of_stored(stored, partial, params, target_C, second_beta)
        backward.finish(tokens, backward.add(tokens, slice(None), grad_CV, None))
    return stats_FT, second_3T, *backward.gradients
