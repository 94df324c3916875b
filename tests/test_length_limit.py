"""Samples above the length limit: cut, left out or refused; log-probs stay beside their tokens, media stay whole."""

from __future__ import annotations

import re

import pytest
import torch

from copd_engine.length_limit import limit_length
from copd_engine.packing import pack
from copd_engine.types import Rollout, RolloutRequest, UserError
from tests import model_inputs
from tests.helpers import prompts_of_all_domains

model = model_inputs.model


def rollout(prompt, length: int, finish_reason: str = "stop") -> Rollout:
    ids_N = torch.arange(100, 100 + length)
    return Rollout(RolloutRequest(prompt, 0, 0), ids_N, -ids_N.float(), finish_reason, 3, text="whole", reward=0.5)


def test_responses_are_cut_and_prompts_and_their_images_stay_whole(model):
    _, encoder = model
    _, image, _ = prompts_of_all_domains(encoder, 1)
    limit = image.num_tokens + 4
    short, exact, long = (rollout(image, n) for n in (3, 4, 9))
    limited = limit_length([short, exact, long], limit, "truncate_response")
    assert (limited.num_truncated, limited.num_dropped) == (1, 0)
    assert limited.rollouts[0] is short
    assert limited.rollouts[1] is exact
    cut = limited.rollouts[2]
    assert cut.response_ids_N.tolist() == [100, 101, 102, 103]
    assert cut.sampler_logp_N.tolist() == [-100, -101, -102, -103]
    assert cut.finish_reason == "length"
    assert (cut.request, cut.weight_version, cut.reward) == (long.request, 3, 0.5)
    prompts = [r.request.prompt for r in limited.rollouts]
    batch = pack(prompts, [r.response_ids_N for r in limited.rollouts], encoder.visual_token_ids, 2)
    assert torch.equal(batch.pixel_values, image.pixel_values)
    assert long.num_tokens == 9  # the original stands


def test_a_prompt_that_leaves_no_room_is_left_out_and_counted(model):
    image, text = sorted(prompts_of_all_domains(model[1], 1)[:2], key=lambda prompt: prompt.num_tokens)
    assert image.num_tokens < text.num_tokens
    limited = limit_length([rollout(image, 1), rollout(text, 1)], text.num_tokens, "truncate_response")
    assert [r.request.prompt for r in limited.rollouts] == [image]
    assert (limited.num_truncated, limited.num_dropped) == (0, 1)


def test_dropped_ones_are_counted(model):
    text, *_ = prompts_of_all_domains(model[1], 1)
    rollouts = [rollout(text, n) for n in (5, 2, 6, 3)]
    limited = limit_length(rollouts, text.num_tokens + 4, "drop")
    assert limited.rollouts == [rollouts[1], rollouts[3]]
    assert (limited.num_truncated, limited.num_dropped) == (0, 2)


def test_an_error_says_which_sample_and_what_to_change(model):
    text, *_ = prompts_of_all_domains(model[1], 1)
    fits, long = rollout(text, 4), rollout(text, 5)
    limit = text.num_tokens + 4
    assert limit_length([fits], limit, "error").rollouts == [fits]
    message = (
        rf"{re.escape(text.example.uid)}.* has {text.num_tokens} \+ 5 tokens, optim\.max_length is {limit}: raise it"
    )
    with pytest.raises(UserError, match=message):
        limit_length([fits, long], limit, "error")


def test_without_a_limit_nothing_happens_and_unknown_modes_are_refused(model):
    text, *_ = prompts_of_all_domains(model[1], 1)
    rollouts = [rollout(text, 1000)]
    limited = limit_length(rollouts, None, "error")
    assert (limited.rollouts, limited.num_truncated, limited.num_dropped) == (rollouts, 0, 0)
    with pytest.raises(UserError, match="must be truncate_response, drop or error"):
        limit_length(rollouts, 5, "truncate")
