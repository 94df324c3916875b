"""Configs of the objective that cannot be meant, and the defaults, which are the paper's."""

from __future__ import annotations

from typing import Any

import pytest

from copd_engine.config import DistillationConfig, ObjectiveConfig, build_config
from copd_engine.types import UserError

BRANCHES = [{"name": name, "data": {"domain": name}} for name in ("text", "image")]


def error_of(**sections: Any) -> str:
    with pytest.raises(UserError) as caught:
        build_config({"branches": BRANCHES, **sections})
    return str(caught.value).removeprefix("config: ")


def test_the_defaults_are_the_papers():
    objective, distillation = ObjectiveConfig(), DistillationConfig()
    assert (objective.surrogate, objective.ratio_level, objective.loss_aggregation) == (
        "clip",
        "token",
        "sequence_mean",
    )
    assert (objective.clip_low, objective.clip_high, objective.std_mode) == (0.2, 0.28, "population")
    assert (objective.zero_variance, objective.mask_truncated, objective.updates_per_step) == ("keep", False, 1)
    assert objective.importance_correction.mode == "none"
    assert (objective.kl.weight, objective.dynamic_sampling.max_rounds) == (0.0, 0)
    assert distillation.signal == "sampled"


@pytest.mark.parametrize("signal", ["full", "forward", "jsd"])
def test_a_detached_divergence_as_an_advantage_is_refused(signal):
    message = error_of(distillation={"signal": signal, "through": "advantage"})
    assert message.startswith(f"distillation: signal {signal!r} through the advantage: ")
    assert (
        "a divergence put detached into the advantage over the whole vocabulary has zero expected gradient" in message
    )
    assert build_config({"branches": BRANCHES, "distillation": {"signal": signal, "through": "loss"}})


@pytest.mark.parametrize("signal", ["sampled", "sampled_cv"])
def test_a_sampled_log_ratio_as_a_loss_is_refused(signal):
    message = error_of(distillation={"signal": signal, "through": "loss"})
    assert "the log-ratio of the sampled token, differentiated, has zero expected gradient" in message
    assert build_config({"branches": BRANCHES, "distillation": {"signal": signal, "through": "advantage"}})


@pytest.mark.parametrize(
    ("sections", "right"),
    [
        (
            {"objective": {"importance_correction": {"mode": "mask", "cap": None}}},
            "objective.importance_correction: mode 'mask' needs 'cap'",
        ),
        ({"objective": {"importance_correction": {"cap": 0.5}}}, "greater than or equal to 1"),
        (
            {"objective": {"importance_correction": {"mode": "trunkate"}}},
            "must be one of none, truncate, mask (did you mean 'truncate'?)",
        ),
        ({"objective": {"kl": {"weight": -1}}}, "greater than or equal to 0"),
        ({"objective": {"kl": {"estimator": "k4"}}}, "must be one of k1, k2, k3, full"),
        ({"objective": {"surrogate": "cisp"}}, "must be one of clip, cispo (did you mean 'cispo'?)"),
        ({"objective": {"ratio_level": "seq"}}, "must be one of token, sequence"),
        ({"objective": {"loss_aggregation": "mean"}}, "must be one of sequence_mean, token_mean, constant"),
        ({"objective": {"dynamic_sampling": {"max_rounds": -1}}}, "greater than or equal to 0"),
        ({"distillation": {"jsd_beta": 1}}, "less than 1"),
        (
            {"distillation": {"signal": "topk"}},
            "must be one of sampled, sampled_cv, full, forward, jsd",
        ),
    ],
)
def test_values_that_are_not_right(sections, right):
    assert right in error_of(**sections)
