"""Terms of the reward: by hand, in a batch, and with patterns and answers that never end."""

from __future__ import annotations

import math
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from copd_engine.config import RewardTerm
from copd_engine.rewards import Reward, overlong_penalty
from copd_engine.types import EncodedPrompt, Example, Rollout, RolloutRequest, UserError
from copd_engine.verifiers import shared_pool, verify_all

VERIFIER = RewardTerm()
FORMAT = RewardTerm(kind="format", weight=0.5, pattern=r"<think>.*</think>\s*<answer>.*</answer>")
OVERLONG = RewardTerm(kind="overlong", weight=2.0, buffer_tokens=4)


def rollout(text: str, answer: str = "7", num_tokens: int = 3, verifier: str = "exact") -> Rollout:
    example = Example(uid="row-1", prompt="?", answer=answer, verifier=verifier)
    prompt = EncodedPrompt(example, torch.zeros(2, dtype=torch.int64), torch.zeros(3, 2, dtype=torch.int64), 2)
    return Rollout(
        request=RolloutRequest(prompt, seed=0, group=0),
        response_ids_N=torch.zeros(num_tokens, dtype=torch.int64),
        sampler_logp_N=torch.zeros(num_tokens),
        finish_reason="stop",
        weight_version=0,
        text=text,
    )


def test_the_default_is_the_rows_verifier() -> None:
    scores = Reward([VERIFIER], max_new_tokens=16).score(
        [rollout("7"), rollout("8"), rollout("x 7", verifier="numeric")]
    )
    assert [score.total for score in scores] == [1.0, 0.0, 1.0]
    assert [dict(score.terms) for score in scores] == [{"verifier": 1.0}, {"verifier": 0.0}, {"verifier": 1.0}]
    assert Reward([VERIFIER], 16).score([]) == []


def test_the_sum_of_all_terms() -> None:
    reward = Reward([VERIFIER, FORMAT, OVERLONG], max_new_tokens=16)
    right = "<think>\n3 + 4\n</think>\n<answer>7</answer>"
    scores = reward.score(
        [
            rollout(right, num_tokens=12),
            rollout(right, num_tokens=13),
            rollout("<answer>7</answer>", num_tokens=16),
            rollout("<think></think><answer>8</answer>", num_tokens=15),
            rollout("and " + right, num_tokens=1),
        ]
    )
    assert [dict(score.terms) for score in scores] == [
        {"verifier": 1.0, "format": 1.0, "overlong": 0.0},
        {"verifier": 1.0, "format": 1.0, "overlong": -0.25},
        {"verifier": 1.0, "format": 0.0, "overlong": -1.0},
        {"verifier": 0.0, "format": 1.0, "overlong": -0.75},
        {"verifier": 1.0, "format": 0.0, "overlong": 0.0},
    ]
    assert [score.total for score in scores] == [1.5, 1.0, -1.0, -1.0, 1.0]


def test_shaping_is_no_part_of_accuracy() -> None:
    rollouts = [rollout("7", num_tokens=16), rollout("8", num_tokens=1)]
    assert [score.total for score in Reward([VERIFIER, OVERLONG], 16).score(rollouts)] == [-1.0, 0.0]
    assert verify_all([(r.text, r.request.prompt.example) for r in rollouts]) == [1.0, 0.0]


def test_a_term_may_name_its_verifier() -> None:
    reward = Reward([RewardTerm(name="numeric"), RewardTerm(name="exact", weight=0.25), VERIFIER, VERIFIER], 16)
    (score,) = reward.score([rollout("it is 7", verifier="normalized")])
    assert dict(score.terms) == {"verifier:numeric": 1.0, "verifier:exact": 0.0, "verifier.1": 0.0, "verifier.2": 0.0}
    assert score.total == 1.0


@pytest.mark.parametrize(
    ("num_tokens", "expected"),
    [
        (0, 0.0),
        (16_383, 0.0),
        (16_384, 0.0),
        (16_385, -1 / 4096),
        (18_432, -0.5),
        (20_479, -4095 / 4096),
        (20_480, -1.0),
        (20_481, -1.0),
        (99_999, -1.0),
    ],
)
def test_overlong_by_dapos_numbers(num_tokens: int, expected: float) -> None:
    """L_max = 20,480 and L_cache = 4,096, as in the paper."""
    assert overlong_penalty(num_tokens, 20_480, 4_096) == pytest.approx(expected, abs=1e-12)
    assert math.copysign(1.0, overlong_penalty(0, 20_480, 4_096)) == 1.0  # no minus zero in logs


@given(st.integers(1, 10_000), st.integers(0, 30_000), st.data())
def test_overlong_is_equation_13(max_tokens: int, num_tokens: int, data: st.DataObject) -> None:
    buffer = data.draw(st.integers(1, max_tokens))
    if num_tokens <= max_tokens - buffer:
        expected = 0.0
    elif num_tokens <= max_tokens:
        expected = ((max_tokens - buffer) - num_tokens) / buffer
    else:
        expected = -1.0
    assert overlong_penalty(num_tokens, max_tokens, buffer) == pytest.approx(expected, abs=1e-12)


def test_a_pattern_without_end_costs_its_own_score() -> None:
    before = shared_pool().failures.timeouts
    begin = time.monotonic()
    scores = Reward([RewardTerm(kind="format", pattern="(a+)+b")], 64).score(
        [rollout("aaab"), rollout("a" * 40 + "c"), rollout("ab"), rollout("b")]
    )
    assert [score.total for score in scores] == [1.0, 0.0, 1.0, 0.0]
    assert time.monotonic() - begin < 8.0
    assert shared_pool().failures.timeouts == before + 1


def test_the_pattern_must_match_the_whole_response_across_lines() -> None:
    reward = Reward([RewardTerm(kind="format", pattern="a.b")], 64)
    assert [score.total for score in reward.score([rollout(t) for t in ("a\nb", "a\nb\n", "xa\nb", "ab")])] == [
        1,
        0,
        0,
        0,
    ]


def test_bad_terms() -> None:
    with pytest.raises(
        UserError, match=r"branches\.0\.reward\.1\.name: unknown verifier 'mth' \(did you mean 'math'\?\)"
    ):
        Reward([VERIFIER, RewardTerm(name="mth")], 16, where="branches.0.reward")
    with pytest.raises(UserError, match=r"reward\.0\.buffer_tokens = 17: must be at most rollout\.max_new_tokens = 16"):
        Reward([RewardTerm(kind="overlong", buffer_tokens=17)], 16)
    with pytest.raises(UserError, match=r"row-1.*must be one number"):
        Reward([RewardTerm(name="numeric")], 16).score([rollout("7", answer="seven")])
