"""The trainer's operation: clipped surrogate and distillation from one student projection, gradients in forward."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from copd_kernels import _backend, _checks, _driver, statistics
from copd_kernels._surrogate import KL_ESTIMATORS
from copd_kernels._types import Head
from copd_kernels.linear_divergence import NUM_FIELDS, Divergence, divergence_columns

DIVERGENCES = ("reverse_kl", "forward_kl", "symmetric_kl", "jsd")
# The per-token outputs of the operation, in this order, before the fields of Divergence.
_COLUMNS = ("logp", "entropy", "ratio", "clipped", "loss", "kl")


class PolicyLoss(NamedTuple):
    """The scalar loss, and without grad, per token: log-prob, entropy, importance ratio, whether the clip cut it, loss,
    KL estimate to the reference, divergences from the teacher (None without one); and how many tokens carry each term.
    """

    loss: torch.Tensor
    logp_T: torch.Tensor
    entropy_T: torch.Tensor
    ratio_T: torch.Tensor
    clipped_T: torch.Tensor
    loss_T: torch.Tensor
    kl_T: torch.Tensor
    teacher: Divergence | None
    num_policy_tokens: torch.Tensor
    num_divergence_tokens: torch.Tensor
    num_kl_tokens: torch.Tensor

    def metrics(self, loss_weight_T: torch.Tensor) -> dict[str, torch.Tensor]:
        """Means over the tokens whose ``loss_weight_T`` is not 0, as 0-dim tensors (NaN without such a token).

        Raises ValueError unless ``loss_weight_T`` is ``[T]``.
        """
        if loss_weight_T.shape != self.logp_T.shape:
            raise ValueError(
                f"loss_weight_T must be [T] with T = {self.logp_T.shape[0]}, was {list(loss_weight_T.shape)}"
            )
        counted_T = loss_weight_T != 0
        columns = {"clip_fraction": self.clipped_T, "ratio": self.ratio_T, "entropy": self.entropy_T, "kl": self.kl_T}
        if self.teacher is not None:
            columns["reverse_kl"] = self.teacher.kl_student_teacher_T
            columns["symmetric_kl"] = self.teacher.symmetric_kl_T
        return {name: column_T[counted_T].to(self.loss.dtype).mean() for name, column_T in columns.items()}


def divergence_value(kind: str, columns: Divergence) -> torch.Tensor:
    """The divergence named ``kind``, ``[T]``."""
    value = {
        "reverse_kl": columns.kl_student_teacher_T,
        "forward_kl": columns.kl_teacher_student_T,
        "symmetric_kl": columns.symmetric_kl_T,
        "jsd": columns.jsd_T,
    }[kind]
    assert value is not None
    return value


@torch.library.custom_op("copd_kernels::linear_policy_loss", mutates_args=())
def _linear_policy_loss(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    target_T: torch.Tensor,
    mask_T: torch.Tensor | None,
    advantage_T: torch.Tensor | None,
    old_logp_T: torch.Tensor | None,
    loss_weight_T: torch.Tensor | None,
    reference_logp_T: torch.Tensor | None,
    kl_weight_T: torch.Tensor | None,
    teacher_hidden_TD: torch.Tensor | None,
    teacher_weight_VD: torch.Tensor | None,
    teacher_bias_V: torch.Tensor | None,
    divergence_weight_T: torch.Tensor | None,
    clip_low: float,
    clip_high: float,
    kl_estimator: str,
    divergence: str,
    jsd_beta: float,
    top_k: int,
    vocab_size: int,
    temperature: float,
    softcap: float,
    chunk_tokens: int,
    low_memory: bool,
    wanted: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss ``[]``, columns ``[6 (+ 11), T]``, counts ``[3]``, gradients of hidden, weight and bias."""
    tokens = _backend.Tokens(mask_T)
    student = tokens.head(Head(hidden_TD, weight_VD, bias_V), vocab_size, name="hidden_TD")
    teacher = None
    if teacher_hidden_TD is not None and teacher_weight_VD is not None:
        head = Head(teacher_hidden_TD, teacher_weight_VD, teacher_bias_V)
        teacher = tokens.head(head, vocab_size, name="teacher_hidden_TD")
    target_T = tokens.take(target_T)
    _checks.check_target_values(target_T, vocab_size)
    dtype = _driver.statistics_dtype(student, teacher)
    surrogate = functools.partial(
        _backend.surrogate(hidden_TD.device), clip_low=clip_low, clip_high=clip_high, kl_estimator=kl_estimator
    )
    per_token = [
        None if values_T is None else tokens.take(values_T).to(dtype)
        for values_T in (advantage_T, old_logp_T, loss_weight_T, reference_logp_T, kl_weight_T)
    ]
    divergence_weight_T = None if divergence_weight_T is None else tokens.take(divergence_weight_T).to(dtype)

    def coefficients(rows: slice, stats_FC: torch.Tensor, _: torch.Tensor | None) -> torch.Tensor:
        logp_C = statistics.head_finals(stats_FC).logp_T
        part = surrogate(logp_C, *(None if values_T is None else values_T[rows] for values_T in per_token))
        zeros_C = torch.zeros_like(logp_C)
        coefs = [-part.grad_logp_T, zeros_C, part.grad_logp_T]
        if teacher is not None:
            weight_C = zeros_C if divergence_weight_T is None else divergence_weight_T[rows]
            coefs += [
                weight_C if divergence in ("reverse_kl", "symmetric_kl") else zeros_C,
                weight_C if divergence in ("forward_kl", "symmetric_kl") else zeros_C,
                (1 - jsd_beta) * weight_C if divergence == "jsd" else zeros_C,
            ]
        return torch.stack(coefs)

    stats, second, overlap, gradients = _backend.driver(hidden_TD.device).fused(
        student,
        teacher,
        target_T,
        coefficients=coefficients,
        second_beta=jsd_beta if divergence == "jsd" and teacher is not None else None,
        top_k=top_k if teacher is not None else 0,
        temperature=temperature,
        softcap=softcap,
        wanted=tuple(wanted),
        chunk_tokens=chunk_tokens,
        low_memory=low_memory,
    )
    logp_T, entropy_T, _ = statistics.head_finals(stats)
    whole = surrogate(logp_T, *per_token)
    loss_T = whole.loss_T
    columns = torch.stack([logp_T, entropy_T, whole.ratio_T, whole.clipped_T.to(dtype), loss_T, whole.kl_T])
    if teacher is not None:
        teacher_columns = divergence_columns(stats, second, overlap)
        if divergence_weight_T is not None:
            value_T = divergence_value(divergence, Divergence(*teacher_columns))
            # 0 times an infinite divergence: the token has no divergence term.
            columns[4] += torch.where(divergence_weight_T == 0, 0, divergence_weight_T * value_T)
        columns = torch.cat([columns, teacher_columns])
    counts = torch.stack(
        [
            torch.zeros((), dtype=torch.int64, device=hidden_TD.device) if weight is None else (weight != 0).sum()
            for weight in (per_token[2], divergence_weight_T, per_token[4])
        ]
    )
    return columns[4].sum(), tokens.put_last(columns), counts, *_backend.pad_gradients(gradients, tokens, weight_VD)


@_linear_policy_loss.register_fake
def _(
    hidden_TD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, *arguments: Any
) -> tuple[torch.Tensor, ...]:
    teacher_hidden_TD, teacher_weight_VD, wanted = arguments[7], arguments[8], arguments[-1]
    head = Head(hidden_TD, weight_VD, bias_V)
    teacher = None if teacher_hidden_TD is None else Head(teacher_hidden_TD, teacher_weight_VD, None)
    dtype = _driver.statistics_dtype(head, teacher)
    num_columns = len(_COLUMNS) + (0 if teacher is None else NUM_FIELDS)
    return (
        hidden_TD.new_empty((), dtype=dtype),
        hidden_TD.new_empty((num_columns, hidden_TD.shape[0]), dtype=dtype),
        hidden_TD.new_empty(3, dtype=torch.int64),
        *_backend.fake_gradients(head, wanted),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    # Otherwise autograd makes zeros for the outputs without a gradient, one of them as large as the weight.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*(x for x in inputs if isinstance(x, torch.Tensor)))
    ctx.is_tensor = [isinstance(x, torch.Tensor) for x in inputs]
    ctx.others = [None if isinstance(x, torch.Tensor) else x for x in inputs]
    ctx.gradients = list(output[3:])


@torch.library.custom_op("copd_kernels::linear_policy_loss_backward", mutates_args=())
def _scaled(
    gradient: torch.Tensor,
    grad_loss: torch.Tensor,
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
) -> torch.Tensor:
    """The gradient in a graph of its own, where it depends on the inputs: to differentiate it again is an error."""
    return gradient * grad_loss.to(gradient.dtype)


@_scaled.register_fake
def _(gradient: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(gradient)


def _backward(ctx: Any, grad_loss: torch.Tensor | None, *_: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Scale the gradients of forward in place and give them away: no second copy of dW ever exists.

    A second backward over the same graph finds them gone, and computes them again.
    """
    if grad_loss is None:
        return (None,) * len(ctx.others)
    tensors = iter(ctx.saved_tensors)
    inputs = [next(tensors) if tensor else other for tensor, other in zip(ctx.is_tensor, ctx.others, strict=True)]
    gradients, ctx.gradients = ctx.gradients, None
    if gradients is None:
        gradients = list(_linear_policy_loss(*inputs)[3:])
    wanted = ctx.others[-1]
    scaled: list[torch.Tensor | None] = []
    for gradient, want in zip(gradients, wanted, strict=True):
        if not want:
            scaled.append(None)
        elif torch.is_grad_enabled():
            scaled.append(_scaled(gradient, grad_loss, *inputs[:3]))
        elif type(grad_loss) is torch.Tensor:
            scaled.append(gradient.mul_(grad_loss))
        else:
            # Under torch.compile tensors are traced as subclasses of Tensor; there the compiler places the buffers.
            scaled.append(gradient * grad_loss)
    return (*scaled, *(None,) * (len(ctx.others) - 3))


_linear_policy_loss.register_autograd(_backward, setup_context=_setup_context)


def linear_policy_loss(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    target_T: torch.Tensor,
    *,
    advantage_T: torch.Tensor | None = None,
    old_logp_T: torch.Tensor | None = None,
    loss_weight_T: torch.Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    reference_logp_T: torch.Tensor | None = None,
    kl_weight_T: torch.Tensor | None = None,
    kl_estimator: str = "k3",
    teacher_hidden_TD: torch.Tensor | None = None,
    teacher_weight_VD: torch.Tensor | None = None,
    teacher_bias_V: torch.Tensor | None = None,
    divergence: str = "reverse_kl",
    divergence_weight_T: torch.Tensor | None = None,
    jsd_beta: float = 0.5,
    top_k: int = 0,
    bias_V: torch.Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    mask_T: torch.Tensor | None = None,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
    low_memory: bool = False,
) -> PolicyLoss:
    """The sum over tokens of up to three terms, from one projection of the student (and one of the teacher):

    * policy, ``-w_t min(rho_t A_t, clip(rho_t, 1 - clip_low, 1 + clip_high) A_t)``: (SURROGATE), arXiv 2604.27083, with
      rho_t = exp(logp_t - old_logp_t), (RATIO). ``advantage_T`` is any per-token advantage, (GRPO-ADV) or (OPD-ADV);
      ``loss_weight_T`` holds the normalisation, 1 / (G |y_i|) times the weight of the term. All three or none.
    * distillation, ``divergence_weight_T`` times the exact divergence from the teacher over the vocabulary:
      ``reverse_kl`` KL(student || teacher), ``forward_kl``, ``symmetric_kl`` (their sum) or ``jsd`` (``jsd_beta``).
      A teacher without weights is only measured.
    * a KL to a reference policy from its log-probs of the targets: ``kl_weight_T`` times ``k1`` (logp - ref), ``k2``
      (half its square) or ``k3`` (exp(ref - logp) - 1 - (ref - logp)), differentiated as written.

    Per-token arguments are floating ``[T]`` without grad; the others are those of
    :func:`copd_kernels.linear_divergence`. ``top_k`` > 0 (on a GPU at most 32) measures the overlap with the
    teacher as well. ``low_memory``: no logits of a chunk are stored, they are made again for the gradient: less memory,
    2 units more (1 without a teacher).

    Returns the scalar ``loss`` in fp32 (fp64 for fp64 inputs), differentiable once with respect to hidden, weight and
    bias, and detached per-token tensors; ``loss_T`` sums to the loss. ``clipped_T`` is True where the token's gradient
    is cut: rho > 1 + clip_high with A > 0, or rho < 1 - clip_low with A < 0. ``num_*_tokens`` count weights other than
    0. The gradients are computed in forward, in the memory of one chunk of logits; a frozen weight costs nothing. A
    loss that is scaled afterwards scales them as they are: by a factor other than a power of two 16 bits round twice.

    Raises ValueError on what the other operations raise it for, on a per-token argument that requires grad, on terms
    with arguments missing, clip_low outside [0, 1], clip_high < 0, an unknown divergence or estimator.
    """
    head = _backend.autocast_head(Head(hidden_TD, weight_VD, bias_V))
    teacher: tuple[torch.Tensor | None, ...] = (None, None, None)
    common = vocab_size or weight_VD.shape[0]
    if (teacher_hidden_TD is None) != (teacher_weight_VD is None):
        raise ValueError("teacher_hidden_TD and teacher_weight_VD go together, was given one of them")
    if teacher_hidden_TD is not None and teacher_weight_VD is not None:
        teacher_bias_V = None if teacher_bias_V is None else teacher_bias_V.detach()
        teacher = _backend.autocast_head(Head(teacher_hidden_TD.detach(), teacher_weight_VD.detach(), teacher_bias_V))
        _checks.check_head(head, vocab_size)
        common = _checks.check_pair(head, Head(*teacher), vocab_size)
    elif unused := [
        name
        for name, is_given in {
            "divergence_weight_T": divergence_weight_T is not None,
            "teacher_bias_V": teacher_bias_V is not None,
            "top_k": top_k != 0,
        }.items()
        if is_given
    ]:
        raise ValueError(f"{', '.join(unused)} needs a teacher: give teacher_hidden_TD and teacher_weight_VD")
    else:
        _checks.check_head(head, vocab_size)
    _checks.check_target(target_T, hidden_TD)
    _checks.check_mask(mask_T, hidden_TD)
    policy = {"advantage_T": advantage_T, "old_logp_T": old_logp_T, "loss_weight_T": loss_weight_T}
    reference = {"reference_logp_T": reference_logp_T, "kl_weight_T": kl_weight_T}
    for term in (policy, reference):
        missing = [name for name, values_T in term.items() if values_T is None]
        if missing and len(missing) < len(term):
            raise ValueError(f"{', '.join(term)} go together, missing {', '.join(missing)}")
    for name, values_T in {**policy, **reference, "divergence_weight_T": divergence_weight_T}.items():
        if values_T is not None:
            _checks.check_per_token(name, values_T, hidden_TD)
    _checks.check_scale(temperature, softcap)
    _checks.check_chunk_tokens(chunk_tokens)
    _checks.check_jsd_beta(jsd_beta)
    if top_k:
        _checks.check_top_k(top_k, common)
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, was {divergence!r}")
    if kl_estimator not in KL_ESTIMATORS:
        raise ValueError(f"kl_estimator must be one of {', '.join(KL_ESTIMATORS)}, was {kl_estimator!r}")
    if not 0 <= clip_low <= 1:
        raise ValueError(f"clip_low must lie in [0, 1], was {clip_low}")
    if not clip_high >= 0:
        raise ValueError(f"clip_high must be >= 0, was {clip_high}")
    loss, columns, counts, *_ = _linear_policy_loss(
        *head,
        target_T,
        mask_T,
        advantage_T,
        old_logp_T,
        loss_weight_T,
        reference_logp_T,
        kl_weight_T,
        *teacher,
        divergence_weight_T,
        float(clip_low),
        float(clip_high),
        kl_estimator,
        divergence,
        float(jsd_beta),
        top_k,
        common,
        float(temperature),
        float(softcap or 0),
        chunk_tokens or 0,
        low_memory,
        _backend.wanted_gradients(head),
    )
    logp_T, entropy_T, ratio_T, clipped_T, loss_T, kl_T, *fields = columns.unbind()
    measured = None
    if fields:
        measured = Divergence(*fields)._replace(overlap_T=fields[5] if top_k else None)
        if divergence != "jsd":
            # The second pass over the logits is made where the JSD asks for it.
            measured = measured._replace(sum_min_T=None, jsd_T=None)
    return PolicyLoss(loss, logp_T, entropy_T, ratio_T, clipped_T.bool(), loss_T, kl_T, measured, *counts.unbind())
