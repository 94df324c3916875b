"""Policies of any model: a clone, the tied head, saving and loading."""

from __future__ import annotations

import pytest
import torch

from copd_engine.config import ModelConfig
from copd_engine.models.loading import load_model
from copd_engine.testbed.model import untrained
from copd_engine.types import UserError
from tests import model_inputs
from tests.helpers import prompts_of_all_domains, response_of
from tests.model_inputs import packed_logp

model = model_inputs.model


def test_a_clone_is_independent(model):
    policy, encoder = model
    before = {name: p.detach().clone() for name, p in policy.named_parameters().items()}
    clone = policy.clone()
    assert type(clone) is type(policy)
    assert clone.named_parameters().keys() == before.keys()
    assert all(torch.equal(p, before[name]) for name, p in clone.named_parameters().items())
    prompt = prompts_of_all_domains(encoder, 1)[1]
    response = response_of(encoder, prompt)
    torch.testing.assert_close(
        packed_logp(clone, encoder, prompt, response), packed_logp(policy, encoder, prompt, response), atol=0, rtol=0
    )
    with torch.no_grad():
        for parameter in clone.named_parameters().values():
            parameter += 1
    assert all(torch.equal(p, before[name]) for name, p in policy.named_parameters().items())
    # The tied head of the clone is the clone's own embedding.
    assert clone.lm_head_weight.data_ptr() == clone.module.get_input_embeddings().weight.data_ptr()
    assert clone.lm_head_weight.data_ptr() != policy.lm_head_weight.data_ptr()


def test_a_tied_head_is_one_parameter(model):
    names = model[0].named_parameters()
    assert sum(p.data_ptr() == model[0].lm_head_weight.data_ptr() for p in names.values()) == 1
    assert sum(p.numel() for p in names.values()) == sum(p.numel() for p in model[0].module.parameters())


def test_a_saved_policy_and_encoder_come_back_through_load_model(model, tmp_path):
    policy, encoder = model
    policy.save(tmp_path)
    encoder.save(tmp_path)
    again, again_encoder = load_model(ModelConfig(path=str(tmp_path)))
    for name, parameter in again.named_parameters().items():
        assert torch.equal(parameter, policy.named_parameters()[name])
    assert again_encoder.end_token_id == encoder.end_token_id
    assert again_encoder.suppressed_token_ids == encoder.suppressed_token_ids
    for prompt in prompts_of_all_domains(encoder, 1):
        other = again_encoder.encode(prompt.example)
        assert torch.equal(other.input_ids_T, prompt.input_ids_T)
        assert torch.equal(other.position_ids_3T, prompt.position_ids_3T)
        for field in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"):
            left, right = getattr(other, field), getattr(prompt, field)
            assert left is right is None or torch.equal(left, right), field


def test_models_that_cannot_be_loaded(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_model(ModelConfig(path=str(tmp_path / "none")))
    with pytest.raises(UserError, match=r"has no config\.json"):
        load_model(ModelConfig(path=str(tmp_path)))
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_vl"}')
    with pytest.raises(UserError, match="cannot be read"):
        load_model(ModelConfig(path=str(tmp_path)))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        load_model(ModelConfig(path=str(tmp_path)))


def test_untrained_weights_follow_the_seed_and_leave_the_global_generator_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, two, other = (untrained(seed, 32, 1)[0].named_parameters() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(
        one["lm_head.weight" if "lm_head.weight" in one else next(iter(one))], next(iter(other.values()))
    )
