"""How a token is drawn: one uniform number per request and token, inverse of the cumulative distribution.

The number is a hash of the request's seed and the token's index, so it does not depend on what else is in the batch, on
the order of the steps or on the device, and nothing has to be kept between tokens.
"""

from __future__ import annotations

import torch

_INCREMENT = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def uniforms(seed_B: torch.Tensor, index_B: torch.Tensor) -> torch.Tensor:
    """Numbers in [0, 1), fp64 ``[B]``: number ``index_B`` of the stream of ``seed_B`` (both int64).

    SplitMix64 (Steele, Lea, Flood 2014), started at a mix of the seed so that neighbouring seeds share no numbers.
    """
    state_B = _mix(seed_B + _signed(_INCREMENT)) + (index_B + 1) * _signed(_INCREMENT)
    return _shift_right(_mix(state_B), 11).double() * 2.0**-53


def draw(
    logp_BV: torch.Tensor, uniform_B: torch.Tensor, greedy_B: torch.Tensor | None, suppressed: torch.Tensor
) -> torch.Tensor:
    """Token ids int64 ``[B]`` from log-probs ``[B, V]``; ids in ``suppressed`` int64 are left out of the draw.

    Rows of ``greedy_B`` (bool; None for no row) take the most likely token.
    """
    allowed_BV = logp_BV.index_fill(1, suppressed, float("-inf"))
    cumulative_BV = allowed_BV.double().exp_().cumsum_(-1)
    threshold_B1 = uniform_B[:, None] * cumulative_BV[:, -1:]
    # clamp: a row of NaN has no place for the threshold
    drawn_B = torch.searchsorted(cumulative_BV, threshold_B1, right=True).squeeze(1).clamp_(max=logp_BV.shape[1] - 1)
    return drawn_B if greedy_B is None else torch.where(greedy_B, allowed_BV.argmax(-1), drawn_B)


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shift_right(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shift_right(x, 27)) * _signed(_MIX_2)
    return x ^ _shift_right(x, 31)


def _shift_right(x: torch.Tensor, count: int) -> torch.Tensor:
    """Logical, where int64's own shift is arithmetic."""
    return (x >> count) & ((1 << (64 - count)) - 1)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x
