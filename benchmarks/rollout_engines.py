"""What the rollout benchmark measures: the engines, a model whose responses end by chance, prompts."""

from __future__ import annotations

import importlib.util
import math
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from copd_engine.config import RolloutConfig
from copd_engine.models.base import Policy, PromptEncoder
from copd_engine.result import save_model
from copd_engine.rollout.base import RolloutEngine, Sampling
from copd_engine.rollout.embedded import EmbeddedEngine
from copd_engine.rollout.sglang_engine import SglangEngine
from copd_engine.testbed.tasks import DOMAINS, testbed_examples
from copd_engine.types import EncodedPrompt, RolloutRequest

EXPERT = "expert"
#: More than any prompt of the testbed has.
MAX_PROMPT_TOKENS = 512
EMBEDDING = "model.language_model.embed_tokens.weight"


@dataclass(frozen=True)
class Sizes:
    """What an engine is built for: sequences at a time, tokens of its cache, and of the longest response."""

    max_running: int
    max_cached_tokens: int
    max_new_tokens: int


@contextmanager
def _embedded(policy: Policy, encoder: PromptEncoder, sizes: Sizes) -> Iterator[RolloutEngine]:
    yield EmbeddedEngine({EXPERT: policy}, encoder, sizes.max_running, sizes.max_cached_tokens)


@contextmanager
def _sglang(policy: Policy, encoder: PromptEncoder, sizes: Sizes) -> Iterator[RolloutEngine]:
    with tempfile.TemporaryDirectory(prefix="copd-bench-") as folder:
        save_model(policy, encoder, Path(folder))
        engine = start_sglang(Path(folder), encoder, policy.device, sizes)
        try:
            engine.sync(EXPERT, policy.named_parameters(), 0)
            yield engine
        finally:
            engine.close()


def start_sglang(folder: Path, encoder: PromptEncoder, device: torch.device, sizes: Sizes) -> SglangEngine:
    """In a process of its own: on a CPU its stand-ins replace functions of torch."""
    config = RolloutConfig(
        max_running=sizes.max_running,
        kv_cache_tokens=sizes.max_cached_tokens,
        max_new_tokens=sizes.max_new_tokens,
        max_prompt_tokens=MAX_PROMPT_TOKENS,
    )
    return SglangEngine(folder, encoder, config, "float32", str(device), num_experts=2)


def has_sglang() -> bool:
    return importlib.util.find_spec("sglang") is not None


#: Name -> how to build it for a policy and sizes.
ENGINES: dict[str, Callable[[Policy, PromptEncoder, Sizes], AbstractContextManager[RolloutEngine]]] = {
    "embedded": _embedded,
    "sglang": _sglang,
}


def installed(names: Collection[str]) -> list[str]:
    return [name for name in names if name != "sglang" or has_sglang()]


@contextmanager
def running(
    policy: Policy, encoder: PromptEncoder, sizes: Sizes, names: Collection[str] = tuple(ENGINES)
) -> Iterator[dict[str, RolloutEngine]]:
    """Those of the engines ``names`` that are installed, side by side."""
    with ExitStack() as stack:
        yield {name: stack.enter_context(ENGINES[name](policy, encoder, sizes)) for name in installed(names)}


def prompts_of(encoder: PromptEncoder, count: int) -> list[EncodedPrompt]:
    """Text, image and video in turn."""
    rows = [testbed_examples(domain, "train", -(-count // len(DOMAINS)), 0) for domain in DOMAINS]
    return [encoder.encode(rows[i % len(DOMAINS)][i // len(DOMAINS)]) for i in range(count)]


@torch.no_grad()
def ending_with(policy: Policy, encoder: PromptEncoder, probability: float) -> Policy:
    """A copy that ends with about this probability at every token.

    The first dimension of every embedding is made so large that it comes out of the last norm nearly constant; what the
    end token's row of the tied head has there is then a bias, which a checkpoint can hold.
    """
    policy = policy.clone()
    embedding = policy.named_parameters()[EMBEDDING]
    embedding[:, 0] = 50.0
    gain = math.sqrt(embedding.shape[1])
    if not probability:
        embedding[encoder.end_token_id, 0] -= 1e3 / gain
        return policy
    engine = EmbeddedEngine({EXPERT: policy}, encoder, 256, 262_144)
    prompts = prompts_of(encoder, 6)
    requests = [RolloutRequest(prompts[i % 6], seed=i, group=i) for i in range(128)]
    for _ in range(3):
        rollouts = engine.generate(EXPERT, requests, Sampling(1.0, int(3 / probability)))
        ended = sum(rollout.finish_reason == "stop" for rollout in rollouts)
        found = max(1, ended) / sum(rollout.num_tokens for rollout in rollouts)
        embedding[encoder.end_token_id, 0] += math.log(probability / found) / gain
    return policy
