"""What the models of a run are measured on: held-out prompts of every branch, and fixed probe prompts among them."""

from __future__ import annotations

import logging
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
from copd_engine.types import EncodedPrompt, Rollout, RolloutRequest

logger = logging.getLogger(__name__)

SAMPLES_PER_DOMAIN = 3


class HeldOut:
    """``prompts`` by branch, ``final_num_prompts`` of each. Every model answers them with the same random numbers.

    Probe prompts stand behind those, so that what they steer (``schedule.adaptive``, ``beta_scale: kl``) has not seen a
    prompt of the test; where a branch has no more held-out prompts, they are the first ones, which is a warning where
    they steer.
    """

    def __init__(self, config: RunConfig, encoder: PromptEncoder, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._seed = config.seed
        self._sampling = Sampling(config.rollout.temperature, config.rollout.max_new_tokens)
        self._num_prompts = config.eval.final_num_prompts
        self._num_probes = config.diagnostics.num_prompts
        self._steered_by = _steered_by(config)
        self.prompts = {
            branch.name: held_out_prompts(config, number, encoder, self._num_prompts + self._num_probes)
            for number, branch in enumerate(config.branches)
        }

    def probes(self) -> list[RolloutRequest]:
        """``diagnostics.num_prompts`` prompts of each branch, with seeds of their own."""
        chosen: list[tuple[int, EncodedPrompt]] = []
        for name, rows in self.prompts.items():
            begin, end = self._num_prompts, self._num_prompts + self._num_probes
            if len(rows) < end:
                begin, end = 0, self._num_probes
                self._tell_that_the_test_is_probed(name, len(rows))
            # Not by the running number: the order of branches in the config must not change what is drawn.
            chosen += [(derive_seed(self._seed, "probe", name, i), p) for i, p in enumerate(rows[begin:end])]
        return [RolloutRequest(prompt, seed, group) for group, (seed, prompt) in enumerate(chosen)]

    def _tell_that_the_test_is_probed(self, name: str, count: int) -> None:
        told = f"branch {name!r}: {count} held-out prompts, so its probe prompts are the first of them"
        if self._steered_by is None:
            logger.info(told)
            return
        wanted = self._num_prompts + self._num_probes
        logger.warning(
            f"{told}, and {self._steered_by} goes by prompts of the test. It would not with {wanted} (data.eval_size): "
            "eval.final_num_prompts and diagnostics.num_prompts together"
        )

    def evaluate(
        self, engine: RolloutEngine, expert: str, num_prompts: int
    ) -> tuple[dict[str, Accuracy], list[tuple[str, Rollout, float]]]:
        """As :func:`copd_engine.evaluate.evaluate`, on at most ``final_num_prompts``."""
        seed = derive_seed(self._seed, "eval")
        return evaluate(engine, expert, self.prompts, self._sampling, seed, min(num_prompts, self._num_prompts))

    def keep_samples(self, step: int, model: str, samples: Sequence[tuple[str, Rollout, float]]) -> None:
        """The first few of each domain into the run folder."""
        kept: dict[str, int] = defaultdict(int)
        for domain, rollout, reward in samples:
            if kept[domain] < SAMPLES_PER_DOMAIN:
                kept[domain] += 1
                run_folder.save_sample(self._run_dir, step, model, domain, rollout, reward)


def _steered_by(config: RunConfig) -> str | None:
    """What in the run goes by distances on the probe prompts."""
    if config.method == "copd" and config.schedule.adaptive is not None:
        return "schedule.adaptive"
    distils = config.method in ("copd", "static_opd", "mopd")
    return "schedule.beta_scale" if distils and config.schedule.beta_scale == "kl" else None
