"""What a student learns from a teacher's distribution."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from copd_engine.config.base import Float, Section


class DistillationConfig(Section):
    """The signal of the cross batches, at the states that the student visits, times ``branches.N.beta``.

    In the advantage: ``sampled``, the paper's (OPD-ADV); ``sampled_cv``, to which the exact KL at the token's state is
    added: the same expected gradient, advantages of mean 0. Differentiated as a loss, exact over the vocabulary:
    ``full`` KL(student || teacher), ``forward`` KL(teacher || student), ``jsd`` with ``jsd_beta``.

    ``through``: advantage or loss, to state which; null: the one the signal has. The other one would learn nothing.
    """

    signal: Literal["sampled", "sampled_cv", "full", "forward", "jsd"] = "sampled"
    through: Literal["advantage", "loss"] | None = None
    jsd_beta: Annotated[Float, Field(gt=0, lt=1)] = 0.5

    @property
    def is_loss(self) -> bool:
        """A divergence over the whole vocabulary that is differentiated, no advantage."""
        return self.signal in ("full", "forward", "jsd")

    @model_validator(mode="after")
    def _has_a_gradient(self) -> DistillationConfig:
        if self.is_loss and self.through == "advantage":
            raise ValueError(
                f"signal {self.signal!r} through the advantage: a divergence put detached into the advantage over the "
                "whole vocabulary has zero expected gradient; use through 'loss', or signal 'sampled' or 'sampled_cv'"
            )
        if not self.is_loss and self.through == "loss":
            raise ValueError(
                f"signal {self.signal!r} through the loss: the log-ratio of the sampled token, differentiated, has "
                "zero expected gradient; use through 'advantage', or signal 'full', 'forward' or 'jsd'"
            )
        return self
