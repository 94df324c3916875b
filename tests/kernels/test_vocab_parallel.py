"""Statistics of vocabulary shards merge to those of the whole head, and shard gradients add up to its gradients."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from copd_kernels import linear_logprob, merge_statistics, reference, statistics, vocab_parallel

NUM_TOKENS, HIDDEN, VOCAB = 9, 12, 41
CUTS = [(0, 7), (7, 8), (8, 30), (30, 41)]


@pytest.fixture
def inputs(randn, randint):
    hidden, weight, bias = randn(NUM_TOKENS, HIDDEN), randn(VOCAB, HIDDEN), randn(VOCAB)
    teacher_hidden = hidden + randn(NUM_TOKENS, HIDDEN, scale=0.01)
    return hidden, weight, bias, teacher_hidden, weight + randn(VOCAB, HIDDEN, scale=0.01), randint(VOCAB, NUM_TOKENS)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 0, 2]])
def test_single_head(inputs, randn, order) -> None:
    hidden, weight, bias, _, _, target = inputs
    scale = {"temperature": 0.7, "softcap": 4.0}
    grads = randn(3, NUM_TOKENS)
    wanted = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    truth = reference.linear_logprob(wanted[0], wanted[1], target, bias_V=wanted[2], **scale)
    torch.autograd.backward(tuple(truth), tuple(grads))

    def shard(begin, end):
        return {"vocab_begin": begin, "bias_V": bias[begin:end], **scale}

    parts = [
        vocab_parallel.single_statistics(hidden, weight[begin:end], target, **shard(begin, end)) for begin, end in CUTS
    ]
    merged = merge_statistics(torch.stack([parts[i] for i in order]))
    for got, want in zip(statistics.head_finals(merged), truth, strict=True):
        torch.testing.assert_close(got, want.detach(), rtol=1e-12, atol=1e-12)
    pieces = [
        vocab_parallel.single_gradient(hidden, weight[begin:end], target, merged, *grads, **shard(begin, end))
        for begin, end in CUTS
    ]
    torch.testing.assert_close(sum(p.hidden_TD for p in pieces), wanted[0].grad, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(torch.cat([p.weight_VD for p in pieces]), wanted[1].grad, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(torch.cat([p.bias_V for p in pieces]), wanted[2].grad, rtol=1e-10, atol=1e-11)


def test_two_heads(inputs, randn) -> None:
    hidden, weight, _, teacher_hidden, teacher_weight, target = inputs
    logp, entropy, reverse, forward = grads = randn(4, NUM_TOKENS)
    wanted = [x.clone().requires_grad_() for x in (hidden, weight)]
    truth = reference.linear_divergence(*wanted, teacher_hidden, teacher_weight, target)
    columns = (truth.student_logp_T, truth.student_entropy_T, truth.kl_student_teacher_T, truth.kl_teacher_student_T)
    torch.autograd.backward(columns, (logp, entropy, reverse, forward))

    def heads(begin, end):
        return hidden, weight[begin:end], teacher_hidden, teacher_weight[begin:end], target

    parts = [vocab_parallel.dual_statistics(*heads(*cut), vocab_begin=cut[0]) for cut in CUTS]
    merged = merge_statistics(torch.stack(parts))
    for got, want in zip(statistics.divergences(merged), columns[2:], strict=True):
        torch.testing.assert_close(got, want.detach(), rtol=1e-9, atol=0)
    pieces = [vocab_parallel.dual_gradient(*heads(*cut), merged, *grads, vocab_begin=cut[0]) for cut in CUTS]
    torch.testing.assert_close(sum(p.hidden_TD for p in pieces), wanted[0].grad, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(torch.cat([p.weight_VD for p in pieces]), wanted[1].grad, rtol=1e-9, atol=1e-11)


def test_a_target_outside_every_shard_has_no_log_prob(inputs) -> None:
    hidden, weight, _, _, _, target = inputs
    merged = vocab_parallel.single_statistics(hidden, weight[:7], torch.full_like(target, 9), vocab_begin=0)
    assert torch.isneginf(statistics.head_finals(merged).logp_T).all()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"vocab_begin": -1}, "vocab_begin must be >= 0, was -1"),
        ({"vocab_begin": 0, "temperature": 0.0}, "temperature must be > 0, was 0.0"),
        ({"vocab_begin": 0, "bias_V": torch.zeros(3)}, r"bias_V must be \[V\] with V = 41, was \[3\]"),
    ],
)
def test_errors_name_the_argument(inputs, options, match) -> None:
    with pytest.raises(ValueError, match=match):
        vocab_parallel.single_statistics(inputs[0], inputs[1], inputs[5], **options)


def test_parts_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"parts_SFT must be \[S, 4, T\] or \[S, 12, T\].*\[2, 5, 3\]"):
        merge_statistics(torch.zeros(2, 5, 3))


def _rank(rank: int, folder: str, world_size: int = 2) -> None:
    """The example of the module's docstring, on real ranks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    torch.manual_seed(0)
    hidden, weight, target = torch.randn(5, 8), torch.randn(20, 8), torch.randint(20, (5,))
    shard, begin = weight.chunk(world_size)[rank], rank * 10
    mine = vocab_parallel.single_statistics(hidden, shard, target, vocab_begin=begin)
    parts = [torch.empty_like(mine) for _ in range(world_size)]
    dist.all_gather(parts, mine)
    merged = merge_statistics(torch.stack(parts))
    grads = vocab_parallel.single_gradient(hidden, shard, target, merged, torch.ones(5), vocab_begin=begin)
    dist.all_reduce(grads.hidden_TD)
    torch.save((statistics.head_finals(merged).logp_T, grads.hidden_TD), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks(tmp_path) -> None:
    ranks = [subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    torch.manual_seed(0)
    hidden, weight, target = torch.randn(5, 8, requires_grad=True), torch.randn(20, 8), torch.randint(20, (5,))
    logp = linear_logprob(hidden, weight, target).logp_T
    logp.sum().backward()
    for rank in range(2):
        got_logp, got_grad = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(got_logp, logp.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got_grad, hidden.grad, rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    _rank(int(sys.argv[1]), sys.argv[2])
