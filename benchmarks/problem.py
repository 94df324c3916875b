"""Inputs of the kernel benchmark, the fp64 truth its peers are checked against, and the distance from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from copd_kernels import reference

# reverse_kl: student and teacher head -> dH and dW of the student; grpo: clipped surrogate -> dH and dW;
# scoring: log-prob of the target and entropy, forward only.
TASKS = ("reverse_kl", "grpo", "scoring")
OUTPUTS = {"reverse_kl": ("dH", "dW"), "grpo": ("dH", "dW"), "scoring": ("log-prob", "entropy")}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CLIP_LOW, CLIP_HIGH = 0.2, 0.28
NUM_SEQUENCES = 8
LOGIT_STD = 2.0
# Standard deviation of student minus teacher logits: the everyday case, and the branches CoPD keeps close.
GAP, CLOSE_GAP = 0.5, 0.02


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One task's inputs. Student tensors require grad where the task has a backward pass.

    ``advantage_S`` is one advantage per sequence, T/S tokens each, as Liger takes them; ``advantage_T`` the same per
    token. The loss is the mean over tokens.
    """

    task: str
    hidden_TD: torch.Tensor
    weight_VD: torch.Tensor
    target_T: torch.Tensor
    teacher_hidden_TD: torch.Tensor | None
    teacher_weight_VD: torch.Tensor | None
    advantage_S: torch.Tensor | None
    old_logp_T: torch.Tensor | None

    @property
    def shape(self) -> tuple[int, int, int]:
        """N, D, V."""
        return (*self.hidden_TD.shape, self.weight_VD.shape[0])

    @property
    def teacher(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.teacher_hidden_TD is not None
        assert self.teacher_weight_VD is not None
        return self.teacher_hidden_TD, self.teacher_weight_VD

    @property
    def policy(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """advantage_T, old_logp_T and the weight 1/N of every token."""
        assert self.advantage_S is not None
        assert self.old_logp_T is not None
        num_tokens = self.old_logp_T.numel()
        advantage_T = self.advantage_S.repeat_interleave(num_tokens // self.advantage_S.numel())
        return advantage_T, self.old_logp_T, torch.full_like(self.old_logp_T, 1 / num_tokens)

    def save(self, path: Path) -> None:
        torch.save(vars(self), path)


def load(path: Path, device: str = "cpu") -> Problem:
    fields = torch.load(path, map_location=device)
    problem = Problem(**fields)
    if problem.task != "scoring":
        problem.hidden_TD.requires_grad_()
        problem.weight_VD.requires_grad_()
    return problem


def make(
    task: str, shape: tuple[int, int, int], dtype: torch.dtype, *, gap: float = GAP, device: str = "cpu"
) -> Problem:
    """Random heads with logits of standard deviation 2, targets drawn from the student, a teacher ``gap`` away.

    A fifth of the old log-probs lies far enough away to be clipped. None lies near the edges of the clip range, where
    the rounding of the logits would decide whether a token counts.
    """
    num_tokens, hidden_size, vocab_size = shape
    if num_tokens % NUM_SEQUENCES:
        raise ValueError(f"N must be a multiple of {NUM_SEQUENCES} (the sequences), was {num_tokens}")
    generator = torch.Generator(device).manual_seed(0)

    def normal(rows: int, std: float) -> torch.Tensor:
        return torch.empty((rows, hidden_size), dtype=dtype, device=device).normal_(0, std, generator=generator)

    def near(matrix: torch.Tensor, std: float) -> torch.Tensor:
        # Scaled back, so that the teacher's logits are no larger than the student's.
        size = float(matrix[:1024].float().std())
        return normal(matrix.shape[0], std).add_(matrix).mul_(size / (size**2 + std**2) ** 0.5)

    hidden_TD, weight_VD = normal(num_tokens, 1.0), normal(vocab_size, LOGIT_STD / hidden_size**0.5)
    teacher_hidden_TD = teacher_weight_VD = advantage_S = old_logp_T = None
    if task == "reverse_kl":
        share = gap / LOGIT_STD / 2**0.5
        teacher_hidden_TD, teacher_weight_VD = (
            near(hidden_TD, share),
            near(weight_VD, share * LOGIT_STD / hidden_size**0.5),
        )
    target_T, logp_T = _sample(hidden_TD, weight_VD, generator)
    if task == "grpo":
        advantage_S = torch.randn(NUM_SEQUENCES, device=device, generator=generator)
        offset_T = torch.empty_like(logp_T).uniform_(-0.1, 0.1, generator=generator)
        far_T = torch.rand(num_tokens, device=device, generator=generator) < 0.2
        old_logp_T = logp_T + torch.where(far_T, 0.5 * offset_T.sign() + offset_T, offset_T)
    return Problem(
        task=task,
        hidden_TD=hidden_TD.requires_grad_(task != "scoring"),
        weight_VD=weight_VD.requires_grad_(task != "scoring"),
        target_T=target_T,
        teacher_hidden_TD=teacher_hidden_TD,
        teacher_weight_VD=teacher_weight_VD,
        advantage_S=advantage_S,
        old_logp_T=old_logp_T,
    )


def _chunks(hidden_TD: torch.Tensor, vocab_size: int) -> list[slice]:
    """Token slices of about 2^24 logits."""
    num_tokens = hidden_TD.shape[0]
    size = max(1, 2**24 // vocab_size)
    return [slice(begin, min(begin + size, num_tokens)) for begin in range(0, num_tokens, size)]


def _sample(
    hidden_TD: torch.Tensor, weight_VD: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """A token of the policy for each row, and its log-prob in fp32."""
    weight_VD = weight_VD.detach().float()
    targets, logps = [], []
    for rows in _chunks(hidden_TD, weight_VD.shape[0]):
        logp_CV = (hidden_TD[rows].detach().float() @ weight_VD.T).log_softmax(-1)
        # argmax of p / Exp(1) is a draw from p.
        race_CV = torch.empty_like(logp_CV).exponential_(generator=generator)
        target_C = (logp_CV.exp() / race_CV).argmax(-1)
        targets.append(target_C)
        logps.append(logp_CV.gather(-1, target_C[:, None])[:, 0])
    return torch.cat(targets), torch.cat(logps)


def surrogate(logp_T: torch.Tensor, problem: Problem) -> torch.Tensor:
    """The GRPO loss for peers that give log-probs alone."""
    advantage_T, old_logp_T, loss_weight_T = problem.policy
    ratio_T = (logp_T - old_logp_T).exp()
    clipped_T = ratio_T.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
    return -(loss_weight_T * torch.minimum(ratio_T * advantage_T, clipped_T * advantage_T)).sum()


def truth(problem: Problem) -> tuple[torch.Tensor, ...]:
    """The task's outputs in fp64 on the same rounded inputs, by plain autograd in chunks of tokens."""
    num_tokens, _, vocab_size = problem.shape
    hidden_TD, weight_VD = problem.hidden_TD.detach().double(), problem.weight_VD.detach().double()
    chunks = _chunks(hidden_TD, vocab_size)
    if problem.task == "scoring":
        scores = [reference.linear_logprob(hidden_TD[rows], weight_VD, problem.target_T[rows]) for rows in chunks]
        return torch.cat([score.logp_T for score in scores]), torch.cat([score.entropy_T for score in scores])
    weight_VD.requires_grad_()
    teacher = tuple(x.double() for x in problem.teacher) if problem.task == "reverse_kl" else ()
    gradients = []
    for rows in chunks:
        hidden_CD = hidden_TD[rows].requires_grad_()
        if problem.task == "reverse_kl":
            student_logp_CV = (hidden_CD @ weight_VD.T).log_softmax(-1)
            teacher_logp_CV = (teacher[0][rows] @ teacher[1].T).log_softmax(-1)
            loss = (student_logp_CV.exp() * (student_logp_CV - teacher_logp_CV)).sum() / num_tokens
        else:
            advantage_T, old_logp_T, loss_weight_T = problem.policy
            loss = reference.linear_policy_loss(
                hidden_CD,
                weight_VD,
                problem.target_T[rows],
                advantage_T=advantage_T[rows].double(),
                old_logp_T=old_logp_T[rows].double(),
                loss_weight_T=loss_weight_T[rows].double(),
                clip_low=CLIP_LOW,
                clip_high=CLIP_HIGH,
            ).loss
        loss.backward()
        assert hidden_CD.grad is not None
        gradients.append(hidden_CD.grad)
    assert weight_VD.grad is not None
    return torch.cat(gradients), weight_VD.grad


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative Frobenius error."""
    return float((found.double() - exact).norm() / exact.norm())
