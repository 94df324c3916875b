"""How far apart the branches are: (OVERLAP), KL both ways, (SYM-KL) and sum of minima on fixed probe prompts, each
against the others and against the base, and the angle between what they learned.

For every ordered pair the states are those the *student* visits: it samples one response per probe prompt with a fixed
seed, and both models' full next-token distributions are compared at each of its tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from copd_kernels import linear_divergence

from copd_engine.branch import Branch
from copd_engine.models.base import Policy
from copd_engine.rollout.base import RolloutEngine, Sampling
from copd_engine.types import RolloutRequest

#: The teacher's name in rows that compare a branch with the model it started from.
BASE = "base"
PAIR_METRICS = {
    "overlap": "overlap_T",
    "sum_min": "sum_min_T",
    "kl_student_teacher": "kl_student_teacher_T",
    "kl_teacher_student": "kl_teacher_student_T",
    "symmetric_kl": "symmetric_kl_T",
    "student_entropy": "student_entropy_T",
}


@torch.no_grad()
def compare_branches(
    branches: Mapping[str, Branch],
    engine: RolloutEngine,
    probes: Sequence[RolloutRequest],
    sampling: Sampling,
    top_k: int,
    base: Policy | None = None,
) -> list[dict[str, Any]]:
    """One row per ordered pair of branches, and with ``base`` one per branch with that as its teacher: names and the
    token means of :data:`PAIR_METRICS` (KL and entropy in nats). A student of which the engine lost all has no rows."""
    rows: list[dict[str, Any]] = []
    policies = {name: branch.policy for name, branch in branches.items()} | ({BASE: base} if base is not None else {})
    if len(policies) < 2 or not probes:
        return rows
    for student_name, student in branches.items():
        rollouts = engine.generate(student_name, probes, sampling)
        num_tokens = sum(rollout.num_tokens for rollout in rollouts)
        if not num_tokens:
            continue
        means = {name: dict.fromkeys(PAIR_METRICS, 0.0) for name in policies if name != student_name}
        for indexes in student.micro_batches(rollouts):
            batch = student.pack([rollouts[i] for i in indexes])
            student_hidden_ND = student.policy.hidden_states(batch)
            for teacher_name, sums in means.items():
                teacher = policies[teacher_name]
                divergence = linear_divergence(
                    student_hidden_ND,
                    student.policy.lm_head_weight,
                    teacher.hidden_states(batch),
                    teacher.lm_head_weight,
                    student_bias_V=student.policy.lm_head_bias,
                    teacher_bias_V=teacher.lm_head_bias,
                    temperature=sampling.temperature,
                    top_k=top_k,
                )
                for name, field in PAIR_METRICS.items():
                    sums[name] += float(getattr(divergence, field).sum()) / num_tokens
        rows += [{"student": student_name, "teacher": name, **values} for name, values in means.items()]
    return rows


Weights = Mapping[str, torch.Tensor]


@torch.no_grad()
def change_cosines(ends: Mapping[str, Weights], starts: Mapping[str, Weights]) -> dict[tuple[str, str], float | None]:
    """Cosine between ``ends[a] - starts[a]`` and ``ends[b] - starts[b]`` over all weights, for every ordered pair of
    models; None where one of them has not changed.

    Tensor by tensor: differences in fp32, sums in fp64; nothing of a model's size is allocated.
    """
    names = list(ends)
    gram = dict.fromkeys(itertools.combinations_with_replacement(names, 2), 0.0)
    for weight in next(iter(ends.values()), {}):
        changes = {n: (ends[n][weight].float() - starts[n][weight].to(ends[n][weight].device).float()) for n in names}
        for a, b in gram:
            gram[a, b] += float((changes[a] * changes[b]).sum(dtype=torch.float64))
    cosines: dict[tuple[str, str], float | None] = {}
    for a, b in itertools.combinations(names, 2):
        norm = (gram[a, a] * gram[b, b]) ** 0.5
        cosines[a, b] = cosines[b, a] = gram[a, b] / norm if norm else None
    return cosines


class UpdateAngles:
    """The cosine between what the branches learned since it was last asked for; remembers their trained parameters (of
    LoRA the adapters') on the CPU."""

    def __init__(self, branches: Mapping[str, Branch]) -> None:
        self._before = {name: _snapshot(branch) for name, branch in branches.items()}

    def cosines(self, branches: Mapping[str, Branch]) -> dict[tuple[str, str], float | None]:
        """Between these branches, since the last call that had them."""
        found = change_cosines({name: branch.masters.tensors for name, branch in branches.items()}, self._before)
        self._before |= {name: _snapshot(branch) for name, branch in branches.items()}
        return found

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps, as ``BRANCH/PARAMETER``."""
        return {f"{name}/{key}": t for name, tensors in self._before.items() for key, t in tensors.items()}

    def load_tensors(self, tensors: Weights) -> None:
        for key, tensor in tensors.items():
            name, _, parameter = key.partition("/")
            self._before[name][parameter] = tensor


def _snapshot(branch: Branch) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in branch.masters.tensors.items()}
