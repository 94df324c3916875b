"""Every bad argument of every public operation: a ValueError with its name, what it was and what it must be."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from copd_kernels import (
    group_advantages,
    linear_divergence,
    linear_logprob,
    linear_policy_loss,
    merge_statistics,
    reference,
    statistics,
    topk_overlap,
    vocab_parallel,
)

T, D, V = 3, 4, 15
HIDDEN, WEIGHT, BIAS = torch.zeros(T, D), torch.zeros(V, D), torch.zeros(V)
TARGET, ONES = torch.zeros(T, dtype=torch.int64), torch.ones(T)
NAN, INF = math.nan, math.inf


def filled(value: float, row: int = 1) -> torch.Tensor:
    """Hidden states with one bad number."""
    hidden = HIDDEN.clone()
    hidden[row, 2] = value
    return hidden


HEAD = {"hidden_TD": HIDDEN, "weight_VD": WEIGHT, "bias_V": BIAS}
PAIR = {f"{who}_{name}": x for who in ("student", "teacher") for name, x in HEAD.items()}
TEACHER = {f"teacher_{name}": x for name, x in HEAD.items()}
POLICY = {"advantage_T": ONES, "old_logp_T": -ONES, "loss_weight_T": ONES}
KL = {"reference_logp_T": -ONES, "kl_weight_T": ONES}
SHARD = {"vocab_begin": 0}
# Statistics in the shapes that the gradients of a shard want.
MERGED_4T = vocab_parallel.single_statistics(HIDDEN, WEIGHT, TARGET, vocab_begin=0)
MERGED_12T = vocab_parallel.dual_statistics(HIDDEN, WEIGHT, HIDDEN, WEIGHT, TARGET, vocab_begin=0)
REWARDS = {"rewards_B": torch.tensor([0.0, 1.0, 2.0]), "group_ids_B": torch.tensor([0, 0, 1])}


def aten_group_advantages(
    rewards_B: torch.Tensor, group_ids_B: torch.Tensor, *, mode: str = "population", eps: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    return reference.group_advantages(rewards_B, group_ids_B, mode, eps)


# What each operation takes without complaint; a case replaces or adds arguments.
GOOD: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "linear_logprob": (linear_logprob, {**HEAD, "target_T": TARGET}),
    "linear_divergence": (linear_divergence, {**PAIR, "target_T": TARGET}),
    "topk_overlap": (topk_overlap, PAIR),
    "linear_policy_loss": (
        linear_policy_loss,
        {**HEAD, **TEACHER, **POLICY, **KL, "target_T": TARGET, "divergence_weight_T": ONES},
    ),
    "group_advantages": (group_advantages, REWARDS),
    "reference.group_advantages": (aten_group_advantages, REWARDS),
    "single_statistics": (vocab_parallel.single_statistics, {**HEAD, **SHARD, "target_T": TARGET}),
    "dual_statistics": (vocab_parallel.dual_statistics, {**PAIR, **SHARD, "target_T": TARGET}),
    "single_gradient": (
        vocab_parallel.single_gradient,
        {**HEAD, **SHARD, "target_T": TARGET, "merged_4T": MERGED_4T, "grad_logp_T": ONES},
    ),
    "dual_gradient": (
        vocab_parallel.dual_gradient,
        {**PAIR, **SHARD, "target_T": TARGET, "merged_12T": MERGED_12T, "grad_logp_T": ONES},
    ),
    "merge_statistics": (merge_statistics, {"parts_SFT": MERGED_12T[None]}),
    "head_finals": (statistics.head_finals, {"stats_FT": MERGED_4T}),
    "divergences": (statistics.divergences, {"stats_FT": MERGED_12T}),
}
ONE_HEAD = ("linear_logprob", "linear_policy_loss", "single_statistics", "single_gradient")
TWO_HEADS = ("linear_divergence", "topk_overlap", "dual_statistics", "dual_gradient")
WITH_TARGET = (*ONE_HEAD, "linear_divergence", "dual_statistics", "dual_gradient")
WHOLE_VOCABULARY = ("linear_logprob", "linear_divergence", "linear_policy_loss")
WITH_MASK = (*WHOLE_VOCABULARY, "topk_overlap")
SHARDED = ("single_statistics", "dual_statistics", "single_gradient", "dual_gradient")
ADVANTAGES = ("group_advantages", "reference.group_advantages")


class Case(NamedTuple):
    op: str
    arguments: dict[str, Any]
    match: str


CASES: list[Case] = []


def refuse(ops: tuple[str, ...] | str, match: str, **arguments: Any) -> None:
    CASES.extend(Case(op, arguments, match) for op in ((ops,) if isinstance(ops, str) else ops))


# Heads: the student's, and each of a pair by its own name.
for ops, prefix in ((ONE_HEAD, ""), (TWO_HEADS, "student_"), ((*TWO_HEADS, "linear_policy_loss"), "teacher_")):
    hidden, weight, bias = f"{prefix}hidden_TD", f"{prefix}weight_VD", f"{prefix}bias_V"
    refuse(ops, rf"^{hidden} must be \[T, D\], was \[3\]", **{hidden: torch.zeros(3)})
    refuse(ops, rf"^{hidden} must be \[T, D\], was \[1, 3, 4\]", **{hidden: HIDDEN[None]})
    for dtype in (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn):
        both = {hidden: HIDDEN.to(dtype), weight: WEIGHT.to(dtype)}
        refuse(ops, rf"^{hidden} must be fp32, bf16, fp16 or fp64, was {dtype}", **both)
    refuse(ops, rf"^{weight} must be \[V, D\] with D = 4, was \[15, 3\]", **{weight: torch.zeros(V, 3)})
    refuse(ops, rf"^{weight} must be \[V, D\] with D = 4, was \[15\]", **{weight: torch.zeros(V)})
    refuse(ops, rf"^{weight} must have at least one row, was \[0, 4\]", **{weight: torch.zeros(0, D)})
    refuse(ops, rf"^{weight} must be torch.float32 like {hidden}, was torch.float64", **{weight: WEIGHT.double()})
    refuse(ops, rf"^{weight} must be torch.float32 like {hidden}, was torch.int64", **{weight: WEIGHT.long()})
    refuse(ops, rf"^{weight} must be on cpu like {hidden}, was on meta", **{weight: WEIGHT.to("meta")})
    refuse(ops, rf"^{bias} must be \[V\] with V = 15, was \[14\]", **{bias: BIAS[1:]})
    refuse(ops, rf"^{bias} must be \[V\] with V = 15, was \[15, 1\]", **{bias: BIAS[:, None]})
    refuse(ops, rf"^{bias} must be a floating dtype, was torch.int64", **{bias: BIAS.long()})
    refuse(ops, rf"^{bias} must be on cpu like {hidden}, was on meta", **{bias: BIAS.to("meta")})
    for value in (NAN, INF, -INF):
        text = rf"^{hidden} must be finite, row 1 \(of the tokens that count\) holds \[{value}\]"
        refuse(ops, text, **{hidden: filled(value)})
    # Without a mask the message would come from the second row that counts.
    masked = {hidden: filled(NAN, row=2), "mask_T": torch.tensor([True, False, True])}
    refuse(tuple(op for op in ops if op in WITH_MASK), rf"^{hidden} must be finite, row 1 \(of", **masked)

refuse(SHARDED[::2], "^weight_VD must be on meta like hidden_TD, was on cpu", hidden_TD=HIDDEN.to("meta"))
refuse(ONE_HEAD[:2], "^weight_VD must be on meta like hidden_TD, was on cpu", hidden_TD=HIDDEN.to("meta"))
on_meta = {"teacher_hidden_TD": HIDDEN.to("meta"), "teacher_weight_VD": WEIGHT.to("meta"), "teacher_bias_V": None}
text = "^teacher_hidden_TD must be on the student's cpu, was on meta"
refuse(SHARDED[1::2], text, **on_meta)
refuse((*TWO_HEADS[:2], "linear_policy_loss"), text, **on_meta)
for op in (*TWO_HEADS, "linear_policy_loss"):
    refuse(op, "^teacher_hidden_TD must have the student's T = 3, was 2", teacher_hidden_TD=HIDDEN[:2])
    text = "^teacher_weight_VD must have the student's V = 15, was 16; .*give vocab_size, the number of real entries"
    refuse(op, text, teacher_weight_VD=torch.zeros(16, D), teacher_bias_V=None)

refuse(WITH_TARGET, r"^target_T must be \[T\] with T = 3, was \[2\]", target_T=TARGET[:2])
refuse(WITH_TARGET, r"^target_T must be \[T\] with T = 3, was \[3, 1\]", target_T=TARGET[:, None])
refuse(WITH_TARGET, "^target_T must be int64, was torch.int32", target_T=TARGET.int())
refuse(WITH_TARGET, "^target_T must be int64, was torch.float32", target_T=TARGET.float())
refuse(WITH_TARGET, "^target_T must be on cpu, was on meta", target_T=TARGET.to("meta"))
for values, text in (
    ([0, -1, 2], r"-1\.\.2"),
    ([-100, -100, -100], r"-100\.\.-100"),
    ([0, 15, 14], r"0\.\.15"),
    ([2**40, 0, 0], rf"0\.\.{2**40}"),
):
    refuse(
        WHOLE_VOCABULARY,
        rf"^target_T must lie in 0\.\.14 \(the vocabulary\), was {text}",
        target_T=torch.tensor(values),
    )
# The last row is padding.
padding = {"target_T": torch.tensor([0, 14, 0]), "vocab_size": 14}
refuse(WHOLE_VOCABULARY, r"^target_T must lie in 0\.\.13 \(the vocabulary\), was 0\.\.14", **padding)
refuse(SHARDED, "^target_T must be >= 0, or -1 for none, was -100", target_T=torch.tensor([0, -100, -1]))

refuse(WITH_MASK, r"^mask_T must be bool \[T\] with T = 3, was torch.float32 \[3\]", mask_T=ONES)
refuse(WITH_MASK, r"^mask_T must be bool \[T\] with T = 3, was torch.int64 \[3\]", mask_T=ONES.long())
refuse(
    WITH_MASK, r"^mask_T must be bool \[T\] with T = 3, was torch.bool \[2\]", mask_T=torch.ones(2, dtype=torch.bool)
)
refuse(WITH_MASK, r"^mask_T must be bool \[T\] with T = 3, was torch.bool \[3, 1\]", mask_T=ONES[:, None].bool())
refuse(WITH_MASK, "^mask_T must be on cpu, was on meta", mask_T=ONES.bool().to("meta"))

for value in (0, 0.0, -1.5, NAN, -INF):
    refuse((*WHOLE_VOCABULARY, *SHARDED), rf"^temperature must be > 0, was {value}$", temperature=value)
    refuse((*WHOLE_VOCABULARY, *SHARDED), rf"^softcap must be > 0 or None, was {value}$", softcap=value)
refuse((*WHOLE_VOCABULARY, *SHARDED), "^temperature must be finite, was inf", temperature=INF)
refuse((*WHOLE_VOCABULARY, *SHARDED), "^softcap must be finite, was inf", softcap=INF)
for size in (0, -1, 16):
    text = rf"^vocab_size must lie in 1\.\.15 \(rows of {{}}weight_VD\), was {size}$"
    refuse(("linear_logprob", "linear_policy_loss"), text.format(""), vocab_size=size)
    refuse(("linear_divergence", "topk_overlap"), text.format("student_"), vocab_size=size)
wide = {"teacher_weight_VD": torch.zeros(12, D), "teacher_bias_V": None, "vocab_size": 13}
text = r"^vocab_size must lie in 1\.\.12 \(rows of teacher_weight_VD\), was 13"
refuse((*TWO_HEADS[:2], "linear_policy_loss"), text, **wide)
for chunk in (0, -1):
    refuse(WITH_MASK, f"^chunk_tokens must be >= 1, was {chunk}", chunk_tokens=chunk)
for top_k in (0, -1, 16):
    ops = ("linear_divergence", "topk_overlap", *(("linear_policy_loss",) if top_k else ()))
    refuse(ops, rf"^top_k must lie in 1\.\.15 \(the vocabulary\), was {top_k}", top_k=top_k)
# Of the vocabulary without padding.
refuse(ops, r"^top_k must lie in 1\.\.11 \(the vocabulary\), was 12", top_k=12, vocab_size=11)
for beta in (0, 0.0, 1, 1.0, -0.1, 1.5, NAN):
    text = rf"^jsd_beta must lie inside \(0, 1\), was {beta}"
    refuse(("linear_divergence", "linear_policy_loss"), text, jsd_beta=beta)

for name in (*POLICY, *KL, "divergence_weight_T"):
    refuse("linear_policy_loss", rf"^{name} must be \[T\] with T = 3, was \[2\]", **{name: ONES[:2]})
    refuse("linear_policy_loss", rf"^{name} must be \[T\] with T = 3, was \[3, 1\]", **{name: ONES[:, None]})
    refuse("linear_policy_loss", f"^{name} must be a floating dtype, was torch.int64", **{name: ONES.long()})
    refuse("linear_policy_loss", f"^{name} must be a floating dtype, was torch.bool", **{name: ONES.bool()})
    refuse("linear_policy_loss", f"^{name} must be on cpu, was on meta", **{name: ONES.to("meta")})
    grad = {name: torch.ones(T, requires_grad=True)}
    refuse("linear_policy_loss", f"^{name} must not require grad: the loss has no gradient", **grad)
for name in POLICY:
    text = f"^advantage_T, old_logp_T, loss_weight_T go together, missing {name}$"
    refuse("linear_policy_loss", text, **{name: None})
text = "^advantage_T, old_logp_T, loss_weight_T go together, missing old_logp_T, loss_weight_T$"
refuse("linear_policy_loss", text, old_logp_T=None, loss_weight_T=None)
for name in KL:
    refuse("linear_policy_loss", f"^reference_logp_T, kl_weight_T go together, missing {name}$", **{name: None})
text = "^teacher_hidden_TD and teacher_weight_VD go together, was given one of them"
refuse("linear_policy_loss", text, teacher_hidden_TD=None)
refuse("linear_policy_loss", text, teacher_weight_VD=None)
text = "^divergence_weight_T needs a teacher: give teacher_hidden_TD and teacher_weight_VD"
refuse("linear_policy_loss", text, **dict.fromkeys(TEACHER))
alone = {**dict.fromkeys(TEACHER), "divergence_weight_T": None, "teacher_bias_V": BIAS}
refuse("linear_policy_loss", "^teacher_bias_V", **alone)
alone = {**dict.fromkeys(TEACHER), "divergence_weight_T": None, "top_k": 3}
refuse("linear_policy_loss", "^top_k", **alone)
for kind in ("kl", "", None, "REVERSE_KL"):
    text = rf"^divergence must be one of reverse_kl, forward_kl, symmetric_kl, jsd, was {kind!r}"
    refuse("linear_policy_loss", text, divergence=kind)
for kind in ("k4", "", None):
    refuse("linear_policy_loss", rf"^kl_estimator must be one of k1, k2, k3, was {kind!r}", kl_estimator=kind)
for bound in (-0.1, 1.5, NAN):
    refuse("linear_policy_loss", rf"^clip_low must lie in \[0, 1\], was {bound}", clip_low=bound)
for bound in (-0.1, NAN):
    refuse("linear_policy_loss", f"^clip_high must be >= 0, was {bound}", clip_high=bound)

refuse(SHARDED, "^vocab_begin must be >= 0, was -1", vocab_begin=-1)
for op, name, good in (("single_gradient", "merged_4T", MERGED_4T), ("dual_gradient", "merged_12T", MERGED_12T)):
    rows = len(good)
    refuse(op, rf"^{name} must be \[{rows}, T\] with T = 3, was \[3, 3\]", **{name: good[:3]})
    refuse(op, rf"^{name} must be \[{rows}, T\] with T = 3, was \[{rows}, 2\]", **{name: good[:, :2]})
    refuse(op, rf"^{name} must be torch.float32 for these heads, was torch.float64", **{name: good.double()})
    refuse(op, rf"^{name} must be on cpu, was on meta", **{name: good.to("meta")})
    kinds = ("logp", "entropy", "lse") if rows == 4 else ("logp", "entropy", "reverse_kl", "forward_kl")
    for grad in (f"grad_{kind}_T" for kind in kinds):
        refuse(op, rf"^{grad} must be \[T\] with T = 3, was \[1\]", **{grad: ONES[:1]})
        refuse(op, rf"^{grad} must be a floating dtype, was torch.int64", **{grad: ONES.long()})
        refuse(op, rf"^{grad} must be on cpu, was on meta", **{grad: ONES.to("meta")})
    refuse(op, "^grad_logp_T must be None without target_T, was given", target_T=None)
refuse("single_gradient", r"^merged_4T must be \[4, T\] with T = 3, was \[12, 3\]", merged_4T=MERGED_12T)

for shape in ((0, 4, 3), (2, 5, 3), (4, 3), (1, 12)):
    text = rf"^parts_SFT must be \[S, 4, T\] or \[S, 12, T\] with S >= 1, was \[{', '.join(map(str, shape))}\]"
    refuse("merge_statistics", text, parts_SFT=torch.zeros(shape))
for dtype in (torch.int64, torch.bfloat16, torch.float16):
    text = f"^parts_SFT must be fp32 or fp64, was {dtype}"
    refuse("merge_statistics", text, parts_SFT=torch.zeros(2, 4, 3, dtype=dtype))
refuse("head_finals", r"^stats_FT must be \[4, T\], was \[3, 3\]", stats_FT=MERGED_4T[:3])
refuse("head_finals", r"^stats_FT must be \[4, T\], was \[4\]", stats_FT=MERGED_4T[:, 0])
refuse("divergences", r"^stats_FT must be \[12, T\], was \[4, 3\]", stats_FT=MERGED_4T)

refuse(ADVANTAGES, r"^rewards_B must be \[B\], was \[3, 1\]", rewards_B=torch.zeros(3, 1))
refuse(ADVANTAGES, r"^rewards_B must be \[B\], was \[\]", rewards_B=torch.zeros(()))
refuse(ADVANTAGES, "^rewards_B must be a floating dtype, was ", rewards_B=torch.zeros(3, dtype=torch.int64))
refuse(ADVANTAGES, "^rewards_B must be a floating dtype, was ", rewards_B=torch.zeros(3, dtype=torch.bool))
refuse(ADVANTAGES, "^rewards_B must not require grad", rewards_B=torch.zeros(3, requires_grad=True))
refuse(ADVANTAGES, "^group_ids_B must be int64, was (int|torch.int32)$", group_ids_B=torch.tensor([0, 0, 1]).int())
refuse(ADVANTAGES, "^group_ids_B must be int64, was (float|torch.float32)$", group_ids_B=torch.zeros(3))
refuse(ADVANTAGES, r"^group_ids_B must be \[B\] like rewards_B \[3\], was \[2\]", group_ids_B=torch.tensor([0, 0]))
refuse(ADVANTAGES, r"^group_ids_B must be \[B\] like rewards_B \[3\], was \[3, 1\]", group_ids_B=TARGET[:, None])
for ids, position, value, before in (
    ([0, 1, 0], 2, 0, 1),
    ([2, 1, 1], 1, 1, 2),
    ([-1, 0, 0], 0, -1, 0),
    ([0, 0, -5], 2, -5, 0),
):
    where = f"; position {position} holds {value} after {before}"
    text = f"^group_ids_B must be non-negative and non-decreasing, so that a group is one run{where}$"
    refuse(ADVANTAGES, text, group_ids_B=torch.tensor(ids))
for mode in ("std", "", "Population"):
    text = f"^mode must be 'population', 'sample', 'none' or 'rloo', was '{mode}'$"
    refuse(ADVANTAGES, text, mode=mode)
for eps in (-0.5, NAN, INF):
    refuse(ADVANTAGES, f"^eps must be >= 0 and finite, was {eps}$", eps=eps)
text = "^group_ids_B must be on cpu like rewards_B, was on meta"
refuse(ADVANTAGES, text, group_ids_B=REWARDS["group_ids_B"].to("meta"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}-{'-'.join(case.arguments)}")
def test_bad_input(case: Case) -> None:
    function, good = GOOD[case.op]
    with pytest.raises(ValueError, match=case.match):
        function(**{**good, **case.arguments})


@pytest.mark.parametrize("op", GOOD)
def test_good_input(op: str) -> None:
    """What the cases start from is accepted, so that each fails for its own reason."""
    function, good = GOOD[op]
    function(**good)


def test_values_at_the_bounds() -> None:
    """One step inside of what is refused above."""
    one = torch.full((T,), V - 1)
    linear_logprob(HIDDEN, WEIGHT, one, temperature=1e-3, softcap=1e-3, vocab_size=V, chunk_tokens=1)
    linear_divergence(HIDDEN, WEIGHT, HIDDEN, WEIGHT, one, top_k=V, jsd_beta=1e-3)
    linear_policy_loss(HIDDEN, WEIGHT, one, **POLICY, clip_low=1.0, clip_high=INF, top_k=0)
    linear_policy_loss(HIDDEN, WEIGHT, one, **POLICY, clip_low=0, clip_high=0)
    group_advantages(**REWARDS, eps=0.0)
    out = vocab_parallel.single_statistics(HIDDEN, WEIGHT, torch.tensor([-1, 0, 999]), vocab_begin=0)
    assert statistics.head_finals(out).logp_T.isneginf().tolist() == [True, False, True]


def test_a_large_finite_hidden_state_is_finite() -> None:
    """The sum over a row overflows; its numbers do not. inf - inf is NaN, and still not finite."""
    hidden = torch.full((1, 2), 1.5e308, dtype=torch.float64)
    weight = torch.full((3, 2), 1e-308, dtype=torch.float64)
    assert linear_logprob(hidden, weight, torch.tensor([0])).logp_T.isfinite().all()
    broken = torch.tensor([[1.5e308, 1.5e308], [INF, -INF]], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"hidden_TD must be finite, row 1 .* holds \[inf\]"):
        linear_logprob(broken, weight, torch.tensor([0, 0]))


def test_what_a_mask_hides_is_not_looked_at() -> None:
    """Targets and hidden states of masked tokens may be anything; the shapes and dtypes may not."""
    mask, target = torch.tensor([True, False, True]), torch.tensor([0, -100, 14])
    expected = linear_logprob(HIDDEN, WEIGHT, TARGET.index_fill(0, torch.tensor([2]), 14), mask_T=mask)
    for value in (NAN, INF):
        for got, column in zip(linear_logprob(filled(value), WEIGHT, target, mask_T=mask), expected, strict=True):
            assert torch.equal(got, column)
