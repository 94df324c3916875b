"""Requests of one call on their way through sglang: jobs, retries, groups, and rollouts from answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from copd_engine.models.base import PromptEncoder
from copd_engine.rollout.base import Sampling
from copd_engine.rollout.sglang_jobs import Answer, Job
from copd_engine.types import EncodedPrompt, Rollout, RolloutRequest

MAX_TRIES = 2


@dataclass(frozen=True)
class Entry:
    """A request, its expert, and its place among all requests of the call."""

    index: int
    expert: str
    request: RolloutRequest


class Batch:
    """All requests of one call. ``waiting``: indices that still need an answer."""

    def __init__(
        self, requests: Mapping[str, Sequence[RolloutRequest]], sampling: Sampling, encoder: PromptEncoder
    ) -> None:
        pairs = [(expert, request) for expert, asked in requests.items() for request in asked]
        self.entries = [Entry(index, expert, request) for index, (expert, request) in enumerate(pairs)]
        self.waiting = dict.fromkeys(range(len(self.entries)))
        self.counts = dict.fromkeys(
            ("num_rollouts", "num_tokens", "num_retried", "num_dropped", "num_skipped_groups"), 0
        )
        self._sampling = sampling
        self._encoder = encoder
        self._tries = [0] * len(self.entries)
        self._members: dict[tuple[str, int], list[int]] = {}
        for entry in self.entries:
            self._members.setdefault((entry.expert, entry.request.group), []).append(entry.index)
        self._rollouts: dict[int, Rollout] = {}
        self._media: dict[int, tuple[dict[str, np.ndarray] | None, dict[str, np.ndarray] | None]] = {}

    def jobs(self, adapters: Mapping[str, str]) -> list[Job]:
        """What is still to be sampled; ``adapters``: the name of each expert's adapter, if it has one."""
        jobs = []
        for index in self.waiting:
            entry = self.entries[index]
            prompt = entry.request.prompt
            if id(prompt) not in self._media:
                self._media[id(prompt)] = _media(prompt)
            images, videos = self._media[id(prompt)]
            jobs.append(
                Job(
                    index=index,
                    input_ids=prompt.input_ids_T.tolist(),
                    sampling=self._parameters(entry.request),
                    images=images,
                    videos=videos,
                    lora=adapters.get(entry.expert),
                )
            )
        return jobs

    def _parameters(self, request: RolloutRequest) -> dict[str, Any]:
        return {
            "temperature": self._sampling.temperature,
            "max_new_tokens": self._sampling.max_new_tokens,
            "top_p": 1.0,
            "top_k": -1,
            "stop_token_ids": [self._encoder.end_token_id],
            "skip_special_tokens": False,
            "custom_params": {
                "seed": request.seed,
                "prompt_tokens": request.prompt.num_tokens,
                "suppressed": list(self._encoder.suppressed_token_ids),
            },
        }

    def rollout(self, answer: Answer, spans: tuple[tuple[int, int, int], ...]) -> Rollout:
        """The rollout that an answer holds; ``spans``: the weight versions of its tokens."""
        versions = [version for version, _, _ in spans]
        stopped = bool(answer.token_ids) and answer.token_ids[-1] == self._encoder.end_token_id
        return Rollout(
            request=self.entries[answer.index].request,
            response_ids_N=torch.tensor(answer.token_ids, dtype=torch.int64),
            sampler_logp_N=torch.tensor(answer.logp, dtype=torch.float32),
            finish_reason="stop" if stopped else "length",
            weight_version=min(versions),
            text=self._encoder.decode(answer.token_ids),
            version_spans=spans if len(spans) > 1 else (),
        )

    def settle(self, answer: Answer, rollout: Rollout | None) -> Iterator[list[tuple[Entry, Rollout]]]:
        """Take in a rollout, or None for one that failed; yields the request's group once it is whole.

        A request that failed stays waiting once, then it is dropped; so is what remains of a group of which fewer than
        two members are left.
        """
        index = answer.index
        entry = self.entries[index]
        if rollout is None:
            self._tries[index] += 1
            if self._tries[index] < MAX_TRIES:
                self.counts["num_retried"] += 1
                return
            self.counts["num_dropped"] += 1
        else:
            self._rollouts[index] = rollout
        del self.waiting[index]
        members = self._members[entry.expert, entry.request.group]
        if any(member in self.waiting for member in members):
            return
        left = [(self.entries[i], self._rollouts.pop(i)) for i in members if i in self._rollouts]
        if len(left) < min(2, len(members)):
            self.counts["num_skipped_groups"] += 1
            return
        self.counts["num_rollouts"] += len(left)
        self.counts["num_tokens"] += sum(rollout.num_tokens for _, rollout in left)
        yield left


def _media(prompt: EncodedPrompt) -> tuple[dict[str, np.ndarray] | None, dict[str, np.ndarray] | None]:
    """Pixel inputs of images and of videos as they are, with the prompt's own M-RoPE positions."""
    positions = {
        "mrope_positions": prompt.position_ids_3T.numpy(),
        "mrope_position_delta": np.array([prompt.next_position - prompt.num_tokens]),
    }
    images = videos = None
    if prompt.pixel_values is not None and prompt.image_grid_thw is not None:
        images = {
            "pixel_values": prompt.pixel_values.numpy(),
            "image_grid_thw": prompt.image_grid_thw.numpy(),
            **positions,
        }
    if prompt.pixel_values_videos is not None and prompt.video_grid_thw is not None:
        videos = {
            "pixel_values_videos": prompt.pixel_values_videos.numpy(),
            "video_grid_thw": prompt.video_grid_thw.numpy(),
            **positions,
        }
    return images, videos
