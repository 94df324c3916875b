"""The training loop: executes a schedule's steps, whatever method made them.

What a step does to the branches stands in ``step.py``; here it is planned, measured, logged and saved.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from copd_engine import checkpoint, run_folder
from copd_engine.algorithms import EQUAL_FLOPS, EQUAL_STEPS, Schedule, StepPlan, betas_of
from copd_engine.branch import Branch
from copd_engine.config import RunConfig
from copd_engine.experts import experts_of
from copd_engine.flops import Work
from copd_engine.flops_goal import flops_goal
from copd_engine.gpu_meter import GpuMeter
from copd_engine.held_out import HeldOut
from copd_engine.inputs import load_train_examples, prompt_sources
from copd_engine.measurements import Measurements
from copd_engine.metrics import METRICS_FILE, MetricsLog, peak_rss_bytes, step_tokens, system_stats
from copd_engine.model_rows import ModelRows
from copd_engine.models.base import Policy
from copd_engine.models.loading import load_model
from copd_engine.progress import accuracy_line, progress
from copd_engine.resolve import resolve
from copd_engine.result import sorted_rows, work_of
from copd_engine.rollout.select import create_engine
from copd_engine.step import StepRunner, Timer
from copd_engine.types import UserError
from copd_engine.verifiers import shared_pool

MAX_SKIPPED_IN_A_ROW = 10
#: copd_kernels/gpu/topk.py: MAX_TOP_K, which a machine without Triton cannot import.
GPU_MAX_TOP_K = 32


class Trainer:
    """One run of one method. Builds everything from the config; :meth:`run` trains to the end or from a checkpoint."""

    def __init__(self, config: RunConfig, run_dir: Path, command: str = "", bar_position: int = 0) -> None:
        config = resolve(config)
        self.config = config
        self.run_dir = run_dir
        self._command = command
        self._bar_position = bar_position
        torch.set_num_threads(config.num_threads)
        self.schedule = Schedule(config, flops_goal(config))
        examples = load_train_examples(config)
        self.base, self.encoder = load_model(config.model, config.media, config.device)
        vocab_size = len(self.base.lm_head_weight)
        check_top_k(config.diagnostics.top_k, vocab_size, config.device)
        self._experts = experts_of(config, self.schedule)
        betas = betas_of(config)
        self.branches = {
            name: Branch(
                name,
                self.base.clone(),
                self.encoder,
                config.optim,
                config.objective,
                config.rollout.temperature,
                betas.get(name, 1.0),
                config.distillation,
                self.base if config.objective.kl.weight > 0 else None,
            )
            for name in self.schedule.students
        }
        # sglang reads a model from a folder; the embedded engine needs none.
        needs_folder = config.rollout.engine == "sglang"
        self._scratch = tempfile.TemporaryDirectory(prefix="copd-") if needs_folder else None
        self.engine = create_engine(
            config.rollout,
            config.model,
            {name: branch.policy for name, branch in self.branches.items()},
            self.encoder,
            Path(self._scratch.name if self._scratch else "."),
        )
        # Only the merge and the end need it: what is trained of it can wait where the masters do. What is not trained
        # is the branches' too.
        has_masters = any(branch.masters.copies for branch in self.branches.values())
        self._base_on_host = config.optim.offload and has_masters and not config.objective.kl.weight
        for parameter in self.base.named_parameters().values() if self._base_on_host else ():
            parameter.data = parameter.data.cpu()
        streams = prompt_sources(config, self.schedule.students, examples, self.encoder)
        self.steps = StepRunner(config, self.branches, self.engine, streams)
        held_out = HeldOut(config, self.encoder, run_dir)
        self.rows = ModelRows(config, run_dir, self.base, self.encoder, self.branches, self.steps, held_out)
        self.measured = Measurements(config, self.base, self._usable_base, self.branches, self.steps, held_out)
        self._kept_rows: list[dict[str, Any]] = []
        self._last_checkpoint: Path | None = None
        self._meter = GpuMeter()
        self._elapsed_before = 0.0
        self._started = time.perf_counter()

    # The run

    def run(self, baseline_rows: Callable[[], list[dict[str, Any]]] = list) -> dict[str, Any]:
        """Train from the newest checkpoint, or from the start; returns what ``result.json`` holds.

        ``baseline_rows`` is called at the end and gives rows of other runs for the result's table.
        """
        try:
            return self._train(baseline_rows)
        finally:
            self.engine.close()
            if self._scratch:
                self._scratch.cleanup()

    def _train(self, baseline_rows: Callable[[], list[dict[str, Any]]]) -> dict[str, Any]:
        run_folder.claim(self.run_dir, self.config)
        done, first = self._resume(), self.schedule.first_step
        with MetricsLog(self.run_dir, tensorboard=self.config.tensorboard, resume_step=done) as log:
            if done is None:
                log.write(self._base_record())
                self._take_experts()
            else:
                first = done + 1
            self._started = time.perf_counter()
            with tqdm(
                desc=self.config.method,
                initial=first - 1,
                total=self.schedule.num_steps,
                unit="step",
                dynamic_ncols=True,
                position=self._bar_position,
                mininterval=1.0,
            ) as bar:
                self._run_steps(first, log, bar)
        return self._finish(baseline_rows)

    def _run_steps(self, first: int, log: MetricsLog, bar: tqdm[Any]) -> None:
        """From step ``first`` to the schedule's end, which measurements may move."""
        checkpoint_s = 0.0
        step = first - 1
        while step < self.schedule.num_steps:
            step += 1
            record = self.step(self.schedule.plan(step))
            flops = sum(work.flops for work in self.steps.work.values())
            self.schedule.observe(step, (record["diagnostics"] or {}).get("pairs", ()), flops)
            bar.total = self.schedule.num_steps
            # A checkpoint follows the log line of its step, or a kill between the two would lose the line for good; its
            # time stands in the next line.
            record["time_s"]["checkpoint"] = checkpoint_s
            record["step_s"] += checkpoint_s
            log.write(record)
            bar.set_postfix_str(progress(record), refresh=False)
            bar.update()
            if record["evaluate"]:
                tqdm.write(accuracy_line(self.config.method, record))
            self._stop_if_diverged()
            if step < self.schedule.num_steps:
                self._kept_rows += self.rows.after(step, self.schedule)
            begin = time.perf_counter()
            if _due(step, self.config.checkpoint.every) or step == self.schedule.num_steps:
                self._save(step)
            checkpoint_s = time.perf_counter() - begin

    def step(self, plan: StepPlan) -> dict[str, Any]:
        """One optimizer step of every branch; returns its metrics record."""
        begin = time.perf_counter()
        timer, failures = Timer(), asdict(shared_pool().failures)
        with self._meter:
            per_branch = self.steps.run(plan, timer)
        record: dict[str, Any] = {
            "step": plan.step,
            "cycle": plan.cycle,
            "phase": plan.phase,
            "branches": per_branch,
            "diagnostics": None,
            "evaluate": None,
        }
        if _due(plan.step, self.config.diagnostics.every) or self.schedule.is_measured(plan.step):
            with timer("diagnostics"):
                record["diagnostics"] = self.measured.distances(plan.models)
        if _due(plan.step, self.config.eval.every):
            with timer("evaluate"):
                record["evaluate"] = self.measured.accuracies(plan.step, plan.students)
        self.engine.sleep()  # what follows, a merge say, may want its memory
        record["time_s"] = timer.seconds
        record["step_s"] = time.perf_counter() - begin
        record["elapsed_s"] = self._elapsed()
        record["system"] = system_stats(self._meter, step_tokens(per_branch))
        record["rollout_engine"] = self.engine.stats()
        now = asdict(shared_pool().failures)
        record["verifier_failures"] = {kind: count - failures[kind] for kind, count in now.items()}
        return record

    def _base_record(self) -> dict[str, Any]:
        """Step 0: all branches still equal the base."""
        accuracies = self.measured.base_accuracies()
        diagnostics = self.measured.distances(self.schedule.plan(self.schedule.first_step).models)
        self.engine.sleep()
        return {
            "step": 0,
            "cycle": 0,
            "phase": "base",
            "elapsed_s": 0.0,
            "branches": {},
            "diagnostics": diagnostics,
            "evaluate": accuracies,
            "system": system_stats(),
            "rollout_engine": self.engine.stats(),  # its start and what was measured here, which are no part of step 1
        }

    def _usable_base(self) -> Policy:
        """The base on the run's device, a copy where it waits in host memory."""
        return self.rows.model_of(self.base.full_parameters()) if self._base_on_host else self.base

    # Checkpoint, resume, end

    def _save(self, step: int) -> None:
        state = {
            "streams": {"/".join(key): stream.state_dict() for key, stream in self.steps.streams.items()},
            "rollouts_drawn": dict(self.steps.rollouts_drawn),
            "steps_taken": dict(self.steps.steps_taken),
            "work": {name: asdict(work) for name, work in self.steps.work.items()},
            "schedule": self.schedule.state_dict(),
            "kept_rows": self._kept_rows,
            "elapsed_s": self._elapsed(),
        }
        folder = self.run_dir / run_folder.CHECKPOINTS
        keep = self.config.checkpoint.keep
        remembered = {"diagnosed": self.measured.angles.tensors()} if self.measured.angles else {}
        self._last_checkpoint = checkpoint.save_checkpoint(folder, step, self.branches, state, keep, remembered)

    def _resume(self) -> int | None:
        """Restore the newest whole checkpoint and return its step; None for a run that starts anew."""
        folder = self.run_dir / run_folder.CHECKPOINTS
        newest = checkpoint.newest_checkpoint(folder)
        if newest is None:
            # Nothing to restore, but a kill may have left some lines: start over, in the same folder.
            (self.run_dir / METRICS_FILE).unlink(missing_ok=True)
            (self.run_dir / run_folder.SAMPLES).unlink(missing_ok=True)
            return None
        step, state = checkpoint.load_checkpoint(newest, self.branches)
        if step < self.schedule.first_step - 1:
            raise UserError(
                f"{newest}: its experts are still in training, and {self.config.method}.experts takes others; leave it "
                "out to go on, or choose another name=..."
            )
        self._last_checkpoint = newest
        # Where a newer one is damaged, the older ones stay.
        if newest == checkpoint.complete_checkpoints(folder)[-1]:
            checkpoint.prune(folder, self.config.checkpoint.keep)
        for key, stream in self.steps.streams.items():
            stream.load_state_dict(state["streams"]["/".join(key)])
        self.steps.rollouts_drawn.update(state["rollouts_drawn"])
        self.steps.steps_taken.update(state["steps_taken"])
        self.steps.work.update({name: Work(**work) for name, work in state["work"].items()})
        self.schedule.load_state_dict(state["schedule"])
        if self.measured.angles:
            self.measured.angles.load_tensors(checkpoint.load_tensors(newest, "diagnosed"))
        self._kept_rows = state["kept_rows"]
        self._elapsed_before = state["elapsed_s"]
        self.steps.sync()
        run_folder.drop_later_samples(self.run_dir, step, self.branches)
        return step

    def _take_experts(self) -> None:
        """Experts of another run, with what their training took and how they scored."""
        if self._experts is None:
            return
        for name, row in self._experts.rows.items():
            self.branches[name].start_from(self._experts.parameters(name, self.config))
            self.steps.rollouts_drawn[name], self.steps.steps_taken[name] = row["rollouts"], row["steps"]
            self.steps.work[name] = work_of(row)
            label = f"expert:{name}{EQUAL_STEPS}"
            self._kept_rows.append({**row, "model": label})
            run_folder.copy_scores(self.run_dir, label, self._experts.scores[name])
        self.measured.begin_angles()
        self.steps.sync()

    def _stop_if_diverged(self) -> None:
        for name, branch in self.branches.items():
            if branch.num_skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
                raise UserError(
                    f"branch {name!r}: {MAX_SKIPPED_IN_A_ROW} updates in a row had a NaN or infinite loss or gradient; "
                    f"stopped. Last checkpoint: {self._last_checkpoint or 'none'}"
                )

    def _finish(self, baseline_rows: Callable[[], list[dict[str, Any]]]) -> dict[str, Any]:
        """Evaluate, merge, save in Hugging Face format, write ``result.json``."""
        train_s = self._elapsed()
        last = self.schedule.num_steps
        rows = [self.rows.of_base(), *self.rows.after(last, self.schedule, samples_step=last), *self._kept_rows]
        rows.sort(key=lambda row: row["model"].endswith((EQUAL_STEPS, EQUAL_FLOPS)))
        result = {
            "domains": list(self.config.branch_names),
            "rows": sorted_rows([*rows, *baseline_rows()]),
            "command": self._command,
            "machine": run_folder.machine(),
            "date": run_folder.today(),
            "versions": run_folder.versions(),
            "train_s": train_s,
            "peak_rss_bytes": peak_rss_bytes(),
            "seed": self.config.seed,
            "method": self.config.method,
            "num_steps": last,
            "flops_goal": self.schedule.flops_goal,
        }
        run_folder.write_json(self.run_dir / run_folder.RESULT, result)
        return result

    def _elapsed(self) -> float:
        return self._elapsed_before + time.perf_counter() - self._started


def check_top_k(top_k: int, vocab_size: int, device: str) -> None:
    """UserError where the kernels cannot compare so many tokens."""
    if top_k > vocab_size:
        raise UserError(f"diagnostics.top_k = {top_k}: the model's vocabulary has {vocab_size} tokens")
    if torch.device(device).type == "cuda" and top_k > GPU_MAX_TOP_K:
        raise UserError(f"diagnostics.top_k = {top_k}: must be at most {GPU_MAX_TOP_K} on a GPU")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
