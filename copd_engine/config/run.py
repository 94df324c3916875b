"""A whole run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from copd_engine.config.base import NonNegativeInt, Section
from copd_engine.config.branch import BranchConfig
from copd_engine.config.distillation import DistillationConfig
from copd_engine.config.merge import MergeConfig
from copd_engine.config.model import MediaConfig, ModelConfig
from copd_engine.config.rollout import RolloutConfig
from copd_engine.config.schedule import MopdConfig, ScheduleConfig, StaticOpdConfig
from copd_engine.config.training import ObjectiveConfig, OptimConfig
from copd_engine.config.watch import CheckpointConfig, DiagnosticsConfig, EvalConfig
from copd_engine.types import suggest

BASE = "base"
#: Names that no branch may have, and why.
RESERVED_NAMES = {
    "average": "the tables call the mean over branches so",
    BASE: "the model that all branches start from is called so",
    "mixed": "the one model of mixed RLVR is called so",
    "student": "the student of static_opd and mopd is called so",
}


def _folder_name(value: str) -> str:
    if not value.strip(". ") or set(value) & set("/\\\0"):
        raise ValueError("must be a folder name: not empty, without slashes")
    return value


class RunConfig(Section):
    """A whole run.

    ``baselines``: methods to train too, from the same base with the same number of rollouts. ``parallel_baselines``:
    each in a process of its own beside the run, which needs the cores and the memory for it. ``num_threads`` 0: all.
    ``flops_of``: the folder of a finished CoPD run; ``expert`` and ``mixed`` go on until they have computed as much.
    """

    name: Annotated[str, AfterValidator(_folder_name)] = "run"
    seed: NonNegativeInt = 0
    method: Literal["copd", "expert", "mixed", "static_opd", "mopd"] = "copd"
    baselines: tuple[Literal["expert", "mixed", "static_opd", "mopd"], ...] = ()
    parallel_baselines: bool = False
    flops_of: Path | None = None
    output_dir: Path = Path("runs")
    num_threads: NonNegativeInt = 0
    device: str = "auto"
    tensorboard: bool = False
    model: ModelConfig = ModelConfig()
    media: MediaConfig = MediaConfig()
    branches: Annotated[tuple[BranchConfig, ...], Field(min_length=1)]
    schedule: ScheduleConfig = ScheduleConfig()
    static_opd: StaticOpdConfig = StaticOpdConfig()
    mopd: MopdConfig = MopdConfig()
    rollout: RolloutConfig = RolloutConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    distillation: DistillationConfig = DistillationConfig()
    optim: OptimConfig = OptimConfig()
    merge: MergeConfig = MergeConfig()
    eval: EvalConfig = EvalConfig()
    diagnostics: DiagnosticsConfig = DiagnosticsConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @model_validator(mode="after")
    def _names_fit(self) -> RunConfig:
        names = [branch.name for branch in self.branches]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"branch name {sorted(twice)[0]!r} is used twice")
        if self.schedule.hub is not None and self.schedule.topology != "hub":
            raise ValueError("schedule.hub needs schedule.topology 'hub'")
        named = [("schedule.hub", self.schedule.hub)] if self.schedule.hub else []
        if not isinstance(self.schedule.topology, str):
            for student, teacher in self.schedule.topology:
                if student == teacher:
                    raise ValueError(f"schedule.topology: branch {student!r} cannot teach itself")
                named += [("schedule.topology", student), ("schedule.topology", teacher)]
        named += [("merge.weights", name) for name in self.merge.weights or {}]
        for where, name in named:
            if name not in names:
                raise ValueError(f"{where}: no branch is named {name!r}{suggest(name, names)}")
        weights = self.merge.weights
        if self.merge.method == "weighted" and set(weights or {}) != set(names):
            raise ValueError(f"merge.method 'weighted' needs merge.weights for every branch: {', '.join(names)}")
        if weights is not None and self.merge.method != "weighted":
            raise ValueError("merge.weights needs merge.method 'weighted'")
        if weights is not None and not any(weights.values()):
            raise ValueError("merge.weights are all 0: at least one must be above 0")
        for name, taken_by in RESERVED_NAMES.items():
            if name in names:
                raise ValueError(f"branch name {name!r} is taken: {taken_by}")
        max_length, max_prompt = self.optim.max_length, self.rollout.max_prompt_tokens
        if max_length is not None and max_length <= max_prompt:
            raise ValueError(
                f"optim.max_length = {max_length}: must be above rollout.max_prompt_tokens = {max_prompt}, "
                "or a prompt could leave no room for a response"
            )
        for method in self.baselines:
            if method == self.method or self.baselines.count(method) > 1:
                raise ValueError(f"baselines: {method!r} would be trained twice")
        return self

    @model_validator(mode="after")
    def _methods_fit(self) -> RunConfig:
        names = self.branch_names
        static, mopd = self.static_opd, self.mopd
        named = [("static_opd.student", static.student), ("static_opd.teacher", static.teacher)]
        named += [("mopd.student", mopd.student if mopd.student != BASE else None)]
        named += [("mopd.teachers", name) for name in mopd.teachers or ()]
        for where, name in named:
            if name is not None and name not in names:
                raise ValueError(f"{where}: no branch is named {name!r}{suggest(name, names)}")
        used = {self.method, *self.baselines}
        if self.flops_of is not None and (others := used - {"expert", "mixed"}):
            raise ValueError(f"flops_of: only expert and mixed go on until a number of FLOPs, not {sorted(others)[0]}")
        if len(names) < 2 and ("static_opd" in used or ("mopd" in used and mopd.student != BASE)):
            raise ValueError("distillation from one expert into another needs at least two branches")
        if static.student is not None and static.student == static.teacher:
            raise ValueError(f"static_opd: branch {static.student!r} cannot teach itself")
        if len(set(mopd.teachers or ())) < len(mopd.teachers or ()):
            raise ValueError(f"mopd.teachers = {list(mopd.teachers or ())}: names a branch twice")
        if mopd.student in (mopd.teachers or ()):
            raise ValueError(f"mopd: branch {mopd.student!r} cannot teach itself")
        if mopd.student == BASE and mopd.native_share:
            raise ValueError("mopd.native_share: the base has no prompts of its own; set mopd.student to a branch")
        unmeasured = [method for method in ("static_opd", "mopd") if method in used and not self.diagnostics.every]
        if self.schedule.beta_scale == "kl" and unmeasured:
            raise ValueError(
                f"schedule.beta_scale 'kl': with diagnostics.every = 0 nothing is measured while {unmeasured[0]} "
                "distils, and beta would never be scaled; set diagnostics.every above 0"
            )
        if self.schedule.adaptive is not None and (len(names) < 2 or self.schedule.topology == []):
            raise ValueError("schedule.adaptive: no branch has a teacher, so there is no distance to decide by")
        return self

    @property
    def branch_names(self) -> tuple[str, ...]:
        return tuple(branch.name for branch in self.branches)
