"""The naive truth: transformers' own forward of one sample at a time, full logits, formulas in fp64."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import PreTrainedModel

from copd_engine.models.base import Policy
from copd_engine.types import EncodedPrompt, Rollout


def plain_model(policy: Policy) -> PreTrainedModel:
    """A copy of the policy's weights as they are now, adapters folded in, with transformers' own attention."""
    module = policy.with_full_parameters(copy.deepcopy(dict(policy.full_parameters()))).module
    module.set_attn_implementation("sdpa")
    return module


def plain_inputs(plain: PreTrainedModel, prompt: EncodedPrompt, response_N: torch.Tensor) -> dict[str, Any]:
    """What transformers' own forward takes for one sample; it computes positions itself."""
    ids = torch.cat([prompt.input_ids_T, response_N])[None]
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if hasattr(plain.config, "image_token_id"):
        image, video = plain.config.image_token_id, plain.config.video_token_id
        inputs |= {
            "mm_token_type_ids": (ids == image).int() + 2 * (ids == video).int(),
            "pixel_values": prompt.pixel_values,
            "image_grid_thw": prompt.image_grid_thw,
            "pixel_values_videos": prompt.pixel_values_videos,
            "video_grid_thw": prompt.video_grid_thw,
        }
    if plain.config.model_type == "qwen2_5_vl" and prompt.video_grid_thw is not None:
        # Seconds between temporal patches; of a single one it moves nothing.
        seconds = [times[1] - times[0] if len(times) > 1 else 1.0 for times in prompt.video_timestamps]
        inputs["second_per_grid_ts"] = torch.tensor(seconds)
    return inputs


def plain_hidden(plain: PreTrainedModel, prompt: EncodedPrompt, response_N: torch.Tensor) -> torch.Tensor:
    """Final hidden states ``[N, D]`` at the rows that predict the response's tokens, with grad."""
    hidden_TD = plain.model(**plain_inputs(plain, prompt, response_N)).last_hidden_state[0]
    return hidden_TD[prompt.num_tokens - 1 : -1]


def plain_logp(
    plain: PreTrainedModel, prompt: EncodedPrompt, response_N: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """Log-probs fp64 ``[N, V]`` of the whole vocabulary at every token of the response, with grad."""
    logits_TV = plain(**plain_inputs(plain, prompt, response_N)).logits[0]
    return torch.log_softmax(logits_TV[prompt.num_tokens - 1 : -1].double() / temperature, dim=-1)


def plain_token_logp(plain: PreTrainedModel, rollout: Rollout, temperature: float = 1.0) -> torch.Tensor:
    """Log-probs fp64 ``[N]`` of the response's own tokens, with grad."""
    logp_NV = plain_logp(plain, rollout.request.prompt, rollout.response_ids_N, temperature)
    return logp_NV.gather(1, rollout.response_ids_N[:, None]).squeeze(1)
