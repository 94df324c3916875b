"""A verifier for golds that may be written in several ways."""

from __future__ import annotations

from dataclasses import replace

from copd_engine.types import Example
from copd_engine.verifiers.registry import get_verifier

#: What an example calls it.
ALTERNATIVES = f"{__name__}:alternatives"


def alternatives(response: str, example: Example) -> float:
    """The best score over ``metadata.alternatives``, a list of ``{answer, verifier}``; other metadata is for these."""
    options = example.metadata["alternatives"]
    return max(
        get_verifier(option["verifier"])(response, replace(example, answer=option["answer"])) for option in options
    )
