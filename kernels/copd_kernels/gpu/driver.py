"""The operations on a GPU: chunks of tokens, and for each the kernels and the matrix products in their order.

The functions are those of copd_kernels/_driver.py. Two plans for statistics and gradient together:

* **stored**, the default: a chunk's logits are kept, in fp16 and centred for 16-bit inputs, so that the gradient costs
  no second projection: 4 bytes · chunk · V for two heads.
* **low memory**: none are kept; they are made again for the gradient, a slice of the vocabulary after another. 1 unit
  more per head.

Functions that begin with statistics have no logits to read and always project again. Heads are bf16, fp16 or fp32, each
of its own, on one GPU (on the CPU in Triton's interpreter: tests). Statistics are fp32; gradients are summed up in fp32
and rounded once, to the dtype of the inputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch

from copd_kernels import statistics
from copd_kernels._types import Gradients, Head, Wanted
from copd_kernels.gpu import launch, topk
from copd_kernels.gpu.launch import Launcher, Scale, Stored
from copd_kernels.gpu.targets import check_dtypes, on_device, target_of

# Of 16-bit logits in place of which the gradient is written; half of it where a token takes more memory.
CHUNK_TOKENS = 4096
# Slices of the vocabulary in the low-memory plan: 128 MiB of bf16 gradient for a whole chunk of tokens.
SLICE_ENTRIES = 16_384

Coefficients = Callable[[slice, torch.Tensor, torch.Tensor | None], torch.Tensor]
_P = ParamSpec("_P")
_R = TypeVar("_R")


def _slices(size: int, step: int) -> Iterator[slice]:
    for begin in range(0, size, step):
        yield slice(begin, min(begin + step, size))


def _on_its_device(function: Callable[_P, _R]) -> Callable[_P, _R]:
    @functools.wraps(function)
    def call(*args: _P.args, **options: _P.kwargs) -> _R:
        head = args[0]
        assert isinstance(head, Head)
        device = head.hidden_TD.device
        # Without an outer autocast: the heads have their dtype already, and fp32 sums are to stay what they are.
        with on_device(device), torch.autocast(device.type, enabled=False):
            return function(*args, **options)

    return call


class _Pass:
    """One walk over the [T, V] plane of one head, or of a student's and a teacher's, chunk after chunk."""

    def __init__(
        self,
        student: Head,
        teacher: Head | None,
        target_T: torch.Tensor | None,
        temperature: float,
        softcap: float,
        *,
        second_beta: float | None = None,
        chunk_tokens: int = 0,
        v_begin: int = 0,
        use_tma: bool | None = None,
    ) -> None:
        heads = (student,) if teacher is None else (student, teacher)
        check_dtypes(*heads)
        target = target_of(student.hidden_TD.device)
        self.launcher = Launcher(target, Scale(temperature, softcap), tuple(map(_kernel_head, heads)), use_tma=use_tma)
        self.student, self.second_beta = student, second_beta
        self.num_tokens, self.vocab_size = student.hidden_TD.shape[0], student.weight_VD.shape[0]
        self.chunk_tokens = chunk_tokens or _chunk_tokens(self.launcher.heads, with_second=second_beta is not None)
        self.target_T = _targets(target_T, student.hidden_TD, v_begin, self.vocab_size)

    @property
    def num_rows(self) -> int:
        return statistics.NUM_SINGLE if len(self.launcher.heads) == 1 else statistics.NUM_DUAL

    def chunks(self) -> Iterator[slice]:
        return _slices(self.num_tokens, self.chunk_tokens)

    def empty(self, num_rows: int) -> torch.Tensor:
        return torch.empty((num_rows, self.num_tokens), dtype=torch.float32, device=self.target_T.device)

    def new_stored(self) -> Stored | None:
        """A workspace for the logits of a chunk."""
        if not self.num_tokens:
            return None
        size = min(self.chunk_tokens, self.num_tokens)
        return launch.new_stored(size, self.launcher.heads, with_second=self.second_beta is not None)

    def statistics(
        self, tokens: slice, stored: Stored | None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Statistics, second pass and partial statistics of a chunk; fills ``stored``."""
        target_C = self.target_T[tokens]
        partial = self.launcher.statistics(tokens, target_C, stored)
        stats_FC, beta = self.launcher.merge(partial), self.second_beta
        if beta is None:
            return stats_FC, None, partial
        params, num_tokens = launch.dual_params(stats_FC), target_C.shape[0]
        if stored is None:
            return stats_FC, self.launcher.second(tokens, params, num_tokens, beta), partial
        return stats_FC, self.launcher.second_of_stored(stored, params, num_tokens, beta), partial

    def params(self, stats_FC: torch.Tensor, second_3C: torch.Tensor | None, coefs: torch.Tensor) -> torch.Tensor:
        if len(self.launcher.heads) == 1:
            return launch.single_params(stats_FC, coefs)
        return launch.dual_params(stats_FC, second_3C, coefs)

    def add_again(self, gradient: _Gradient, tokens: slice, params: torch.Tensor, slice_entries: int) -> None:
        """Make the logits of a chunk again, slice by slice, and add the gradient that they make."""
        for columns in _slices(self.vocab_size, slice_entries):
            grad_CV = self.launcher.gradient(tokens, columns, params, self.target_T[tokens], self.second_beta)
            gradient.add(tokens, columns, grad_CV)
        gradient.finish(tokens)

    def add_stored(
        self, gradient: _Gradient, tokens: slice, params: torch.Tensor, stored: Stored, partial: torch.Tensor
    ) -> None:
        """Make the gradient of a chunk from its stored logits, and add it."""
        grad_CV = self.launcher.gradient_of_stored(stored, partial, params, self.target_T[tokens], self.second_beta)
        gradient.add(tokens, slice(0, self.vocab_size), grad_CV)
        gradient.finish(tokens)

    def gradient(
        self, stats_FT: torch.Tensor, second_3T: torch.Tensor | None, coefs: torch.Tensor, wanted: Wanted
    ) -> Gradients:
        """Gradients from the statistics of the whole vocabulary, without logits."""
        gradient = _Gradient(self.student, wanted)
        if any(wanted):
            for tokens in self.chunks():
                second_3C = None if second_3T is None else second_3T[:, tokens]
                params = self.params(stats_FT[:, tokens], second_3C, coefs[:, tokens])
                self.add_again(gradient, tokens, params, SLICE_ENTRIES)
        return gradient.result()


def _kernel_head(head: Head) -> Head:
    bias_V = None if head.bias_V is None else head.bias_V.float().contiguous()
    return Head(head.hidden_TD.contiguous(), head.weight_VD.contiguous(), bias_V)


def _chunk_tokens(heads: tuple[Head, ...], *, with_second: bool) -> int:
    """Tokens of a chunk: as many as keep its logits and their gradient at about 2.5 GB for V = 151,936."""
    stored = launch.stored_dtype(heads, with_second=with_second)
    in_place = stored.itemsize == launch.gradient_dtype(heads[0]).itemsize
    return CHUNK_TOKENS if stored.itemsize == 2 and in_place else CHUNK_TOKENS // 2


def _targets(target_T: torch.Tensor | None, hidden_TD: torch.Tensor, v_begin: int, vocab_size: int) -> torch.Tensor:
    """Columns of the targets int32 ``[T]`` (half the registers of an int64), -1 outside this part of the vocabulary."""
    if target_T is None:
        return torch.full((hidden_TD.shape[0],), -1, dtype=torch.int32, device=hidden_TD.device)
    column_T = target_T - v_begin
    return torch.where((column_T >= 0) & (column_T < vocab_size), column_T, -1).to(torch.int32)


class _Gradient:
    """Gradients of hidden, weight and bias, fp32 until they are complete: thousands of bf16 additions lose a sum."""

    def __init__(self, head: Head, wanted: Wanted) -> None:
        self._head = head
        hidden_TD, weight_VD, _ = head
        self._hidden_TD = torch.empty_like(hidden_TD) if wanted[0] else None
        self._hidden_CD: torch.Tensor | None = None
        self._weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if wanted[1] else None
        self._bias_V = weight_VD.new_zeros(weight_VD.shape[0], dtype=torch.float32) if wanted[2] else None

    def add(self, tokens: slice, columns: slice, grad_CV: torch.Tensor) -> None:
        """One block of the gradient of the logits; those of a chunk of tokens follow each other."""
        hidden_CD = self._head.hidden_TD[tokens]
        if self._bias_V is not None:
            self._bias_V[columns] += grad_CV.sum(0, dtype=torch.float32)
        if self._hidden_TD is not None and self._hidden_CD is None:
            self._hidden_CD = torch.zeros_like(hidden_CD, dtype=torch.float32)
        # In fp32 a sum over the whole vocabulary would lose digits, and the conversion of fp16 weights take memory.
        size = columns.stop - columns.start
        for part in _slices(size, size if grad_CV.dtype == torch.bfloat16 else SLICE_ENTRIES):
            entries, grad_Cv = slice(columns.start + part.start, columns.start + part.stop), grad_CV[:, part]
            if self._hidden_CD is not None:
                _add_product(self._hidden_CD, grad_Cv, self._head.weight_VD[entries])
            if self._weight_VD is not None:
                _add_product(self._weight_VD[entries], grad_Cv.T, hidden_CD)

    def finish(self, tokens: slice) -> None:
        """The chunk has seen the whole vocabulary."""
        if self._hidden_TD is not None and self._hidden_CD is not None:
            self._hidden_TD[tokens] = self._hidden_CD
        self._hidden_CD = None

    def result(self) -> Gradients:
        hidden_TD, weight_VD, bias_V = self._head
        return (
            self._hidden_TD,
            None if self._weight_VD is None else self._weight_VD.to(weight_VD.dtype),
            None if self._bias_V is None else self._bias_V.to(hidden_TD.dtype if bias_V is None else bias_V.dtype),
        )


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b in fp32."""
    if total.is_cuda and a.dtype == b.dtype == torch.bfloat16:
        # Sums of another dtype than the factors: torch 2.10 or later.
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        # Not in place of the total: there its additions would be those of one long sum.
        total += a.float() @ b.float()


@_on_its_device
def single_statistics(
    head: Head,
    target_T: torch.Tensor | None,
    *,
    temperature: float,
    softcap: float,
    chunk_tokens: int = 0,
    v_begin: int = 0,
    use_tma: bool | None = None,
) -> torch.Tensor:
    """Statistics fp32 ``[4, T]`` of one head (copd_kernels/statistics.py). 1 unit.

    ``target_T`` int64 are indices into the whole vocabulary, of which the head is the part from ``v_begin`` on.
    """
    plane = _Pass(
        head, None, target_T, temperature, softcap, chunk_tokens=chunk_tokens, v_begin=v_begin, use_tma=use_tma
    )
    stats_4T = plane.empty(plane.num_rows)
    for tokens in plane.chunks():
        stats_4T[:, tokens] = plane.statistics(tokens, None)[0]
    return stats_4T


@_on_its_device
def dual_statistics(
    student: Head,
    teacher: Head,
    target_T: torch.Tensor | None,
    *,
    temperature: float,
    softcap: float,
    second_beta: float | None = None,
    top_k: int = 0,
    chunk_tokens: int = 0,
    v_begin: int = 0,
    low_memory: bool = False,
    use_tma: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Statistics fp32 ``[12, T]``; with ``second_beta`` (sum min(p, q), JSD_beta, E_p[log(p / m)]) ``[3, T]``; with
    ``top_k`` > 0 the share of the top k that both have in common, ``[T]``. 2 units, and 2 for the top k.

    ``low_memory``: the second pass projects again, 2 units more.
    """
    plane = _Pass(
        student,
        teacher,
        target_T,
        temperature,
        softcap,
        second_beta=second_beta,
        chunk_tokens=chunk_tokens,
        v_begin=v_begin,
        use_tma=use_tma,
    )
    stats_FT, second_3T = plane.empty(plane.num_rows), None if second_beta is None else plane.empty(3)
    stored = None if second_beta is None or low_memory else plane.new_stored()
    for tokens in plane.chunks():
        stats_FT[:, tokens], second_3C, _ = plane.statistics(tokens, stored)
        if second_3T is not None and second_3C is not None:
            second_3T[:, tokens] = second_3C
    return stats_FT, second_3T, topk.topk_overlap(student, teacher, top_k=top_k) if top_k else None


@_on_its_device
def single_gradient(
    head: Head,
    target_T: torch.Tensor | None,
    stats_4T: torch.Tensor,
    coefs_3T: torch.Tensor,
    *,
    temperature: float,
    softcap: float,
    wanted: Wanted,
    chunk_tokens: int = 0,
    v_begin: int = 0,
    use_tma: bool | None = None,
) -> Gradients:
    """Gradients of hidden, weight and bias for p (a + e (log p + H)) + o [v = target], ``coefs_3T`` = (a, e, o), from
    the statistics of the whole vocabulary. 1 unit again, and 1 for each product."""
    plane = _Pass(
        head, None, target_T, temperature, softcap, chunk_tokens=chunk_tokens, v_begin=v_begin, use_tma=use_tma
    )
    return plane.gradient(stats_4T, None, coefs_3T, wanted)


@_on_its_device
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
    chunk_tokens: int = 0,
    v_begin: int = 0,
    use_tma: bool | None = None,
) -> Gradients:
    """Gradients of the student's hidden, weight and bias; ``coefs_6T`` = (a, e, o, reverse, forward, jsd). Without
    ``second_3T`` the last counts as 0. 2 units again, and 1 for each product."""
    plane = _Pass(
        student,
        teacher,
        target_T,
        temperature,
        softcap,
        second_beta=None if second_3T is None else beta,
        chunk_tokens=chunk_tokens,
        v_begin=v_begin,
        use_tma=use_tma,
    )
    return plane.gradient(stats_12T, second_3T, coefs_6T, wanted)


@_on_its_device
def fused(
    student: Head,
    teacher: Head | None,
    target_T: torch.Tensor | None,
    *,
    coefficients: Coefficients,
    second_beta: float | None,
    top_k: int,
    temperature: float,
    softcap: float,
    wanted: Wanted,
    chunk_tokens: int = 0,
    low_memory: bool = False,
    use_tma: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, Gradients]:
    """Statistics, ``coefficients(tokens, stats, second)`` of them, and the gradients that these make, chunk by chunk.

    The coefficients are the rows of ``single_gradient`` or ``dual_gradient``. 1 unit per head and 1 for each product;
    ``low_memory`` 1 more per head; the overlap of the top k 2 more.
    """
    plane = _Pass(
        student,
        teacher,
        target_T,
        temperature,
        softcap,
        second_beta=second_beta,
        chunk_tokens=chunk_tokens,
        use_tma=use_tma,
    )
    gradient = _Gradient(student, wanted)
    stats_FT, second_3T = plane.empty(plane.num_rows), None if second_beta is None else plane.empty(3)
    reads_logits = any(wanted) or second_beta is not None
    stored = plane.new_stored() if reads_logits and not low_memory else None
    for tokens in plane.chunks():
        stats_FC, second_3C, partial = plane.statistics(tokens, stored)
        stats_FT[:, tokens] = stats_FC
        if second_3T is not None and second_3C is not None:
            second_3T[:, tokens] = second_3C
        if not any(wanted):
            continue
        params = plane.params(stats_FC, second_3C, coefficients(tokens, stats_FC, second_3C))
        if stored is None:
            plane.add_again(gradient, tokens, params, SLICE_ENTRIES)
        else:
            plane.add_stored(gradient, tokens, params, stored, partial)
    overlap_T = None
    if teacher is not None and top_k:
        overlap_T = topk.topk_overlap(student, teacher, top_k=top_k)
    return stats_FT, second_3T, overlap_T, gradient.result()


@_on_its_device
def topk_overlap(student: Head, teacher: Head, *, top_k: int, chunk_tokens: int = 0) -> torch.Tensor:
    """Overlap of the top k, fp32 ``[T]``, ``top_k`` at most 32. 2 units. No logits leave the chip, so there is nothing
    that ``chunk_tokens`` would bound."""
    return topk.topk_overlap(student, teacher, top_k=top_k)
