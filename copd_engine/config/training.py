"""How the branches are trained: objective and optimizer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from copd_engine.config.base import Decay, Float, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section


class ImportanceCorrectionConfig(Section):
    """Weights w_t against the mismatch of sampler and trainer, r_t = pi_old / pi_sampler of the sampled token, both at
    the sampling temperature: ``truncate`` min(r_t, ``cap``), truncated importance sampling (``cap`` null: r_t itself);
    ``mask`` r_t within [1 / cap, cap] and 0 outside (IcePop, arXiv 2510.18855). They multiply the weight of each token
    whose loss is an estimate from that token; an exact divergence has nothing to correct there.
    """

    mode: Literal["none", "truncate", "mask"] = "none"
    cap: Annotated[Float, Field(ge=1)] | None = 2.0

    @model_validator(mode="after")
    def _mask_has_bounds(self) -> ImportanceCorrectionConfig:
        if self.mode == "mask" and self.cap is None:
            raise ValueError("mode 'mask' needs 'cap': it leaves out tokens whose ratio is outside [1 / cap, cap]")
        return self


class ReferenceKlConfig(Section):
    """``weight`` times KL(pi || base model) on the tokens of GRPO's responses; 0, the paper's: none.

    ``k1`` goes into the advantage, -weight (log pi_old - log pi_ref): differentiated, its expected gradient would be
    zero. ``k2`` and ``k3`` are differentiated as they stand (GRPO takes k3, whose expected gradient is that of
    KL(base || pi); k2's is that of KL(pi || base)). ``full`` is the exact KL over the vocabulary.
    """

    weight: NonNegativeFloat = 0.0
    estimator: Literal["k1", "k2", "k3", "full"] = "k3"


class DynamicSamplingConfig(Section):
    """Other prompts in place of GRPO groups without variance, up to ``max_rounds`` times a step (DAPO); 0: none."""

    max_rounds: NonNegativeInt = 0


class ObjectiveConfig(Section):
    """(SURROGATE) with the paper's clip range, (GRPO-ADV) with ``std_mode``. ``docs/objectives.md`` has the equations.

    ``surrogate``: clip, or cispo (arXiv 2506.13585), where the clipped ratio is a constant weight and no token is cut.
    ``ratio_level``: token, or sequence (GSPO, arXiv 2507.18071): every token has the geometric mean of its response's
    ratios. ``loss_aggregation``: sequence_mean, the paper's; token_mean (DAPO, arXiv 2503.14476): over all response
    tokens of a term in the step; constant (Dr.GRPO, arXiv 2503.20783): over responses times ``rollout.max_new_tokens``.

    ``updates_per_step`` splits a step's rollouts into that many optimizer updates by whole groups; from the second on
    the importance ratio differs from 1 and the clip acts. ``std_epsilon`` is added to the group's standard deviation.
    ``zero_variance``: GRPO groups whose rewards are all equal have advantage 0; ``keep`` counts their responses in the
    denominators, ``drop`` does not. ``mask_truncated`` leaves out responses cut at the length limit.
    """

    surrogate: Literal["clip", "cispo"] = "clip"
    clip_low: Annotated[Float, Field(gt=0, lt=1)] = 0.2
    clip_high: PositiveFloat = 0.28
    ratio_level: Literal["token", "sequence"] = "token"
    loss_aggregation: Literal["sequence_mean", "token_mean", "constant"] = "sequence_mean"
    std_mode: Literal["population", "sample", "none"] = "population"
    std_epsilon: PositiveFloat = 1e-6
    updates_per_step: PositiveInt = 1
    zero_variance: Literal["keep", "drop"] = "keep"
    mask_truncated: bool = False
    dynamic_sampling: DynamicSamplingConfig = DynamicSamplingConfig()
    importance_correction: ImportanceCorrectionConfig = ImportanceCorrectionConfig()
    kl: ReferenceKlConfig = ReferenceKlConfig()

    @property
    def has_paper_surrogate(self) -> bool:
        """(SURROGATE) as it stands: the kernel needs no log-probs beforehand to compute it."""
        return self.surrogate == "clip" and self.ratio_level == "token"


class OptimConfig(Section):
    """AdamW, constant learning rate.

    ``max_tokens_per_micro_batch``: packed tokens per forward; a sample above it gets a forward of its own. A sample
    (prompt and response) above ``max_length`` has its response cut (``truncate_response``), is left out and counted
    (``drop``) or stops the run (``error``). Packed rows are padded to a multiple of ``pad_to_multiple_of`` tokens.

    ``offload``: fp32 masters and AdamW's moments of the branches are in pinned host memory, and on the GPU only while
    their branch is updated. A 16-bit base waits in host memory too, unless ``objective.kl`` needs it.
    """

    lr: PositiveFloat = 1e-6
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: PositiveFloat = 1.0
    max_tokens_per_micro_batch: PositiveInt = 32_768
    max_length: PositiveInt | None = None
    too_long: Literal["truncate_response", "drop", "error"] = "error"
    pad_to_multiple_of: PositiveInt = 1
    offload: bool = False
