"""What is compared: our operations, the formulas as they are usually written, and the yardstick of bare products.

A peer's entry for a task takes the problem, prepares what a training loop would keep between steps, and returns the
call that is measured. A task without an entry carries the reason.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

import copd_kernels
import torch
import torch.nn.functional as F

from benchmarks.adapter import Call, Outputs, Peer, gradients, grpo_of
from benchmarks.peer_packages import PACKAGE_PEERS
from benchmarks.problem import CLIP_HIGH, CLIP_LOW, Problem

YARDSTICK, OURS, NAIVE = "yardstick", "copd", "naive"
YARDSTICK_TOKENS = 512

# The formulas as they are usually written, on full [T, V] logits.


def _reverse_kl(hidden_TD: torch.Tensor, weight_VD: torch.Tensor, teacher: tuple[torch.Tensor, ...]) -> torch.Tensor:
    with torch.no_grad():
        teacher_logp_TV = (teacher[0] @ teacher[1].T).float().log_softmax(-1)
    student_logp_TV = (hidden_TD @ weight_VD.T).float().log_softmax(-1)
    return F.kl_div(teacher_logp_TV, student_logp_TV, reduction="batchmean", log_target=True)


def _selected_logp(hidden_TD: torch.Tensor, weight_VD: torch.Tensor, target_T: torch.Tensor) -> torch.Tensor:
    logp_TV = (hidden_TD @ weight_VD.T).float().log_softmax(-1)
    return logp_TV.gather(-1, target_T[:, None])[:, 0]


def _scores(hidden_TD: torch.Tensor, weight_VD: torch.Tensor, target_T: torch.Tensor) -> Outputs:
    logp_TV = (hidden_TD @ weight_VD.T).float().log_softmax(-1)
    return logp_TV.gather(-1, target_T[:, None])[:, 0], -(logp_TV.exp() * logp_TV).sum(-1)


def _plain(wrap: Callable[[Any], Any]) -> dict[str, Callable[[Problem], Call]]:
    def reverse_kl(problem: Problem) -> Call:
        loss = wrap(_reverse_kl)
        return lambda: gradients(loss(problem.hidden_TD, problem.weight_VD, problem.teacher), problem)

    def grpo(problem: Problem) -> Call:
        logp = wrap(_selected_logp)
        return grpo_of(problem, lambda: logp(problem.hidden_TD, problem.weight_VD, problem.target_T))

    def scoring(problem: Problem) -> Call:
        scores = wrap(_scores)
        return lambda: scores(problem.hidden_TD, problem.weight_VD, problem.target_T)

    return {"reverse_kl": reverse_kl, "grpo": grpo, "scoring": scoring}


# The yardstick.


def _bare_products(problem: Problem, units: str) -> Call:
    """The products a task cannot do without, 512 tokens at a time into buffers made before: s, t, dH, dW."""
    num_tokens, _, vocab_size = problem.shape
    hidden_TD, weight_VD = problem.hidden_TD.detach(), problem.weight_VD.detach()
    rows = min(YARDSTICK_TOKENS, num_tokens)
    student_CV = hidden_TD.new_empty(rows, vocab_size)
    teacher_CV = hidden_TD.new_empty(rows, vocab_size) if "t" in units else None
    grad_hidden_TD = torch.empty_like(hidden_TD) if "g" in units else None
    grad_weight_VD = torch.zeros_like(weight_VD) if "g" in units else None

    def call() -> Outputs:
        for begin in range(0, num_tokens, rows):
            chunk = slice(begin, min(begin + rows, num_tokens))
            logits_CV = student_CV[: chunk.stop - begin]
            torch.mm(hidden_TD[chunk], weight_VD.T, out=logits_CV)
            if teacher_CV is not None:
                torch.mm(problem.teacher[0][chunk], problem.teacher[1].T, out=teacher_CV[: chunk.stop - begin])
            if grad_hidden_TD is not None and grad_weight_VD is not None:
                torch.mm(logits_CV, weight_VD, out=grad_hidden_TD[chunk])
                grad_weight_VD.addmm_(logits_CV.T, hidden_TD[chunk], beta=float(begin > 0))
        return grad_hidden_TD, grad_weight_VD

    return call


# Ours.


def _copd_reverse_kl(problem: Problem) -> Call:
    # The teacher's arguments are passed by name from a dict: the call stays one line whatever the policy term wants.
    teacher_hidden_TD, teacher_weight_VD = problem.teacher
    weight_T = torch.full((problem.shape[0],), 1 / problem.shape[0], device=problem.hidden_TD.device)
    arguments: dict[str, Any] = {
        "teacher_hidden_TD": teacher_hidden_TD,
        "teacher_weight_VD": teacher_weight_VD,
        "divergence": "reverse_kl",
        "divergence_weight_T": weight_T,
    }
    op: Callable[..., Any] = copd_kernels.linear_policy_loss
    return lambda: gradients(op(problem.hidden_TD, problem.weight_VD, problem.target_T, **arguments).loss, problem)


def _copd_grpo(problem: Problem) -> Call:
    advantage_T, old_logp_T, loss_weight_T = problem.policy

    def call() -> Outputs:
        result = copd_kernels.linear_policy_loss(
            problem.hidden_TD,
            problem.weight_VD,
            problem.target_T,
            advantage_T=advantage_T,
            old_logp_T=old_logp_T,
            loss_weight_T=loss_weight_T,
            clip_low=CLIP_LOW,
            clip_high=CLIP_HIGH,
        )
        return gradients(result.loss, problem)

    return call


def _copd_scoring(problem: Problem) -> Call:
    def call() -> Outputs:
        score = copd_kernels.linear_logprob(problem.hidden_TD, problem.weight_VD, problem.target_T)
        return score.logp_T, score.entropy_T

    return call


PEERS: dict[str, Peer] = {
    YARDSTICK: Peer(
        label="yardstick: torch.mm only",
        package="torch",
        tasks={
            "reverse_kl": lambda p: _bare_products(p, "stg"),
            "grpo": lambda p: _bare_products(p, "sg"),
            "scoring": lambda p: _bare_products(p, "s"),
        },
        checked=False,
    ),
    OURS: Peer(
        label="copd_kernels",
        package="copd-engine",
        tasks={"reverse_kl": _copd_reverse_kl, "grpo": _copd_grpo, "scoring": _copd_scoring},
    ),
    NAIVE: Peer(label="naive PyTorch", package="torch", tasks=_plain(lambda function: function)),
    "compile": Peer(
        label="torch.compile of the naive form", package="torch", tasks=_plain(torch.compile), compiles=True
    ),
    **PACKAGE_PEERS,
}


def select(names: list[str]) -> list[str]:
    """The named peers, or all. ValueError on a name that does not exist."""
    for name in names:
        if name not in PEERS:
            near = difflib.get_close_matches(name, PEERS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"no peer {name!r}: choose from {', '.join(PEERS)}{hint}")
    return list(dict.fromkeys(names)) or list(PEERS)
