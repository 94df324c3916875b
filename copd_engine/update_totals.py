"""Sums over the tokens of one step's updates, and the metrics that follow from them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from copd_engine.types import PackedBatch

#: Means over a branch's tokens, by name in the metrics: of what is forwarded, which of GRPO are the responses with an
#: advantage.
MEANS = {
    "entropy": "entropy",
    "clip_fraction": "clipped",
    "ratio_mean": "ratio",
    "mismatch_mean": "mismatch",
    "mismatch_kl": "mismatch_kl",
}
#: Those of them that each term has of its own, where it has them: an exact divergence has no ratio.
OF_TERMS = {"entropy": "entropy", "clip_fraction": "clipped", "ratio_mean": "ratio"}
CORRECTION_MEANS = {"correction_mean": "correction", "correction_capped": "correction_capped"}
#: Means over the tokens of a distillation term, where the signal has them.
EXACT = ("exact_reverse_kl", "exact_forward_kl", "exact_jsd")


class UpdateTotals:
    """Adds up micro-batches: of each loss term, and of the branch, whose means are over the tokens of all terms."""

    def __init__(self) -> None:
        self.loss = 0.0
        self.num_tokens = 0
        self.num_packed_tokens = 0
        self._mismatch_max = 0.0
        self._sums: dict[str, float] = defaultdict(float)
        self._counts: dict[str, int] = defaultdict(int)
        self._terms: dict[str, dict[str, float]] = {}

    def add(
        self, names: Sequence[str], batch: PackedBatch, columns: Mapping[str, torch.Tensor], loss_scale: float
    ) -> None:
        """A micro-batch whose terms have these ``names``; ``columns`` fp32 ``[N]``; ``loss_scale`` is in the loss."""
        self.num_tokens += len(batch.target_N)
        self.num_packed_tokens += batch.num_tokens
        self._mismatch_max = max(self._mismatch_max, float(columns["mismatch"].max()))
        for name, column_N in columns.items():
            self._sums[name] += float(column_N.sum())
            self._counts[name] += len(column_N)
        term_ids_B = batch.term_ids_B.cpu()
        term_ids_N = term_ids_B[batch.sequence_N.cpu()]
        stacked = torch.stack(list(columns.values())).double()
        sums = torch.zeros(len(columns), len(names), dtype=torch.float64).index_add_(1, term_ids_N, stacked)
        num_responses = torch.bincount(term_ids_B, minlength=len(names))
        for number, name in enumerate(names):
            term = self._terms.setdefault(name, defaultdict(float))
            term["num_tokens"] += int(batch.term_tokens[number])
            term["num_responses"] += int(num_responses[number])
            for row, column in enumerate(columns):
                term[f"sum:{column}"] += float(sums[row, number]) / (loss_scale if column == "loss" else 1)

    def metrics(self) -> dict[str, Any]:
        """Those of a branch in ``metrics.jsonl`` that are sums or means over its tokens."""
        asked = CORRECTION_MEANS if "correction" in self._counts else {}
        means = {
            key: self._sums[name] / self._counts[name] if self._counts[name] else None
            for key, name in {**MEANS, **asked}.items()
        }
        return {
            "num_tokens": self.num_tokens,
            "num_packed_tokens": self.num_packed_tokens,
            **means,
            "mismatch_max": self._mismatch_max if self.num_tokens else None,
            "terms": {name: _term(name, sums) for name, sums in self._terms.items()},
        }


def _term(name: str, sums: Mapping[str, float]) -> dict[str, float]:
    row = {"loss": sums["sum:loss"], "num_tokens": sums["num_tokens"], "num_responses": sums["num_responses"]}
    means = {key.removeprefix("sum:"): value / sums["num_tokens"] for key, value in sums.items() if key[:4] == "sum:"}
    row |= {key: means[column] for key, column in OF_TERMS.items() if column in means}
    if not name.startswith("opd:"):
        return row | ({"reference_kl": means["reference_kl"]} if "reference_kl" in means else {})
    # The mean of -delta over the student's own tokens estimates KL(student || teacher).
    row |= {"delta_mean": means["delta"], "reverse_kl": -means["delta"]}
    return row | {key: means[key] for key in EXACT if key in means}
