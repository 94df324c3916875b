"""The adapters of other people's operations: their own code at their own defaults.

Packages are imported when an adapter is used: which of them are installed is the machine's affair.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from importlib.metadata import distribution
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.adapter import Call, Outputs, Peer, gradients, grpo_of
from benchmarks.problem import CLIP_HIGH, CLIP_LOW, Problem

NO_DISTILLATION = "computes the log-prob of the target, no divergence from a teacher"
NO_SCORES = "its chunked losses return the loss only"


def _torch_log_probs(problem: Problem) -> torch.Tensor:
    # options=None would be the naive form.
    options = torch.nn.LinearCrossEntropyOptions()
    nll_T = F.linear_cross_entropy(
        problem.hidden_TD, problem.weight_VD, problem.target_T, reduction="none", options=options
    )
    return -nll_T.float()


def _liger_reverse_kl(problem: Problem, compiled: bool) -> Call:
    # beta=1 is the reverse KL; the loss on the labels is off.
    loss = importlib.import_module("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=compiled
    )
    heads = (problem.hidden_TD, problem.weight_VD, *problem.teacher)
    return lambda: gradients(loss(*heads, problem.target_T), problem)


def _liger_grpo(problem: Problem, compiled: bool) -> Call:
    assert problem.advantage_S is not None
    # "bnpo" is the mean over tokens; its chunks are sequences.
    loss = importlib.import_module("liger_kernel.chunked_loss").LigerFusedLinearGRPOLoss(
        beta=0.0, compiled=compiled, use_ref_model=False, epsilon_low=CLIP_LOW, epsilon_high=CLIP_HIGH, loss_type="bnpo"
    )
    _, old_logp_T, _ = problem.policy
    sequences = problem.advantage_S.numel()
    old_logp_ST, target_ST = old_logp_T.view(sequences, -1), problem.target_T.view(sequences, -1)
    mask_ST = torch.ones_like(old_logp_ST)

    def call() -> Outputs:
        hidden_STD = problem.hidden_TD.view(sequences, -1, problem.shape[1])
        arguments = (hidden_STD, problem.weight_VD, target_ST, mask_ST, problem.advantage_S)
        return gradients(loss(*arguments, old_per_token_logps=old_logp_ST)[0], problem)

    return call


def _trl_reverse_kl(problem: Problem) -> Call:
    function = importlib.import_module("trl.kernels.chunked_divergence").ChunkedDivergenceFunction
    teacher_hidden_TD, teacher_weight_VD = problem.teacher

    def call() -> Outputs:
        kl_T, _ = function.apply(
            problem.hidden_TD, problem.weight_VD, None, teacher_hidden_TD, teacher_weight_VD, None, 1.0
        )
        return gradients(kl_T.mean(), problem)

    return call


def _trl_log_probs(problem: Problem, outputs: tuple[str, ...]) -> Outputs:
    function = importlib.import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction
    # 32768 vocabulary entries at a time, 1.0 temperature, no softcap, scale 1: what TRL's trainers pass.
    arguments = (problem.hidden_TD, problem.weight_VD, None, problem.target_T, 1.0, 32768, None, 1.0, outputs)
    result: Outputs = function.apply(*arguments)
    return result[:2]


def _verl(problem: Problem) -> Callable[[], Any]:
    # The one file that holds the op: `import verl` wants ray, tensordict, hydra and an older transformers.
    path = distribution("verl").locate_file("verl/utils/experimental/torch_functional.py")
    spec = importlib.util.spec_from_file_location("verl_torch_functional", str(path))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    op = module.FusedLinearForPPO()
    return lambda: op(problem.hidden_TD, problem.weight_VD, problem.target_T)


def _cce_log_probs(problem: Problem) -> torch.Tensor:
    op = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    # The Triton path needs a GPU; on one it is the package's default.
    impl = "cce" if problem.hidden_TD.is_cuda else "torch_compile"
    nll_T: torch.Tensor = op(problem.hidden_TD, problem.weight_VD, problem.target_T, reduction="none", impl=impl)
    return -nll_T.float()


def _first(outputs: Any) -> torch.Tensor:
    first: torch.Tensor = outputs[0]
    return first


def _liger(compiled: bool) -> dict[str, Callable[[Problem], Call]]:
    return {"reverse_kl": lambda p: _liger_reverse_kl(p, compiled), "grpo": lambda p: _liger_grpo(p, compiled)}


PACKAGE_PEERS: dict[str, Peer] = {
    "torch-lce": Peer(
        label="torch linear_cross_entropy",
        package="torch",
        tasks={
            "grpo": lambda p: grpo_of(p, lambda: _torch_log_probs(p)),
            "scoring": lambda p: lambda: (_torch_log_probs(p), None),
        },
        missing={"reverse_kl": NO_DISTILLATION},
    ),
    "liger": Peer(
        label="Liger, eager", package="liger-kernel", tasks=_liger(compiled=False), missing={"scoring": NO_SCORES}
    ),
    "liger-compiled": Peer(
        label="Liger, compiled",
        package="liger-kernel",
        tasks=_liger(compiled=True),
        missing={"scoring": NO_SCORES},
        compiles=True,
    ),
    "trl": Peer(
        label="TRL chunked",
        package="trl",
        tasks={
            "reverse_kl": _trl_reverse_kl,
            "grpo": lambda p: grpo_of(p, lambda: _first(_trl_log_probs(p, ()))),
            "scoring": lambda p: lambda: _trl_log_probs(p, ("entropy",)),
        },
    ),
    "verl": Peer(
        label="verl FusedLinearForPPO",
        package="verl",
        tasks={
            "grpo": lambda p: (lambda op: grpo_of(p, lambda: _first(op())))(_verl(p)),
            "scoring": _verl,
        },
        missing={"reverse_kl": NO_DISTILLATION},
    ),
    "cce": Peer(
        label="Apple CCE (torch_compile on CPU)",
        package="cut-cross-entropy",
        tasks={
            "grpo": lambda p: grpo_of(p, lambda: _cce_log_probs(p)),
            "scoring": lambda p: lambda: (_cce_log_probs(p), None),
        },
        missing={"reverse_kl": NO_DISTILLATION},
        compiles=True,
    ),
}
