"""Samples above a length: their response is cut, they are left out and counted, or the run stops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from copd_engine.types import Rollout, UserError

MODES = ("truncate_response", "drop", "error")


@dataclass(frozen=True)
class LimitedRollouts:
    """``rollouts`` within the limit, in order; how many of them were cut, and how many were left out."""

    rollouts: list[Rollout]
    num_truncated: int = 0
    num_dropped: int = 0


def limit_length(rollouts: Sequence[Rollout], max_length: int | None, mode: str) -> LimitedRollouts:
    """Hold every rollout to ``max_length`` tokens of prompt and response (``optim.max_length``, ``optim.too_long``).

    ``truncate_response`` keeps the first tokens of the response with their log-probs; the end token goes, so
    ``finish_reason`` becomes "length". The prompt is never cut: an image's tokens and its features belong together.
    ``text`` and ``reward`` stay those of the whole response, which is what was verified. A prompt that leaves no room
    for one response token is left out and counted. ``drop`` leaves out whatever is too long; ``error`` raises UserError
    for the first. ``max_length`` None: no limit.
    """
    if mode not in MODES:
        raise UserError(f"optim.too_long = {mode!r}: must be {', '.join(MODES[:-1])} or {MODES[-1]}")
    if max_length is None:
        return LimitedRollouts(list(rollouts))
    kept: list[Rollout] = []
    num_truncated = num_dropped = 0
    for rollout in rollouts:
        prompt = rollout.request.prompt
        room = max_length - prompt.num_tokens
        if rollout.num_tokens <= room:
            kept.append(rollout)
        elif mode == "error":
            raise UserError(
                f"{prompt.example.name} with its response has {prompt.num_tokens} + {rollout.num_tokens} tokens, "
                f"optim.max_length is {max_length}: raise it, lower rollout.max_new_tokens, "
                "or set optim.too_long to truncate_response or drop"
            )
        elif mode == "truncate_response" and room > 0:
            num_truncated += 1
            kept.append(
                replace(
                    rollout,
                    response_ids_N=rollout.response_ids_N[:room],
                    sampler_logp_N=rollout.sampler_logp_N[:room],
                    finish_reason="length",
                )
            )
        else:
            num_dropped += 1
    return LimitedRollouts(kept, num_truncated, num_dropped)
