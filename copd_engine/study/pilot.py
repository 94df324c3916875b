"""The paper's pilot: what distillation gains against how much student and teacher overlapped before it.

One fixed teacher, a finished expert. The students stand on straight lines from the base to other experts; each learns
from the teacher on the teacher's prompts for the same number of steps, with the same prompts in the same order.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from copd_engine import run_folder
from copd_engine.algorithms import Assignment, StepPlan
from copd_engine.branch import Branch
from copd_engine.config import ModelConfig, RunConfig
from copd_engine.diagnostics import compare_branches
from copd_engine.evaluate import evaluate
from copd_engine.inputs import held_out_prompts, load_train_examples, prompt_sources
from copd_engine.models.base import Policy, PromptEncoder
from copd_engine.models.loading import load_model
from copd_engine.resolve import resolve
from copd_engine.rollout.select import create_engine
from copd_engine.step import StepRunner, Timer, derive_seed
from copd_engine.study.config import PilotConfig
from copd_engine.types import RolloutRequest

STUDENT = "student"
POINTS = "points.json"


def run_pilot(config: RunConfig, pilot: PilotConfig, experts: Path, folder: Path) -> dict[str, Any]:
    """Train the students that have no point yet; returns what ``result.json`` holds: ``{"points": [...]}``.

    A point is ``{"student": branch, "fraction": x, "before": accuracy, "after": accuracy, "gain": x,
    "teacher_accuracy": accuracy, "overlap": x, "sum_min": x, "symmetric_kl": x}``. Accuracies are those on the
    teacher's domain; overlap and KL are those before the distillation, on the student's states.
    ``config``: that of the run of ``method: expert`` in the folder ``experts``.
    """
    config = resolve(config)
    torch.set_num_threads(config.num_threads)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / POINTS
    points: list[dict[str, Any]] = json.loads(file.read_text())["points"] if file.is_file() else []
    base, encoder = load_model(config.model.model_copy(update={"lora": None}), config.media, config.device)
    teacher = _expert(config, experts, pilot.teacher)
    wanted = [(name, fraction) for name in pilot.students for fraction in pilot.fractions]
    for name, fraction in tqdm(wanted[len(points) :], desc="pilot", initial=len(points), total=len(wanted)):
        student = _between(base, _expert(config, experts, name), fraction)
        known = points[0]["teacher_accuracy"] if points else None
        point = _distil(config, pilot, base, base.with_full_parameters(student), teacher, encoder, known)
        points.append({"student": name, "fraction": fraction, **point})
        run_folder.write_json(file, {"points": points})
    result = {
        "points": points,
        "teacher": pilot.teacher,
        "machine": run_folder.machine(),
        "date": run_folder.today(),
        "versions": run_folder.versions(),
    }
    run_folder.write_json(folder / run_folder.RESULT, result)
    return result


def _expert(config: RunConfig, experts: Path, name: str) -> Policy:
    folder = experts / "models" / run_folder.file_name(f"expert:{name}")
    model = ModelConfig(path=str(folder), dtype=config.model.dtype)
    return load_model(model, config.media, config.device)[0]


def _between(base: Policy, expert: Policy, fraction: float) -> dict[str, torch.Tensor]:
    """theta_0 + fraction * (theta_expert - theta_0), in fp32."""
    ends = expert.full_parameters(torch.float32)
    return {name: start.lerp(ends[name], fraction) for name, start in base.full_parameters(torch.float32).items()}


def _distil(
    config: RunConfig,
    pilot: PilotConfig,
    base: Policy,
    student: Policy,
    teacher: Policy,
    encoder: PromptEncoder,
    teacher_accuracy: float | None,
) -> dict[str, float]:
    """Measure, distil, measure again; the teacher's accuracy unless it is known."""
    number = config.branch_names.index(pilot.teacher)
    temperature, beta = config.rollout.temperature, config.branches[number].beta
    objective = config.objective
    reference = base if objective.kl.weight > 0 else None
    branches = {
        name: Branch(name, policy, encoder, config.optim, objective, temperature, beta, config.distillation, reference)
        for name, policy in ((STUDENT, student), (pilot.teacher, teacher))
    }
    num_tested = config.eval.final_num_prompts
    held_out = held_out_prompts(config, number, encoder, num_tested)
    # All prompts of the test, without their answers: on a few, overlap differs by chance more than students do.
    probes = [RolloutRequest(prompt, derive_seed(config.seed, "probe", i), i) for i, prompt in enumerate(held_out)]
    streams = prompt_sources(config, [STUDENT], load_train_examples(config), encoder)
    with tempfile.TemporaryDirectory(prefix="copd-") as scratch:
        policies = {name: branch.policy for name, branch in branches.items()}
        engine = create_engine(config.rollout, config.model, policies, encoder, Path(scratch))
        try:
            runner = StepRunner(config, branches, engine, streams)

            def accuracy(model: str) -> float:
                prompts, seed = {pilot.teacher: held_out}, derive_seed(config.seed, "eval")
                return evaluate(engine, model, prompts, runner.sampling, seed, num_tested)[0][pilot.teacher].mean

            only_student = {STUDENT: branches[STUDENT]}
            (start,) = compare_branches(
                only_student, engine, probes, runner.sampling, config.diagnostics.top_k, teacher
            )
            before = accuracy(STUDENT)
            assignment = Assignment(STUDENT, pilot.teacher, config.rollout.prompts_per_step, pilot.teacher)
            for step in range(1, pilot.opd_steps + 1):
                runner.run(StepPlan(step, 1, "opd", (assignment,)), Timer())
            after = accuracy(STUDENT)
            if teacher_accuracy is None:
                teacher_accuracy = accuracy(pilot.teacher)  # it is not trained
        finally:
            engine.close()
    measures = {key: float(start[key]) for key in ("overlap", "sum_min", "symmetric_kl")}
    accuracies = {"before": before, "after": after, "gain": after - before, "teacher_accuracy": teacher_accuracy}
    return {**accuracies, **measures}
