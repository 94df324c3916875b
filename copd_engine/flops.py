"""What a run computes to make a model: tokens by purpose, and the FLOPs of them all.

A forward costs what :class:`copd_engine.micro_batches.CostModel` says, two FLOPs per active parameter and token in the
linear layers, ``4 A`` per (query, key) pair and layer in attention (A: heads times their width), likewise for the
patches of the vision tower, and ``2 D V`` per response token in the output head. A backward is twice a forward, so
training costs three: the usual 2 and 6 FLOPs per parameter and token; a frozen vision tower has no backward. A group's
prompt counts once, in sampling, where its members share keys and values, as in packed rows.

Counted: sampling, scores of teachers, old log-probs where they need a forward of their own, updates. Not counted:
evaluation and diagnostics; what is computed again (gradient checkpointing, preempted requests, a prompt that is in
several micro-batches); and what is projected by the student's head beside an update's own, ``2 D V`` per response token
each: the old log-probs of a step's first update (with ``sampled_cv`` the exact KL's statistics are taken from the same
projection), and in later updates the log-probs beforehand that ``surrogate: cispo`` and ``ratio_level: sequence`` need.
A teacher's or the base's projection counts with its forward, also where the loss takes it (signals over the vocabulary,
``kl.estimator: full``). Adapters count like full training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from copd_engine.micro_batches import CostModel, Workload
from copd_engine.types import Rollout


@dataclass(frozen=True)
class Work:
    """Tokens of prompts that were prefilled, tokens that were sampled, prompt and response tokens of forwards without
    backward (teachers, old log-probs) and with one, and the FLOPs of all four."""

    prefilled_tokens: int = 0
    generated_tokens: int = 0
    scored_tokens: int = 0
    trained_tokens: int = 0
    flops: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(**{key: value + getattr(other, key) for key, value in asdict(self).items()})

    def __sub__(self, other: Work) -> Work:
        return Work(**{key: value - getattr(other, key) for key, value in asdict(self).items()})


class WorkMeter:
    """Counts for models of one size. ``freeze_vision``: the vision tower has no backward."""

    def __init__(self, sizes: Mapping[str, int], vocab_size: int, freeze_vision: bool = False) -> None:
        self._cost = CostModel.of(**sizes)
        self._head = 2 * sizes["hidden_size"] * vocab_size
        self._vision_factor = 1 if freeze_vision else 3

    def sampled(self, rollouts: Sequence[Rollout]) -> Work:
        prompts, responses, decoder, vision = self._forward(rollouts)
        return Work(prefilled_tokens=prompts, generated_tokens=responses, flops=decoder + vision)

    def scored(self, rollouts: Sequence[Rollout]) -> Work:
        prompts, responses, decoder, vision = self._forward(rollouts)
        return Work(scored_tokens=prompts + responses, flops=decoder + vision)

    def trained(self, rollouts: Sequence[Rollout]) -> Work:
        prompts, responses, decoder, vision = self._forward(rollouts)
        return Work(trained_tokens=prompts + responses, flops=3 * decoder + self._vision_factor * vision)

    def _forward(self, rollouts: Sequence[Rollout]) -> tuple[int, int, int, int]:
        """Prompt tokens, response tokens, FLOPs of one forward of the decoder with its head, and of the vision tower;
        a prompt once for its group."""
        work = Workload.of([r.request.prompt for r in rollouts], [r.num_tokens for r in rollouts])
        prompt_P, response_B = work.prompt_rows_P, work.response_rows_B
        num_prompt, num_response = int(prompt_P.sum()), sum(r.num_tokens for r in rollouts)
        pairs = int((prompt_P * (prompt_P + 1) // 2).sum() + (response_B * (response_B + 1) // 2).sum())
        pairs += int((response_B * prompt_P[work.prompt_of_B]).sum()) if len(rollouts) else 0
        decoder = (num_prompt + int(response_B.sum())) * self._cost.token + pairs * self._cost.pair
        vision = int(work.patches_P.sum()) * self._cost.patch + int(work.patch_pairs_P.sum()) * self._cost.patch_pair
        return num_prompt, num_response, decoder + num_response * self._head, vision
