"""The operations on inputs that hypothesis chooses: fp64 truth on any shape, and what must not change a result."""

from __future__ import annotations

import copd_kernels
import hypothesis
import pytest
import torch
from copd_kernels import group_advantages, linear_divergence, linear_logprob, reference
from copd_kernels._types import Head
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.problems import GRADIENT_BOUND, OPS, Backend, Problem, Result, bound_of, check, run, to_fp64

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
# The same examples on every run: a near-tie that nobody thought of should fail when it is written, not in a year.
few = hypothesis.settings(max_examples=25, deadline=None, derandomize=True)

# Small, and around the ends of the tiles of the rows.
vocab_sizes = st.integers(1, 40) | st.sampled_from([255, 257, 2047, 2048, 2049, 2500, 3000]) | st.integers(1, 3000)


@st.composite
def problems(draw: st.DrawFn, *, min_tokens: int = 0, max_vocab: int = 3000) -> Problem:
    num_tokens = draw(st.integers(min_tokens, 40))
    vocab_size = min(draw(vocab_sizes), max_vocab)
    options: dict[str, object] = {}
    if draw(st.booleans()):
        options["mask_T"] = torch.tensor(
            draw(st.lists(st.booleans(), min_size=num_tokens, max_size=num_tokens)), dtype=torch.bool
        )
    if draw(st.booleans()):
        options["temperature"] = draw(st.sampled_from([0.5, 0.8, 1.0, 2.0]))
    if draw(st.booleans()):
        options["softcap"] = draw(st.sampled_from([3.0, 8.0]))
    teacher_vocab_size = None
    if draw(st.booleans()):
        options["vocab_size"] = draw(st.integers(max(1, vocab_size - 5), vocab_size))
        teacher_vocab_size = vocab_size + draw(st.integers(0, 3))
    chunk_tokens = draw(st.none() | st.integers(1, 45))
    if chunk_tokens is not None:
        options["chunk_tokens"] = chunk_tokens
    return Problem(
        num_tokens=num_tokens,
        hidden_size=draw(st.integers(1, 24)),
        vocab_size=vocab_size,
        teacher_vocab_size=teacher_vocab_size,
        # Equal to far apart. Closer than that the rounding of the logits, which are not exact here, is what the KL is
        # made of; test_linear_divergence.py goes down to 1e-8 on exact logits.
        gap=draw(st.sampled_from([0.0, 0.1, 0.3, 3.0])),
        scale=draw(st.sampled_from([0.3, 1.0, 3.0])),
        student_bias=draw(st.booleans()),
        divergence=draw(st.sampled_from(["reverse_kl", "forward_kl", "symmetric_kl", "jsd"])),
        kl_estimator=draw(st.sampled_from(["k1", "k2", "k3"])),
        options=options,
    )


def has_near_ties(problem: Problem, dtype: torch.dtype) -> bool:
    """Whether rounding may decide what belongs to the top k, as where a softcap flattens the largest logits."""
    inputs = to_fp64(problem.tensors(dtype))
    vocab_size = problem.options.get("vocab_size", problem.vocab_size)
    top_k = min(4, vocab_size)
    if top_k == vocab_size:
        return False
    for head in (inputs.student, inputs.teacher):
        logits_TV = (head.hidden_TD @ head.weight_VD.T + (0 if head.bias_V is None else head.bias_V))[:, :vocab_size]
        softcap = problem.options.get("softcap")
        if softcap is not None:
            logits_TV = softcap * torch.tanh(logits_TV / softcap)
        top = logits_TV.topk(top_k + 1, dim=-1).values
        if (top[:, -2] - top[:, -1] < 1e-5 * top[:, 0].abs().clamp(min=1)).any():
            return True
    return False


def close(got: Result, expected: Result, op: str, problem: Problem, dtype: torch.dtype) -> None:
    """Within twice what either may be off the truth: each rounds in its own order.

    Gradients of the policy loss twice as far again. In fp32 the slope of a KL estimate is a difference of log-probs,
    near 0 for a token that is near the reference. In bf16 they are rounded before and after backward scales them, and
    one entry may be most of the norm.
    """
    exact = to_fp64(problem.tensors(dtype))
    known = {name: x for name, x in problem.options.items() if name != "chunk_tokens"}
    lse = reference.linear_logprob(*exact.student[:2], exact.target, bias_V=exact.student.bias_V, **known).lse_T
    for name, value in expected.values.items():
        error = (got.values[name].double() - value.double()).abs()
        assert (error <= 2 * bound_of(name, value.double(), lse, dtype)).all(), name
    factor = 4 if op == "linear_policy_loss" else 2
    for name, value in expected.gradients.items():
        floor = 1e-7 * max(1, problem.num_tokens) ** 0.5
        error = (got.gradients[name].double() - value.double()).norm()
        assert error <= factor * GRADIENT_BOUND[dtype] * value.double().norm() + floor, (name, error)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
@few
@given(problem=problems())
def test_values_and_gradients(op: str, dtype: torch.dtype, problem: Problem) -> None:
    """Against fp64 within the bounds of problems.py; and the signs that no rounding may change."""
    hypothesis.assume(not has_near_ties(problem, dtype))
    if op == "linear_policy_loss":
        # Its gradients have a bound of their own here, see close().
        inputs = problem.tensors(dtype)
        got, true = (
            run(op, module, problem, x) for module, x in ((copd_kernels, inputs), (reference, to_fp64(inputs)))
        )
        close(got, true, op, problem, dtype)
        values = got.values
    else:
        values = check(op, problem, Backend("best", dtype, "auto")).values
    for name, column in values.items():
        kind = name.removeprefix("teacher ")
        if kind.endswith("logp_T"):
            assert (column <= 0).all(), name
        if kind.startswith(("kl_student", "kl_teacher", "symmetric", "jsd")) or "entropy" in kind:
            assert (column >= 0).all(), name
        if kind in ("overlap_T", "sum_min_T"):
            assert ((column >= 0) & (column <= 1 + 1e-6)).all(), name


def same(got: Result, expected: Result) -> None:
    for mine, other in ((got.values, expected.values), (got.gradients, expected.gradients)):
        assert mine.keys() == other.keys()
        for name, value in other.items():
            assert torch.equal(mine[name], value), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
@few
@given(problem=problems(min_tokens=1, max_vocab=300), seed=st.integers(0, 2**31))
def test_a_masked_token_changes_nothing(op: str, dtype: torch.dtype, problem: Problem, seed: int) -> None:
    """Bitwise, whatever it holds: any target, hidden states that are not finite, any per-token number."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(problem.num_tokens, generator=generator) < 0.6
    problem.options["mask_T"] = mask
    inputs = problem.tensors(dtype)
    expected = run(op, copd_kernels, problem, inputs)
    junk = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30])[torch.arange(problem.num_tokens) % 4]
    for name in ("student", "teacher"):
        head = getattr(inputs, name)
        hidden = torch.where(mask[:, None], head.hidden_TD, junk[:, None].to(dtype))
        setattr(inputs, name, head._replace(hidden_TD=hidden))
    inputs.target = torch.where(mask, inputs.target, torch.tensor([-100, 2**40])[torch.arange(problem.num_tokens) % 2])
    inputs.per_token = {name: torch.where(mask, x, junk.to(x.dtype)) for name, x in inputs.per_token.items()}
    got = run(op, copd_kernels, problem, inputs)
    same(got, expected)
    for name, column in got.values.items():
        if column.dim():
            assert column[~mask].eq(0).all(), name
    if got.gradients:
        assert got.gradients["hidden"][~mask].eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
@few
@given(problem=problems(), chunk_tokens=st.integers(1, 41))
def test_the_size_of_a_chunk_changes_rounding_only(
    op: str, dtype: torch.dtype, problem: Problem, chunk_tokens: int
) -> None:
    hypothesis.assume(not has_near_ties(problem, dtype))
    inputs = problem.tensors(dtype)
    expected = run(op, copd_kernels, problem, inputs)
    problem.options["chunk_tokens"] = chunk_tokens
    close(run(op, copd_kernels, problem, inputs), expected, op, problem, dtype)


@pytest.mark.parametrize("op", OPS)
@few
@given(problem=problems(min_tokens=2), seed=st.integers(0, 2**31))
def test_permuted_tokens_give_permuted_results(op: str, problem: Problem, seed: int) -> None:
    dtype = torch.float32
    hypothesis.assume(not has_near_ties(problem, dtype))
    order = torch.randperm(problem.num_tokens, generator=torch.Generator().manual_seed(seed))
    inputs = problem.tensors(dtype)
    expected = run(op, copd_kernels, problem, inputs)
    back = order.argsort()
    for name in ("student", "teacher"):
        head = getattr(inputs, name)
        setattr(inputs, name, head._replace(hidden_TD=head.hidden_TD[order]))
    inputs.target, inputs.upstream = inputs.target[order], inputs.upstream[:, order]
    inputs.per_token = {name: x[order] for name, x in inputs.per_token.items()}
    mask = problem.options.get("mask_T")
    if mask is not None:
        problem.options["mask_T"] = mask[order]
    got = run(op, copd_kernels, problem, inputs)
    values = {name: x[back] if x.dim() else x for name, x in got.values.items()}
    gradients = {name: x[back] if name == "hidden" else x for name, x in got.gradients.items()}
    if mask is not None:
        problem.options["mask_T"] = mask
    close(Result(values, gradients), expected, op, problem, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@few
@given(problem=problems(min_tokens=1), shift=st.sampled_from([-16.0, -0.5, 1.0, 8.0]))
def test_a_constant_on_all_logits_changes_no_divergence(dtype: torch.dtype, problem: Problem, shift: float) -> None:
    """Of the student's and of the teacher's alone; the log-sum takes it up."""
    options = {name: x for name, x in problem.options.items() if name != "softcap"}
    if "temperature" in options:
        options["temperature"] = 0.5
    inputs = problem.tensors(dtype)

    def on_grid(head: Head) -> Head:
        """Quarters between -2 and 2: products, their sums, the shift and the temperature are exact in every dtype."""
        bias_V = torch.zeros(len(head.weight_VD)) if head.bias_V is None else head.bias_V
        return Head(*((x.double().clamp(-2, 2) * 4).round().div(4).to(dtype) for x in (*head[:2], bias_V)))

    student, teacher = on_grid(inputs.student), on_grid(inputs.teacher)

    def divergence(student_shift: float, teacher_shift: float) -> copd_kernels.Divergence:
        biases = {"student_bias_V": student.bias_V + student_shift, "teacher_bias_V": teacher.bias_V + teacher_shift}
        return linear_divergence(*student[:2], *teacher[:2], inputs.target, top_k=1, **biases, **options)

    still = divergence(0, 0)
    # Differences of log-sums of this size: rounding of the results that are made of them.
    size = (abs(shift) + 4 * problem.hidden_size) / options.get("temperature", 1)
    bound = 1e-12 if dtype == torch.float64 else 1e-6
    for moved in (divergence(shift, 0), divergence(0, shift)):
        for name, column in still._asdict().items():
            second_order = "kl" in name or "jsd" in name
            tolerance = {"rtol": 10 * bound, "atol": 1e-9 if second_order else bound * size}
            torch.testing.assert_close(getattr(moved, name), column, **tolerance, msg=name)


@few
@given(problem=problems(min_tokens=1), dtype=st.sampled_from(DTYPES))
def test_equal_policies(problem: Problem, dtype: torch.dtype) -> None:
    """Exactly 0 apart, at any shape: the same bits go through the same sums."""
    inputs = problem.tensors(dtype)
    student = inputs.student
    biases = {"student_bias_V": student.bias_V, "teacher_bias_V": student.bias_V}
    out = linear_divergence(
        *student[:2], *(x.clone() for x in student[:2]), inputs.target, top_k=1, **biases, **problem.options
    )
    for column in (out.kl_student_teacher_T, out.kl_teacher_student_T, out.jsd_T, out.delta_T):
        assert column.eq(0).all()
    assert torch.equal(out.student_logp_T, out.teacher_logp_T)
    assert torch.equal(out.student_entropy_T, out.teacher_entropy_T)


@few
@given(problem=problems(min_tokens=1, max_vocab=60))
def test_probabilities_add_up(problem: Problem) -> None:
    """The log-probs of all targets are those of one distribution, with the entropy that is reported."""
    inputs = problem.tensors(torch.float64)
    student, options = inputs.student, dict(problem.options)
    options.pop("mask_T", None)
    vocab_size = options.get("vocab_size", problem.vocab_size)
    hidden = student.hidden_TD[:1].expand(vocab_size, -1)
    out = linear_logprob(hidden, student.weight_VD, torch.arange(vocab_size), bias_V=student.bias_V, **options)
    torch.testing.assert_close(out.logp_T.exp().sum(), torch.ones((), dtype=torch.float64), rtol=1e-11, atol=0)
    entropy = -(out.logp_T.exp() * out.logp_T).sum()
    torch.testing.assert_close(out.entropy_T, entropy.expand(vocab_size), rtol=1e-10, atol=1e-12)


@few
@given(
    rewards=st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=20),
    groups=st.lists(st.integers(1, 6), min_size=1, max_size=20),
    mode=st.sampled_from(["population", "sample", "none", "rloo"]),
    shift=st.sampled_from([-8.0, 1.0, 64.0]),
)
def test_group_advantages(rewards: list[float], groups: list[int], mode: str, shift: float) -> None:
    """They add up to 0 in a group, and a constant on all rewards, or other numbers for the groups, changes nothing."""
    ids = torch.tensor([i for i, size in enumerate(groups) for _ in range(size)][: len(rewards)])
    rewards_B = torch.tensor(rewards[: len(ids)], dtype=torch.float64)
    got = group_advantages(rewards_B, ids, mode=mode, eps=1e-3)
    sums = torch.zeros(len(groups), dtype=torch.float64).index_add(0, ids, got.advantages_B)
    assert sums.abs().max() < 1e-9
    moved = group_advantages(rewards_B + shift, ids, mode=mode, eps=1e-3)
    torch.testing.assert_close(moved.advantages_B, got.advantages_B, rtol=1e-6, atol=1e-9)
    renumbered = group_advantages(rewards_B, 7 * ids + 3, mode=mode, eps=1e-3)
    assert torch.equal(renumbered.advantages_B, got.advantages_B)
