"""How far apart the branches are: (OVERLAP), KL both ways, (SYM-KL) and sum of minima on fixed probe prompts.

For every ordered pair the states are those the *student* visits: it samples one response per probe prompt with a fixed
seed, and both models' full next-token distributions are compared at each of its tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from copd_kernels import linear_divergence

from copd_engine.branch import Branch
from copd_engine.rollout.base import RolloutEngine, Sampling
from copd_engine.types import RolloutRequest

PAIR_METRICS = {
    "overlap": "overlap_T",
    "sum_min": "sum_min_T",
    "kl_student_teacher": "kl_student_teacher_T",
    "kl_teacher_student": "kl_teacher_student_T",
    "symmetric_kl": "symmetric_kl_T",
}


@torch.no_grad()
def compare_branches(
    branches: Mapping[str, Branch],
    engine: RolloutEngine,
    probes: Sequence[RolloutRequest],
    sampling: Sampling,
    top_k: int,
) -> list[dict[str, float | str]]:
    """One row per ordered pair of branches: names and the token means of :data:`PAIR_METRICS` (KL in nats)."""
    rows: list[dict[str, float | str]] = []
    if len(branches) < 2 or not probes:
        return rows
    for student_name, student in branches.items():
        rollouts = engine.generate(student_name, probes, sampling)
        num_tokens = sum(rollout.num_tokens for rollout in rollouts)
        means = {name: dict.fromkeys(PAIR_METRICS, 0.0) for name in branches if name != student_name}
        for indexes in student.micro_batches(rollouts):
            batch = student.pack([rollouts[i] for i in indexes])
            student_hidden_ND = student.policy.hidden_states(batch)
            for teacher_name, sums in means.items():
                teacher = branches[teacher_name].policy
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
