"""Fused lm_head operations for on-policy distillation and GRPO (CoPD, arXiv 2604.27083).

Every operation takes hidden states and lm_head weights, never logits, and returns per-token numbers. Importing the
package registers the operations with torch and opens the compiled CPU library where there is one.

Dimension suffixes: T tokens, D hidden size, V vocabulary, B responses.
"""

from copd_kernels import statistics, vocab_parallel
from copd_kernels._library import native_available
from copd_kernels._products import empty_cache
from copd_kernels.advantages import GroupAdvantages, group_advantages
from copd_kernels.linear_divergence import Divergence, linear_divergence
from copd_kernels.linear_logprob import LogProb, linear_logprob
from copd_kernels.linear_policy_loss import PolicyLoss, linear_policy_loss
from copd_kernels.statistics import merge_statistics
from copd_kernels.topk_overlap import topk_overlap

__all__ = [
    "Divergence",
    "GroupAdvantages",
    "LogProb",
    "PolicyLoss",
    "empty_cache",
    "group_advantages",
    "linear_divergence",
    "linear_logprob",
    "linear_policy_loss",
    "merge_statistics",
    "native_available",
    "statistics",
    "topk_overlap",
    "vocab_parallel",
]
