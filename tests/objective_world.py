"""Policies, rollouts that share prompts, and plain models: what the tests of the objective are about."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from copd_engine.branch import Branch
from copd_engine.config import DistillationConfig, ObjectiveConfig, OptimConfig
from copd_engine.objectives import TrainSample, token_weight
from copd_engine.rollout.base import Sampling
from copd_engine.rollout.embedded import EmbeddedEngine
from copd_engine.types import Rollout, RolloutRequest
from tests.helpers import prompts_of_all_domains, tiny_model
from tests.plain import plain_logp, plain_model
from tests.test_branch import Gradients, perturbed

TEMPERATURE = 0.8
BETA = 0.7
CLIP_LOW, CLIP_HIGH = 0.2, 0.28
ADVANTAGES = [1.3, -0.4, -0.9, 0.7, 0.6, -1.3]


@dataclass(frozen=True)
class World:
    """``samplers``: the sampler's log-probs are those of another policy than the student's."""

    policies: dict[str, Any]
    encoder: Any
    native: list[Rollout]
    cross: dict[str, list[Rollout]]

    def branch(self, name: str = "student", distillation: dict[str, Any] | None = None, **objective: Any) -> Branch:
        optim = OptimConfig(lr=0.02, max_grad_norm=1e9, max_tokens_per_micro_batch=160)
        return Branch(
            name,
            self.policies[name].clone(),
            self.encoder,
            optim,
            ObjectiveConfig(**objective),
            TEMPERATURE,
            distillation=DistillationConfig(**distillation or {}),
            reference=self.policies["base"],
        )

    def grpo(self) -> list[TrainSample]:
        return [
            TrainSample(r, "grpo", token_weight(1.0, len(self.native), r.num_tokens), advantage=a)
            for r, a in zip(self.native, ADVANTAGES, strict=True)
        ]

    def distilled(self, signal: str = "sampled") -> list[TrainSample]:
        samples = []
        for name, rollouts in self.cross.items():
            teacher = self.branch(name)
            bare = [
                TrainSample(r, f"opd:{name}", token_weight(0.5, len(rollouts), r.num_tokens), beta=BETA)
                for r in rollouts
            ]
            if signal == "sampled":
                scores = teacher.score(rollouts)
                samples += [replace(s, teacher_logp_N=n) for s, n in zip(bare, scores, strict=True)]
            else:
                states = teacher.teacher_states(rollouts)
                samples += [replace(s, teacher=t) for s, t in zip(bare, states, strict=True)]
        return samples


def make_world() -> World:
    """Two text groups of three; of a two image responses of one group, of b three video responses of one group.

    Sampled by a policy that has moved a little from the student, so that importance correction has something to do.
    """
    base, encoder = tiny_model()
    policies = {name: perturbed(base, seed, 0.1) for seed, name in enumerate(("student", "a", "b"), start=1)}
    policies |= {"base": base, "sampler": perturbed(policies["student"], 7, 0.1)}
    text, image, video, text2, *_ = prompts_of_all_domains(encoder)
    prompts = [text] * 3 + [text2] * 3 + [image] * 2 + [video] * 3
    groups = [0] * 3 + [1] * 3 + [2] * 2 + [3] * 3
    requests = [RolloutRequest(p, seed=i, group=g) for i, (p, g) in enumerate(zip(prompts, groups, strict=True))]
    rollouts = EmbeddedEngine(policies, encoder).generate("sampler", requests, Sampling(TEMPERATURE, 9))
    rollouts = [
        replace(r, response_ids_N=r.response_ids_N[: 3 + i % 6], sampler_logp_N=r.sampler_logp_N[: 3 + i % 6])
        for i, r in enumerate(rollouts)
    ]
    return World(policies, encoder, rollouts[:6], {"a": rollouts[6:8], "b": rollouts[8:]})


class Truth:
    """Plain models of the policies, and the gradient of a loss that is a sum over samples."""

    def __init__(self, world: World, student: Any = None, old: Any = None) -> None:
        self.student = plain_model(student or world.policies["student"])
        self._frozen = {name: plain_model(policy) for name, policy in world.policies.items()}
        self._frozen["old"] = plain_model(old or student or world.policies["student"])

    def logp(self, rollout: Rollout) -> torch.Tensor:
        """The student's, fp64 ``[N, V]``, with gradient."""
        return plain_logp(self.student, rollout.request.prompt, rollout.response_ids_N, TEMPERATURE)

    @torch.no_grad()
    def frozen(self, name: str, rollout: Rollout) -> torch.Tensor:
        return plain_logp(self._frozen[name], rollout.request.prompt, rollout.response_ids_N, TEMPERATURE)

    def gradients(self, samples: Sequence[TrainSample], losses_of: Callable[[TrainSample], torch.Tensor]) -> Gradients:
        """Of the sum over samples of token_weight times the sum over tokens of ``losses_of``."""
        self.student.zero_grad()
        total = torch.stack([sample.token_weight * losses_of(sample).sum() for sample in samples]).sum()
        total.backward()
        return {name: p.grad for name, p in self.student.named_parameters() if p.grad is not None}


def of_tokens(logp_NV: torch.Tensor, rollout: Rollout) -> torch.Tensor:
    return logp_NV.gather(1, rollout.response_ids_N[:, None]).squeeze(1)


def kl(p_NV: torch.Tensor, q_NV: torch.Tensor) -> torch.Tensor:
    return (p_NV.exp() * (p_NV - q_NV)).sum(1)


def clipped(rho_N: torch.Tensor, advantage_N: torch.Tensor | float) -> torch.Tensor:
    return -torch.minimum(rho_N * advantage_N, rho_N.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH) * advantage_N)


def advantage_of(truth: Truth, sample: TrainSample) -> torch.Tensor | float:
    if not sample.is_distilled:
        return sample.advantage
    old_N = of_tokens(truth.frozen("old", sample.rollout), sample.rollout)
    return BETA * (of_tokens(truth.frozen(sample.term[4:], sample.rollout), sample.rollout) - old_N)
