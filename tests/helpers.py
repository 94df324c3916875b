"""Small real objects that several tests share."""

from __future__ import annotations

import torch

from copd_engine.models.base import Policy
from copd_engine.models.qwen3_vl import Qwen3VLPolicy, Qwen3VLPromptEncoder
from copd_engine.testbed.model import untrained
from copd_engine.testbed.tasks import DOMAINS, testbed_examples
from copd_engine.types import EncodedPrompt


def tiny_model(seed: int = 0) -> tuple[Qwen3VLPolicy, Qwen3VLPromptEncoder]:
    """A real Qwen3-VL of two layers with random weights, fp32."""
    return untrained(seed, hidden_size=32, num_layers=2)


def prompts_of_all_domains(encoder: Qwen3VLPromptEncoder, per_domain: int = 2) -> list[EncodedPrompt]:
    """Text, image and video prompts in turn."""
    rows = [testbed_examples(domain, "train", per_domain, 0) for domain in DOMAINS]
    return [encoder.encode(row[index]) for index in range(per_domain) for row in rows]


def response_of(encoder: Qwen3VLPromptEncoder, prompt: EncodedPrompt) -> torch.Tensor:
    """The correct response's token ids with the end token."""
    chain = prompt.example.metadata["chain"]
    return torch.tensor([*encoder.tokenizer(chain)["input_ids"], encoder.end_token_id])


def perturbed(policy: Policy, seed: int, size: float = 0.05) -> Policy:
    """A copy with noise in every parameter: a branch that has moved."""
    copy = policy.clone()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in copy.named_parameters().values():
            parameter += size * torch.randn(parameter.shape, generator=generator) * (parameter.std(correction=0) + 1e-3)
    return copy
