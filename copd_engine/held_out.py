"""What the models of a run are measured on: held-out prompts of every branch, and fixed probe prompts among them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from copd_engine import run_folder
from copd_engine.config import RunConfig
from copd_engine.evaluate import Accuracy, evaluate
from copd_engine.inputs import held_out_prompts
from copd_engine.models.base import PromptEncoder
from copd_engine.rollout.base import RolloutEngine, Sampling
from copd_engine.step import derive_seed
from copd_engine.types import Rollout, RolloutRequest

SAMPLES_PER_DOMAIN = 3


class HeldOut:
    """``prompts`` by branch, ``final_num_prompts`` of each. Every model answers them with the same random numbers."""

    def __init__(self, config: RunConfig, encoder: PromptEncoder, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._seed = config.seed
        self._sampling = Sampling(config.rollout.temperature, config.rollout.max_new_tokens)
        self.prompts = {
            branch.name: held_out_prompts(config, number, encoder, config.eval.final_num_prompts)
            for number, branch in enumerate(config.branches)
        }

    def probes(self, num_prompts: int) -> list[RolloutRequest]:
        """The first ``num_prompts`` of each branch, with seeds of their own."""
        prompts = [prompt for rows in self.prompts.values() for prompt in rows[:num_prompts]]
        return [RolloutRequest(p, derive_seed(self._seed, "probe", i), i) for i, p in enumerate(prompts)]

    def evaluate(
        self, engine: RolloutEngine, expert: str, num_prompts: int
    ) -> tuple[dict[str, Accuracy], list[tuple[str, Rollout, float]]]:
        """As :func:`copd_engine.evaluate.evaluate`."""
        seed = derive_seed(self._seed, "eval")
        return evaluate(engine, expert, self.prompts, self._sampling, seed, num_prompts)

    def keep_samples(self, step: int, model: str, samples: Sequence[tuple[str, Rollout, float]]) -> None:
        """The first few of each domain into the run folder."""
        kept: dict[str, int] = defaultdict(int)
        for domain, rollout, reward in samples:
            if kept[domain] < SAMPLES_PER_DOMAIN:
                kept[domain] += 1
                run_folder.save_sample(self._run_dir, step, model, domain, rollout, reward)
