"""Algorithms are data: which branch rolls out whose prompts in a step, who teaches, and with which weight.

The trainer executes a :class:`StepPlan` and does not know which method made it. CoPD is Algorithm 1 of arXiv
2604.27083; the other methods take as many steps as it needs to draw as many rollouts as CoPD draws under the same
schedule. ``docs/methods.md`` describes them all.
"""

from copd_engine.algorithms.labels import EQUAL_FLOPS, EQUAL_STEPS, final_label, result_labels
from copd_engine.algorithms.plan import MIXED, STUDENT, Assignment, StepPlan
from copd_engine.algorithms.schedule import Schedule
from copd_engine.algorithms.shares import split_evenly, teachers_of
from copd_engine.algorithms.static import betas_of, distillation_edges, final_model

__all__ = [
    "EQUAL_FLOPS",
    "EQUAL_STEPS",
    "MIXED",
    "STUDENT",
    "Assignment",
    "Schedule",
    "StepPlan",
    "betas_of",
    "distillation_edges",
    "final_label",
    "final_model",
    "result_labels",
    "split_evenly",
    "teachers_of",
]
