"""Tile statistics, the stored logits and the merge kernel, in Triton's interpreter, each against fp64 by itself.

Identity hidden states make the projection exact. The interpreter's tiles hold 16 tokens and 32 entries.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from copd_kernels import _rows, statistics
from copd_kernels._types import Head

from tests.kernels.row_checks import true_dual, true_head

pytest.importorskip("triton", reason="Triton is not installed (extra gpu)")
launch = pytest.importorskip("copd_kernels.gpu.launch")
targets = pytest.importorskip("copd_kernels.gpu.targets")

INF, NAN = torch.inf, torch.nan
TILE = 32
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels were loaded for the GPU")


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Every ``torch.empty`` holds NaN, so that what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def launcher(*logits_TV: torch.Tensor, use_tma: bool = False):
    """Of heads with these logits: token t takes column t of the weight."""
    eye = torch.eye(len(logits_TV[0]))
    heads = tuple(Head(eye, z.T.contiguous(), None) for z in logits_TV)
    return launch.Launcher(targets.INTERPRETER, launch.Scale(1.0, 0.0), heads, use_tma=use_tma)


def partial_statistics(target_T: torch.Tensor, *logits_TV: torch.Tensor, **options: bool) -> torch.Tensor:
    return launcher(*logits_TV, **options).statistics(slice(0, len(target_T)), target_T.int(), None)


def merged(partial: torch.Tensor) -> torch.Tensor:
    """By the kernel."""
    return launcher(torch.zeros(1, 1)).merge(partial)


def close_logits(randn, gap: float, num_tokens: int = 19, vocab_size: int = 77) -> tuple[torch.Tensor, torch.Tensor]:
    student = randn(num_tokens, vocab_size, dtype=torch.float32, scale=2.0)
    return student, student + randn(num_tokens, vocab_size, dtype=torch.float32, scale=gap)


def assert_gaps_match(stats_12T: torch.Tensor, truth: torch.Tensor, gap: float) -> None:
    """Rows 8 to 11: gaps to the rounding of a number of the logits' distance, excesses as section 3 wants the KL."""
    torch.testing.assert_close(stats_12T[[8, 10]].double(), truth[[8, 10]], rtol=1e-6, atol=5e-7 * gap)
    torch.testing.assert_close(stats_12T[[9, 11]].double(), truth[[9, 11]], rtol=1e-5, atol=1e-14)


@pytest.mark.parametrize("gap", [1.0, 1e-2, 3e-4])
def test_every_tile_of_two_heads(randn, randint, gap) -> None:
    """19 tokens and 77 entries, so that neither fills its tiles."""
    student, teacher = close_logits(randn, gap)
    target = randint(77, 19)
    target[3] = -1
    partial = partial_statistics(target, student, teacher)
    assert partial.shape == (3, 12, 19)
    for tile, part in enumerate(partial):
        inside = slice(tile * TILE, (tile + 1) * TILE)
        local = torch.where((target >= inside.start) & (target < min(inside.stop, 77)), target - inside.start, -1)
        truth = true_dual(student[:, inside], teacher[:, inside], local)
        assert torch.equal(part[[0, 3, 4, 7]].double(), truth[[0, 3, 4, 7]])
        torch.testing.assert_close(part[[1, 2, 5, 6]].double(), truth[[1, 2, 5, 6]], rtol=4e-6, atol=1e-9)
        assert_gaps_match(part, truth, gap)


def test_every_tile_of_one_head(randn, randint) -> None:
    logits, target = randn(19, 77, dtype=torch.float32, scale=4.0), randint(77, 19)
    for tile, part in enumerate(partial_statistics(target, logits)):
        inside = slice(tile * TILE, (tile + 1) * TILE)
        local = torch.where((target >= inside.start) & (target < min(inside.stop, 77)), target - inside.start, -1)
        truth = true_head(logits[:, inside], local)
        assert torch.equal(part[[0, 3]].double(), truth[[0, 3]])
        torch.testing.assert_close(part[1:3].double(), truth[1:3], rtol=4e-6, atol=1e-9)


@pytest.mark.parametrize("gap", [30.0, 1.0, 1e-2, 3e-4])
@pytest.mark.parametrize("vocab_size", [31, 200, 420])
def test_tiles_merge_to_the_whole(randn, randint, gap, vocab_size) -> None:
    """Up to 14 tiles: KL from 500 down to 5e-8 against fp64."""
    student, teacher = close_logits(randn, gap, 5, vocab_size)
    target = randint(vocab_size, 5)
    stats = merged(partial_statistics(target, student, teacher))
    truth = true_dual(student, teacher, target)
    assert torch.equal(stats[[0, 3, 4, 7]].double(), truth[[0, 3, 4, 7]])
    torch.testing.assert_close(stats[[1, 2, 5, 6]].double(), truth[[1, 2, 5, 6]], rtol=5e-6, atol=1e-8)
    torch.testing.assert_close(stats[[8, 10]].double(), truth[[8, 10]], rtol=1e-6, atol=5e-7 * gap)
    for got, row in zip(statistics.divergences(stats), (9, 11), strict=True):
        torch.testing.assert_close(got.double(), truth[row].log1p(), rtol=1e-5, atol=0)


def parts_of(student: torch.Tensor, teacher: torch.Tensor, cuts: list[int], target: torch.Tensor) -> torch.Tensor:
    """Statistics ``[S, 12, T]`` of parts of any width, by the CPU's rule."""
    parts = []
    for begin, end in zip([0, *cuts], [*cuts, student.shape[1]], strict=True):
        stats = statistics.empty_statistics(12, len(student), like=student, dtype=student.dtype)
        _rows.dual_stats_aten(student[:, begin:end], teacher[:, begin:end], begin, target, stats)
        parts.append(stats)
    return torch.stack(parts)


def extreme_logits(randn) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that the merge rule treats apart; 40 entries."""
    student, teacher = randn(12, 40, dtype=torch.float32), randn(12, 40, dtype=torch.float32)
    student[1, :10] = teacher[1, :10] = -INF  # an empty part of both
    student[2, :10] = -INF  # the student excludes a part
    teacher[3, :10] = -INF  # the teacher does: an infinite gap
    student[4, :10], teacher[4, :10] = -110, 110  # the teacher lives where the student has no mass
    student[5, :10], teacher[5, :10] = -75, 75
    student[6, :10], teacher[6, :10] = -88, 86
    student[7], teacher[7] = 0, 0
    student[7, 3], teacher[7, 37] = 500, 500  # one-hot in different parts
    student[8] = -INF  # nothing at all
    student[9], teacher[9] = -INF, -INF
    student[10, 5] = NAN
    teacher[11, 5] = NAN
    return student, teacher


@pytest.mark.parametrize("cuts", [[], [10], [10, 20], list(range(1, 40)), [3, 4, 11, 39]], ids=len)
def test_merge_kernel_is_the_rule_of_the_cpu(randn, cuts) -> None:
    """Any number of tiles (they are taken four at a time), on the rows where the rule changes its form."""
    student, teacher = extreme_logits(randn)
    parts = parts_of(student, teacher, cuts, torch.arange(12))
    got, expected = merged(parts), statistics.merge_statistics(parts)
    # An excess beyond 1e4 is not used, and without any token there is none.
    used = expected.clone()
    used[[9, 11]] = used[[9, 11]].clamp(max=1e4)
    got = got.clone()
    got[[9, 11]] = got[[9, 11]].clamp(max=1e4)
    broken = torch.tensor([10, 11])
    whole = torch.arange(10)
    torch.testing.assert_close(got[:, whole], used[:, whole], rtol=2e-6, atol=2e-6)
    for found, true in zip(statistics.divergences(got), statistics.divergences(used), strict=True):
        torch.testing.assert_close(found[whole], true[whole], rtol=2e-6, atol=1e-7, equal_nan=True)
        assert found[broken].isnan().all()
    assert statistics.head_finals(got[:4]).lse_T[broken].isnan().tolist() == [True, False]
    assert statistics.head_finals(got[4:8]).lse_T[broken].isnan().tolist() == [False, True]
    single = merged(parts[:, :4].contiguous())
    torch.testing.assert_close(single, got[:4], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("num_tokens", [1, 16, 33])
@pytest.mark.parametrize("num_tiles", [1, 4, 9])
def test_merge_kernel_at_a_tiny_kl(randn, num_tokens, num_tiles) -> None:
    student, teacher = close_logits(randn, 1e-3, num_tokens, 20 * num_tiles)
    cuts = list(range(20, 20 * num_tiles, 20))
    parts = parts_of(student, teacher, cuts, torch.zeros(num_tokens, dtype=torch.int64))
    truth = true_dual(student, teacher, torch.zeros(num_tokens, dtype=torch.int64))
    for got, row in zip(statistics.divergences(merged(parts)), (9, 11), strict=True):
        torch.testing.assert_close(got.double(), truth[row].log1p(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("row", range(12))
def test_tiles_of_extreme_rows(randn, row) -> None:
    """The tile kernel and the merge kernel together; a row alone, because 0 times its infinities is NaN elsewhere."""
    student, teacher = (z[row : row + 1] for z in extreme_logits(randn))
    stats = merged(partial_statistics(torch.tensor([3]), student, teacher))
    expected = parts_of(student, teacher, [], torch.tensor([3]))[0]
    for got, true in zip(statistics.divergences(stats), statistics.divergences(expected), strict=True):
        torch.testing.assert_close(got, true, rtol=1e-5, atol=1e-7, equal_nan=True)
    torch.testing.assert_close(stats[:8], expected[:8], rtol=2e-6, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_descriptors_and_pointers_agree(randn, dtype) -> None:
    """Bitwise; D of two steps and a half, rows of a multiple of 16 bytes."""
    hidden, weight = randn(19, 40).to(dtype), randn(77, 40).to(dtype)
    heads = (Head(hidden, weight, randn(77).float()), Head(2 * hidden, weight / 2, None))
    found = []
    for use_tma in (True, False):
        kernels = launch.Launcher(targets.INTERPRETER, launch.Scale(0.7, 3.0), heads, use_tma=use_tma)
        assert kernels.use_tma == use_tma
        found.append(kernels.statistics(slice(0, 19), torch.arange(19, dtype=torch.int32), None))
    assert torch.equal(*found)
    logits = torch.tanh((hidden.double() @ weight.double().T + heads[0].bias_V) / 3) * 3 / 0.7
    truth = true_head(logits, torch.arange(19))
    torch.testing.assert_close(merged(found[0])[:4].double(), truth, rtol=1e-5, atol=1e-5)


def test_rows_that_no_descriptor_takes(randn) -> None:
    """Rows of 12 bytes: pointers, also where descriptors were asked for."""
    head = Head(randn(3, 3).float(), randn(5, 3).float(), None)
    kernels = launch.Launcher(targets.INTERPRETER, launch.Scale(1.0, 0.0), (head,), use_tma=True)
    assert not kernels.use_tma


def stored_by(kernels, target: torch.Tensor, *, with_second: bool):
    stored = launch.new_stored(len(target), kernels.heads, with_second=with_second)
    partial = kernels.statistics(slice(0, len(target)), target.int(), stored)
    return stored, partial


def test_stored_fp32_is_the_logits(randn, randint) -> None:
    student, teacher = close_logits(randn, 0.1)
    target = randint(77, 19)
    for logits in ((student,), (student, teacher)):
        kernels = launcher(*logits)
        stored, partial = stored_by(kernels, target, with_second=False)
        assert stored.x.shape == (19, 128)
        for buffer, z in zip(stored, logits, strict=False):
            assert torch.equal(buffer[:, :77], z)
        assert torch.equal(partial, partial_statistics(target, *logits))


def test_stored_fp16_is_centred(randn, randint) -> None:
    """x = s - max s and r = (s - t) - (max s - max t) of the tile, where x says that the token has mass; else r is
    t - max t. Logits of 300, which by themselves fp16 would keep to 0.1."""
    hidden = randn(19, 16).half()
    weight = randn(77, 16).half()
    bias = 300 + randn(77).float()
    bias[5], bias[70] = -INF, 0.0  # excluded; and without mass
    teacher_bias = bias + 0.01 * randn(77).float()
    teacher_bias[70] = 290
    heads = (Head(hidden, weight, bias), Head(hidden, weight, teacher_bias))
    kernels = launch.Launcher(targets.INTERPRETER, launch.Scale(1.0, 0.0), heads, use_tma=False)
    target = randint(77, 19)
    stored, partial = stored_by(kernels, target, with_second=False)
    assert stored.is_centred
    product = hidden.float() @ weight.float().T
    s, t = (product + head.bias_V for head in heads)
    assert torch.equal(partial, kernels.statistics(slice(0, 19), target.int(), None))
    for tile in range(3):
        inside = slice(tile * TILE, min(77, (tile + 1) * TILE))
        s_max, t_max = s[:, inside].amax(-1, keepdim=True), t[:, inside].amax(-1, keepdim=True)
        x = s[:, inside] - s_max
        r = torch.where(x < -90, t[:, inside] - t_max, (s - t)[:, inside] - (s_max - t_max))
        # Half a step of fp16, and the rounding of fp32 logits.
        torch.testing.assert_close(stored.x[:, inside].float(), x, rtol=2**-11, atol=1e-4)
        torch.testing.assert_close(stored.r[:, inside].float(), r, rtol=2**-11, atol=1e-4)
    assert stored.x[:, 5].isneginf().all()
    assert (stored.r[:, 70].float() > -40).all()


def test_second_pass_has_exact_logits(randn) -> None:
    """Its sums are results: 16-bit inputs are stored in fp32 for it."""
    heads = tuple(Head(randn(3, 16).half(), randn(50, 16).half(), None) for _ in range(2))
    kernels = launch.Launcher(targets.INTERPRETER, launch.Scale(1.0, 0.0), heads, use_tma=False)
    stored, partial = stored_by(kernels, torch.zeros(3), with_second=True)
    s, t = (head.hidden_TD.double() @ head.weight_VD.double().T for head in heads)
    torch.testing.assert_close(stored.x[:, :50].double(), s, rtol=1e-6, atol=1e-6)
    p, q = s.softmax(-1), t.softmax(-1)
    mixture = 0.7 * p + 0.3 * q
    jsd = (0.7 * p * (p / mixture).log() + 0.3 * q * (q / mixture).log()).sum(-1)
    truth = torch.stack([torch.minimum(p, q).sum(-1), jsd, (p * (p / mixture).log()).sum(-1)])
    params = launch.dual_params(kernels.merge(partial))
    of_stored = kernels.second_of_stored(stored, params, 3, 0.3)
    again = kernels.second(slice(0, 3), params, 3, 0.3)
    torch.testing.assert_close(of_stored.double(), truth, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(again, of_stored, rtol=1e-5, atol=1e-6)
