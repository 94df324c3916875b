"""No buffer grows with tokens times vocabulary: the resident memory of a child process, and more than 2^31 logits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import copd_kernels
import pytest
import torch
from copd_kernels import _driver, _products, reference

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# 16 times the logits: 32 MiB and 512 MiB per head in fp32. The hidden size is small, so that nothing else is large.
SHAPES = {"small": (1024, 8192), "large": (4096, 32768)}
HIDDEN = 16
# Logits of all heads by rows, or by tiles one of logits and one of converted weights per head. On top: statistics
# [12, T], the gradient of the hidden states in fp32, buffers inside the products, pages of the allocator.
ALLOWANCE_BYTES = 16 * MIB
LIMIT_BYTES = max(_driver.ROWS_BYTES, 4 * _products.TILE_BYTES) + ALLOWANCE_BYTES
OPS = ("linear_logprob", "linear_divergence", "linear_policy_loss", "topk_overlap")


def _call(op: str, module: Any, hidden: torch.Tensor, weight: torch.Tensor) -> Callable[[], list[torch.Tensor]]:
    """Forward and backward of everything differentiable; what it returns stays alive: outputs and gradients."""
    num_tokens, vocab_size = hidden.shape[0], weight.shape[0]
    target = torch.arange(num_tokens) % vocab_size
    teacher_hidden, teacher_weight = hidden.detach() * 1.1, weight.detach() * 0.9
    ones = torch.ones(num_tokens)

    def call() -> list[torch.Tensor]:
        if op == "topk_overlap":
            return [module.topk_overlap(hidden, weight, teacher_hidden, teacher_weight)]
        if op == "linear_logprob":
            out = module.linear_logprob(hidden, weight, target)
            loss = (out.logp_T + out.entropy_T).sum()
        elif op == "linear_divergence":
            out = module.linear_divergence(hidden, weight, teacher_hidden, teacher_weight, target)
            loss = (out.symmetric_kl_T + out.jsd_T + out.student_logp_T).sum()
        else:
            out = module.linear_policy_loss(
                hidden,
                weight,
                target,
                advantage_T=ones,
                old_logp_T=-10 * ones,
                loss_weight_T=ones,
                teacher_hidden_TD=teacher_hidden,
                teacher_weight_VD=teacher_weight,
                divergence_weight_T=ones,
            )
            loss = out.loss
        gradients = torch.autograd.grad(loss, (hidden, weight))
        return [x.detach() for x in (*out, *gradients) if isinstance(x, torch.Tensor)]

    return call


def _measure(form: str, dtype_name: str) -> dict[str, int]:
    """Bytes beyond inputs, outputs and gradients, by operation and size. Runs in the child."""
    from benchmarks.measure import extra_bytes

    torch.set_num_threads(1)
    torch.manual_seed(0)
    module, dtype = (copd_kernels if form == "fused" else reference), DTYPES[dtype_name]
    found = {}
    for op in OPS:
        # One-time buffers of the libraries do not count.
        _call(op, module, torch.randn(40, HIDDEN, requires_grad=True), torch.randn(60, HIDDEN, requires_grad=True))()
    for size, (num_tokens, vocab_size) in SHAPES.items():
        hidden = torch.randn(num_tokens, HIDDEN).to(dtype).requires_grad_()
        weight = torch.randn(vocab_size, HIDDEN).to(dtype).requires_grad_()
        for op in OPS if form == "fused" else OPS[:1]:
            kept, extra, source = extra_bytes(_call(op, module, hidden, weight))
            assert source == "VmHWM", source
            found[f"{op} {size}"] = extra - sum(x.numel() * x.element_size() for x in kept)
            del kept
    return found


def _in_child(form: str, dtype_name: str) -> dict[str, int]:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of resident memory can be reset on Linux only")
    command = [sys.executable, __file__, form, dtype_name]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=250)
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout.splitlines()[-1])


@pytest.mark.parametrize("dtype_name", DTYPES)
def test_memory_does_not_grow_with_the_logits(dtype_name: str) -> None:
    found = _in_child("fused", dtype_name)
    for op in OPS:
        # 16 times the logits make no more than the workspace, which the small shape need not fill.
        for size in SHAPES:
            extra = found[f"{op} {size}"]
            assert extra <= LIMIT_BYTES, f"{op} {size}: {extra / MIB:.0f} MiB of {LIMIT_BYTES / MIB:.0f}"


def test_the_watch_sees_logits() -> None:
    """The plain formula in the same harness: logits, their softmax and gradient."""
    found = _in_child("plain", "fp32")
    small, large = (found[f"linear_logprob {size}"] for size in SHAPES)
    num_tokens, vocab_size = SHAPES["large"]
    assert large >= 2 * 4 * num_tokens * vocab_size > 4 * LIMIT_BYTES
    assert large > 8 * small


def test_weight_gradient_over_thousands_of_chunks() -> None:
    """One token per chunk: a 16-bit sum would stop growing after some hundred of them, an fp32 sum does not."""
    num_tokens, vocab_size = 3000, 7
    generator = torch.Generator().manual_seed(0)
    for dtype, bound in ((torch.float32, 5e-6), (torch.bfloat16, 4e-3)):
        # Of one sign, so that the sums grow.
        hidden = (torch.rand(num_tokens, 6, generator=generator) + 0.5).to(dtype)
        weight = torch.randn(vocab_size, 6, generator=generator).to(dtype)
        teacher = torch.randn(vocab_size, 6, generator=generator).to(dtype)
        target = torch.zeros(num_tokens, dtype=torch.int64)
        terms = {
            "advantage_T": torch.ones(num_tokens),
            "old_logp_T": torch.zeros(num_tokens),
            "loss_weight_T": torch.ones(num_tokens),
            "divergence_weight_T": torch.ones(num_tokens),
        }

        def gradients(module: Any, cast: Callable[[torch.Tensor], torch.Tensor], **chunks: int) -> list[torch.Tensor]:
            found = []
            for op in OPS[:3]:
                leaf = cast(weight).clone().requires_grad_()  # noqa: B023 (called in this round of the loop)
                heads = cast(hidden), leaf, cast(hidden), cast(teacher)  # noqa: B023
                if op == "linear_logprob":
                    loss = module.linear_logprob(*heads[:2], target, **chunks).logp_T.sum()  # noqa: B023
                elif op == "linear_divergence":
                    loss = module.linear_divergence(*heads, top_k=1, **chunks).symmetric_kl_T.sum()
                else:
                    pair = dict(zip(("teacher_hidden_TD", "teacher_weight_VD"), heads[2:], strict=True))
                    loss = module.linear_policy_loss(*heads[:2], target, **pair, **terms, **chunks).loss  # noqa: B023
                found += torch.autograd.grad(loss, leaf)
            return found

        got = gradients(copd_kernels, lambda x: x, chunk_tokens=1)
        expected = gradients(reference, torch.Tensor.double)
        for op, value, true in zip(OPS, got, expected, strict=False):
            error = float((value.double() - true).norm() / true.norm())
            assert error <= bound, (op, dtype, error)


def _last_rows(module: Any, inputs: dict[str, torch.Tensor], rows: int, **options: Any) -> dict[str, torch.Tensor]:
    """Log-prob and policy loss whose gradient comes from the last rows alone; ``rows`` of the tokens are computed."""
    hidden = inputs["hidden"][-rows:].clone().requires_grad_()
    weight = inputs["weight"].clone().requires_grad_()
    target, upstream = inputs["target"][-rows:], inputs["upstream"][-rows:].to(hidden.dtype)
    out = module.linear_logprob(hidden, weight, target)
    columns = torch.stack(list(out))
    gradients = torch.autograd.grad((columns * upstream.to(columns.dtype)).sum(), (hidden, weight))
    terms = {"advantage_T": upstream, "old_logp_T": columns[0].detach(), "loss_weight_T": torch.ones_like(upstream)}
    loss = module.linear_policy_loss(hidden, weight, target, **terms, **options)
    gradients += torch.autograd.grad(loss.loss, (hidden, weight))
    names = ("hidden", "weight", "policy hidden", "policy weight")
    values = {"columns": columns.detach(), "loss_T": loss.loss_T} | dict(zip(names, gradients, strict=True))
    last = {"columns", "loss_T", "hidden", "policy hidden"}
    return {
        name: (x[..., -LAST:] if name in ("columns", "loss_T") else x[-LAST:]) if name in last else x
        for name, x in values.items()
    }


LAST = 40


@pytest.mark.slow
@pytest.mark.parametrize("dtype", list(DTYPES.values()))
@pytest.mark.parametrize("in_one_chunk", [False, True], ids=["default chunks", "one chunk"])
def test_more_than_two_to_the_31_logits(in_one_chunk: bool, dtype: torch.dtype) -> None:
    """The last rows and columns against fp64 on those rows alone. In one chunk a single buffer has 64-bit offsets."""
    num_tokens, vocab_size = 66_000, 32_800
    assert num_tokens * vocab_size > 2**31
    if in_one_chunk:
        available = next(line for line in Path("/proc/meminfo").read_text().splitlines() if "MemAvailable" in line)
        if int(available.split()[1]) < 12 * MIB:
            pytest.skip("needs 12 GiB of memory")
        if dtype == torch.bfloat16:
            pytest.skip("weights of 16 bits go by tiles: no buffer has that many logits")
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "hidden": torch.randn(num_tokens, 3, generator=generator).to(dtype),
        "weight": torch.randn(vocab_size, 3, generator=generator).to(dtype),
        "target": torch.arange(num_tokens) * 7 % vocab_size,
        "upstream": torch.zeros(num_tokens, dtype=torch.float64),
    }
    inputs["target"][-3:] = torch.tensor([vocab_size - 1, vocab_size - 2, 0])
    # Exact in bf16: it is an argument of the policy loss too.
    inputs["upstream"][-LAST:] = torch.randint(32, 96, (LAST,), generator=generator).double() / 64
    options = {"chunk_tokens": num_tokens} if in_one_chunk else {}
    got = _last_rows(copd_kernels, inputs, num_tokens, **options)
    exact = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    expected = _last_rows(reference, exact, LAST)
    # An fp32 sum over so many entries is as exact as the product of the machine's library: twice the plain formula.
    plain = _last_rows(reference, {k: x.float() if x.is_floating_point() else x for k, x in inputs.items()}, LAST)
    floor = {torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]
    for name, value in got.items():
        true = expected[name]
        assert value.shape == true.shape, name
        if name in ("columns", "loss_T"):
            torch.testing.assert_close(value.double(), true, rtol=5e-6, atol=5e-5, msg=name)
        else:
            error, plain_error = ((x.double() - true).norm() / true.norm() for x in (value, plain[name]))
            assert error <= 2 * plain_error + floor, (name, error, plain_error)


if __name__ == "__main__":
    print(json.dumps(_measure(sys.argv[1], sys.argv[2])))
