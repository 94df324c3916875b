"""gpu.topk in Triton's interpreter against a stable sort of full logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from copd_kernels._types import Head

pytest.importorskip("triton", reason="Triton is not installed (extra gpu)")
topk = pytest.importorskip("copd_kernels.gpu.topk")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels were loaded for the GPU")


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Every ``torch.empty`` holds NaN or the largest integer, so that what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def head(randn: Callable[..., torch.Tensor]) -> Callable[..., Head]:
    """A head of small integers: products are exact in every dtype, and ties are many."""

    def make(num_tokens: int, vocab_size: int, hidden_size: int, dtype: torch.dtype = torch.float32) -> Head:
        hidden_TD = randn(num_tokens, hidden_size).round().to(dtype)
        return Head(hidden_TD, randn(vocab_size, hidden_size).round().to(dtype), randn(vocab_size).round().float())

    return make


def logits(head: Head) -> torch.Tensor:
    logits_TV = head.hidden_TD.double() @ head.weight_VD.double().T
    return logits_TV if head.bias_V is None else logits_TV + head.bias_V


def sorted_overlap(student: Head, teacher: Head, top_k: int) -> torch.Tensor:
    """By a stable sort, which resolves ties by lower index; NaN where a row has one."""
    student_TV, teacher_TV = logits(student), logits(teacher)
    best = [z.sort(dim=-1, descending=True, stable=True).indices[:, :top_k] for z in (student_TV, teacher_TV)]
    overlap_T = (best[0][:, :, None] == best[1][:, None, :]).sum((1, 2)) / top_k
    return overlap_T.masked_fill(student_TV.isnan().any(-1) | teacher_TV.isnan().any(-1), torch.nan)


def check(student: Head, teacher: Head, top_k: int) -> torch.Tensor:
    overlap_T = topk.topk_overlap(student, teacher, top_k=top_k)
    assert overlap_T.dtype == torch.float32
    torch.testing.assert_close(overlap_T, sorted_overlap(student, teacher, top_k), rtol=0, atol=0, equal_nan=True)
    return overlap_T


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("num_tokens", "vocab_size", "hidden_size", "top_k"),
    [
        (1, 1, 1, 1),  # smallest
        (1, 67, 32, 10),  # one token, two tiles of the vocabulary
        (17, 203, 40, 10),  # nothing a multiple of its block
        (16, 128, 32, 1),  # everything a multiple
        (3, 40, 7, 32),  # all the slots, rows of 28 bytes
        (5, 20, 8, 20),  # the whole vocabulary: 1.0
    ],
)
def test_agrees_with_a_stable_sort(head, dtype, num_tokens, vocab_size, hidden_size, top_k) -> None:
    student, teacher = (head(num_tokens, vocab_size, hidden_size, dtype) for _ in range(2))
    overlap_T = check(student, teacher._replace(bias_V=None), top_k)
    if top_k == vocab_size:
        assert overlap_T.tolist() == [1.0] * num_tokens


def test_random_logits_of_close_heads(randn) -> None:
    hidden_TD, weight_VD = randn(29, 32), randn(301, 32)
    student = Head(hidden_TD.float(), weight_VD.float(), None)
    teacher = Head((hidden_TD + 0.2 * randn(29, 32)).float(), weight_VD.float(), randn(301, scale=0.1).float())
    overlap_T = check(student, teacher, 10)
    assert 0.3 < overlap_T.mean() < 0.99


def test_heads_of_different_width_and_dtype(head) -> None:
    check(head(9, 70, 32, torch.bfloat16), head(9, 70, 40), 4)


def test_bias_of_low_precision(head) -> None:
    student, teacher = head(4, 50, 16), head(4, 50, 16)
    check(student._replace(bias_V=student.bias_V.bfloat16()), teacher, 5)


def test_ties_go_to_the_lower_index() -> None:
    # All logits are 0, of both signs: the first k of both heads, so 1.0; then the teacher prefers the last.
    hidden_TD, weight_VD = torch.zeros(2, 16), torch.ones(100, 16)
    weight_VD[::3] = -1
    student, teacher = Head(hidden_TD, weight_VD, None), Head(hidden_TD, -weight_VD, None)
    assert check(student, teacher, 10).tolist() == [1.0, 1.0]
    late_V = torch.zeros(100)
    late_V[96:] = 1
    # 96..99 and then 0..5.
    assert check(student, teacher._replace(bias_V=late_V), 10).tolist() == pytest.approx([0.6, 0.6])


def test_candidates_are_the_best_of_each_split(head, monkeypatch) -> None:
    monkeypatch.setattr(topk, "_WANTED_PROGRAMS", 2)
    one = head(3, 260, 16)
    keys, indices = topk._candidates(one, 8)
    assert keys.shape == (3, 2, 8)
    logits_TV = logits(one)
    for split, begin in enumerate((0, 192)):  # 5 tiles of 64: 3 and 2
        part_TV = logits_TV[:, begin : begin + 192]
        best = part_TV.sort(dim=-1, descending=True, stable=True).indices[:, :8] + begin
        assert indices[:, split].sort(-1).values.tolist() == best.sort(-1).values.tolist()


@pytest.mark.parametrize("programs", [1, 7, 1024])
def test_splits_of_the_vocabulary_change_nothing(head, monkeypatch, programs) -> None:
    monkeypatch.setattr(topk, "_WANTED_PROGRAMS", programs)
    check(head(5, 331, 16), head(5, 331, 16), 10)


@pytest.mark.parametrize("num_finite", [0, 3, 12])
def test_minus_infinity_counts_like_any_value(head, num_finite) -> None:
    student, teacher = head(4, 90, 16), head(4, 90, 16)
    bias_V = torch.full((90,), -torch.inf)
    bias_V[40 : 40 + num_finite] = 0
    # Below the finite ones come the excluded ones by index: 0, 1, 2, ...
    overlap_T = check(student._replace(bias_V=bias_V), teacher._replace(bias_V=bias_V.clone()), 10)
    if num_finite < 10:
        assert overlap_T.tolist() == [1.0] * 4


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_nan_stays_nan_in_its_own_row(head, whose) -> None:
    student, teacher = head(19, 90, 16), head(19, 90, 16)
    broken = student if whose == "student" else teacher
    broken.hidden_TD[17, 3] = torch.nan
    overlap_T = topk.topk_overlap(student, teacher, top_k=10)
    assert overlap_T.isnan().tolist() == [row == 17 for row in range(19)]


def test_nan_of_either_sign_in_one_logit(head) -> None:
    student, teacher = head(2, 90, 16), head(2, 90, 16)
    student.bias_V[88] = -torch.tensor(torch.nan)
    assert topk.topk_overlap(student, teacher, top_k=10).isnan().all()


def test_descriptors_and_pointers_find_the_same(head) -> None:
    one = head(19, 77, 40, torch.float16)
    for by_tma, by_pointer in zip(
        topk._candidates(one, 16, use_tma=True), topk._candidates(one, 16, use_tma=False), strict=True
    ):
        assert torch.equal(by_tma, by_pointer)


def test_no_tokens(head) -> None:
    student, teacher = head(0, 20, 16), head(0, 20, 16)
    assert topk.topk_overlap(student, teacher, top_k=3).shape == (0,)


@pytest.mark.parametrize(("top_k", "vocab_size"), [(0, 20), (21, 20), (33, 100)])
def test_top_k_out_of_range(head, top_k, vocab_size) -> None:
    with pytest.raises(ValueError, match=rf"top_k must lie in 1\.\.\d+ on a GPU, was {top_k}"):
        topk.topk_overlap(head(1, vocab_size, 16), head(1, vocab_size, 16), top_k=top_k)


def test_more_rows_than_the_limit_of_axis_1(head, monkeypatch) -> None:
    num_tokens, grids, found = 65_537, [], []

    class Recorder:
        """In place of the kernel of one row per program: the interpreter would take minutes."""

        def __getitem__(self, grid):
            grids.append(grid)
            return lambda keys, indices, *_, **__: found.append(indices)

    monkeypatch.setattr(topk, "topk_tiles", lambda *_: topk.Tiles(8192, 32, 16, 4, 1))
    monkeypatch.setattr(topk, "_row_block", lambda target: 1)
    monkeypatch.setattr(topk, "topk_overlap_rows", Recorder())
    one = head(num_tokens, 40, 2)
    topk.topk_overlap(one, one, top_k=2)
    assert grids == [(num_tokens,)]
    best = logits(one).sort(dim=-1, descending=True, stable=True).indices[:, :2]
    # Two splits of 32 and 8 entries, two candidates each: the best two are among the four.
    assert ((found[0].view(num_tokens, 4)[:, :, None] == best[:, None, :]).any(1)).all()


def test_memory_does_not_grow_with_the_vocabulary(head, largest_tensor, monkeypatch) -> None:
    monkeypatch.setattr(topk, "topk_tiles", lambda *_: topk.Tiles(64, 1024, 16, 4, 1))
    sizes = []
    for vocab_size in (2**12, 2**14):
        student = Head(torch.randn(64, 1), torch.randn(vocab_size, 1), None)
        largest_tensor.num_elements = 0
        with largest_tensor:
            topk.topk_overlap(student, student, top_k=2)
        sizes.append(largest_tensor.num_elements)
    # At most a copy of the weight, which the interpreter makes; [T, V] is 64 times that.
    assert sizes[1] <= 2**14
