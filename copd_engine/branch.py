"""One expert in training: its policy, its optimizer, its weight version, and one parameter update."""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from copd_engine.batch_loss import BatchLoss, MicroBatch, OldPolicy
from copd_engine.config import DistillationConfig, ObjectiveConfig, OptimConfig
from copd_engine.master_weights import MasterWeights
from copd_engine.micro_batches import CostModel, split_micro_batches
from copd_engine.models.base import Policy, PromptEncoder
from copd_engine.objectives import LmHead, TeacherStates, TrainSample
from copd_engine.offload import HostStates
from copd_engine.packing import pack
from copd_engine.types import PackedBatch, Rollout
from copd_engine.update_totals import UpdateTotals


class Branch:
    """A policy that is trained.

    ``parameters`` are the trainable ones in the model's dtype, ``masters`` what the optimizer steps: the same in fp32.
    ``version`` counts the parameter updates, ``num_skipped`` those left out for a NaN or infinite loss or gradient.
    ``reference``: the base model, for ``objective.kl``.
    """

    def __init__(
        self,
        name: str,
        policy: Policy,
        encoder: PromptEncoder,
        optim: OptimConfig,
        objective: ObjectiveConfig,
        temperature: float,
        beta: float = 1.0,
        distillation: DistillationConfig | None = None,
        reference: Policy | None = None,
    ) -> None:
        self.name = name
        self.policy = policy
        self.beta = beta
        self.version = 0
        self.num_skipped = 0
        self.num_skipped_in_a_row = 0
        self._encoder = encoder
        self._optim = optim
        self._objective = objective
        self._loss = BatchLoss(policy, objective, distillation or DistillationConfig(), temperature, reference)
        self._head: LmHead | None = None
        self._cost = CostModel.of(**policy.sizes)
        self.parameters = policy.named_parameters()
        self.masters = MasterWeights(self.parameters)
        self.optimizer = torch.optim.AdamW(
            self.masters.tensors.values(),
            lr=optim.lr,
            betas=optim.betas,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            fused=True,
        )
        self.host_states = HostStates(self.masters, self.optimizer, policy.device) if optim.offload else None

    def pack(self, rollouts: Sequence[Rollout], terms: Sequence[int] = (), num_terms: int = 1) -> PackedBatch:
        """The rollouts in one row, on the policy's device; ``terms``: the loss term of each, by number."""
        return pack(
            [rollout.request.prompt for rollout in rollouts],
            [rollout.response_ids_N for rollout in rollouts],
            self._encoder.visual_token_ids,
            self._encoder.spatial_merge_size,
            group_ids=[rollout.request.group for rollout in rollouts],
            term_ids=terms or None,
            num_terms=num_terms,
            pad_to_multiple_of=self._optim.pad_to_multiple_of,
        ).to(self.policy.device)

    def full_parameters(self) -> Mapping[str, torch.Tensor]:
        """All weights of the plain model by name, as training has them: fp32 masters, adapters folded in, detached."""
        full = self.policy.full_parameters(torch.float32)
        return ChainMap({name: m.detach() for name, m in self.masters.tensors.items() if name in full}, full)  # type: ignore[arg-type]

    @torch.no_grad()
    def start_from(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """Take these values for all that is trained, by its names; the optimizer keeps its state."""
        for name, master in self.masters.tensors.items():
            master.copy_(parameters[name])
        self.masters.round_into_model()
        self._head = None
        self.version += 1  # or an engine would keep the old weights

    def finish(self) -> None:
        """It is not updated any more: the optimizer's moments are freed."""
        self.optimizer.state.clear()
        if self.host_states is not None:
            self.host_states.forget_moments()

    @torch.no_grad()
    def score(self, rollouts: Sequence[Rollout]) -> list[torch.Tensor]:
        """Log-probs fp32 ``[N]`` on the CPU of each rollout's tokens under this branch, at the sampling temperature."""
        return self._for_each(rollouts, lambda batch: self._loss.logp(self.policy.hidden_states(batch), batch.target_N))

    @torch.no_grad()
    def teacher_states(self, rollouts: Sequence[Rollout]) -> list[TeacherStates]:
        """This branch's distribution at each token of each rollout, as it stands now and stays when it is updated.

        The hidden states are on the CPU. The head is a copy where it is trained, one for all that is asked for between
        two updates.
        """
        hidden = self._for_each(rollouts, lambda batch: self.policy.hidden_states(batch).cpu())
        if self._head is None:
            weight_VD, bias_V = self.policy.lm_head_weight, self.policy.lm_head_bias
            self._head = LmHead(_constant(weight_VD), None if bias_V is None else _constant(bias_V))
        return [TeacherStates(hidden_ND, self._head) for hidden_ND in hidden]

    def _for_each(
        self, rollouts: Sequence[Rollout], compute: Callable[[PackedBatch], torch.Tensor]
    ) -> list[torch.Tensor]:
        """Rows of each rollout of what ``compute`` gives for a micro-batch, ``[N, ...]``."""
        rows: dict[int, torch.Tensor] = {}
        for indexes in self.micro_batches(rollouts):
            values_N = compute(self.pack([rollouts[i] for i in indexes]))
            rows.update(zip(indexes, values_N.split([rollouts[i].num_tokens for i in indexes]), strict=True))
        return [rows[i] for i in range(len(rollouts))]

    def update(self, samples: Sequence[TrainSample]) -> dict[str, Any]:
        """One step's parameter updates from ``samples``; returns metrics.

        The samples are split by whole groups into ``updates_per_step`` optimizer updates. Old log-probs are those of
        the parameters before the first update: taken from the update's own forward where nothing has changed yet
        (ratio exactly 1), from a scoring pass before it otherwise. An update with a NaN or infinite loss or gradient
        is left out and counted.
        """
        with self.host_states.on_device() if self.host_states else nullcontext():
            return self._update(samples)

    def _update(self, samples: Sequence[TrainSample]) -> dict[str, Any]:
        self._head = None  # of before
        parts = split_groups(samples, self._objective.updates_per_step)
        old = self._old_policies([sample for part in parts[1:] for sample in part])
        totals, loss_sum, grad_norms, skipped = UpdateTotals(), 0.0, [], False
        for part in parts:
            # Weights sum to 1 per term over the step; each update must weigh as much as a whole step.
            scale = float(len(parts))
            loss = sum(self._accumulate(batch, old, scale, totals) for batch in self._batches(part))
            grad_norm = float(
                torch.nn.utils.clip_grad_norm_(self.masters.tensors.values(), self._optim.max_grad_norm, foreach=True)
            )
            if math.isfinite(loss) and math.isfinite(grad_norm):
                self.optimizer.step()
                self.masters.round_into_model()
                self.version += 1
                self.num_skipped_in_a_row = 0
                loss_sum += loss / scale
                grad_norms.append(grad_norm)
            else:
                skipped = True
                self.num_skipped += 1
                self.num_skipped_in_a_row += 1
            self.optimizer.zero_grad(set_to_none=True)
        return {
            "version": self.version,
            "loss": loss_sum if grad_norms else None,
            "grad_norm": sum(grad_norms) / len(grad_norms) if grad_norms else None,
            "lr": self._optim.lr,
            "skipped": skipped,
            "num_skipped": self.num_skipped,
            **totals.metrics(),
        }

    def _accumulate(
        self, samples: Sequence[TrainSample], old: dict[int, OldPolicy], scale: float, totals: UpdateTotals
    ) -> float:
        """Forward and backward of one micro-batch; adds to the gradients and to ``totals``; returns the loss."""
        names = list(dict.fromkeys(sample.term for sample in samples))
        batch = self.pack([s.rollout for s in samples], [names.index(s.term) for s in samples], len(names))
        hidden_ND = self.policy.hidden_states(batch)
        has_moved = id(samples[0]) in old
        if has_moved:
            before = OldPolicy.cat([old[id(sample)] for sample in samples])
        else:
            before = self._loss.old_policy(samples, batch, hidden_ND)
        loss, columns = self._loss(MicroBatch(samples, batch, hidden_ND, before, has_moved, scale))
        loss.backward()
        totals.add(names, batch, columns, loss_scale=scale)
        return float(loss.detach())

    @torch.no_grad()
    def _old_policies(self, samples: Sequence[TrainSample]) -> dict[int, OldPolicy]:
        """The policy as it is now on each sample, by the sample's id."""
        old: dict[int, OldPolicy] = {}
        for part in self._batches(samples):
            batch = self.pack([sample.rollout for sample in part])
            now = self._loss.old_policy(part, batch, self.policy.hidden_states(batch))
            old.update(zip(map(id, part), now.split([s.rollout.num_tokens for s in part]), strict=True))
        return old

    def micro_batches(self, rollouts: Sequence[Rollout]) -> list[list[int]]:
        """Indexes of rollouts that one forward takes."""
        return split_micro_batches(
            [rollout.request.prompt for rollout in rollouts],
            [rollout.num_tokens for rollout in rollouts],
            self._optim.max_tokens_per_micro_batch,
            self._cost,
        )

    def _batches(self, samples: Sequence[TrainSample]) -> list[list[TrainSample]]:
        """Samples that one forward takes. A loss over the vocabulary has a head beside the policy's: one per batch."""
        of_head: dict[int, list[TrainSample]] = {}
        for sample in samples:
            of_head.setdefault(id(self._loss.head_of(sample)), []).append(sample)
        return [
            [part[i] for i in indexes]
            for part in of_head.values()
            for indexes in self.micro_batches([sample.rollout for sample in part])
        ]


def _constant(parameter: torch.Tensor) -> torch.Tensor:
    """Its values now, without gradient: itself where it is not trained."""
    return parameter.detach().clone() if parameter.requires_grad else parameter.detach()


def split_groups(samples: Sequence[TrainSample], parts: int) -> list[list[TrainSample]]:
    """Whole groups dealt in turn over ``parts`` updates, term by term in the order of their names: each update sees
    every term that has so many groups, and nothing depends on the order of the branches in the config."""
    terms: dict[str, dict[int, list[TrainSample]]] = {}
    for sample in samples:
        terms.setdefault(sample.term, {}).setdefault(sample.rollout.request.group, []).append(sample)
    split: list[list[TrainSample]] = [[] for _ in range(parts)]
    groups = [group for _, of_term in sorted(terms.items()) for group in of_term.values()]
    for index, group in enumerate(groups):
        split[index % parts] += group
    return [part for part in split if part]
