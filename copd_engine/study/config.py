"""The config of a study: what is run, with which seeds, and what is claimed before it is run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, Field, model_validator

from copd_engine.config.base import Float, NonNegativeInt, PositiveFloat, PositiveInt, Section
from copd_engine.config.load import read_mapping, validate
from copd_engine.study.defaults import METHODS, expand_methods
from copd_engine.types import UserError, suggest

Measure = Literal["overlap", "sum_min", "symmetric_kl"]
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]+$")]
#: The variant of that name is the pilot, not a run.
PILOT = "pilot"
CLAIM_FIELDS = {
    "accuracy": ("better", "than"),
    "phase": ("variant", "measure", "phase", "direction"),
    "above": ("variant", "than", "measure"),
    "stays_above": ("variant", "measure"),
    "pilot": (),
    "pilot_headroom": (),
}


def _some_different(values: tuple[int, ...]) -> tuple[int, ...]:
    if not values or len(set(values)) < len(values):
        raise ValueError("must be different seeds, at least one")
    return values


Seeds = Annotated[tuple[NonNegativeInt, ...], AfterValidator(_some_different)]


class VariantConfig(Section):
    """One way to run: ``changes`` are merged into the study's ``run``, section by section, ``each_branch`` into each of
    its branches; ``branches`` takes some of them by name. ``experts``: the variant of ``method: expert`` whose experts
    static_opd and mopd take, of the same seed. ``flops_of``: the variant of ``method: copd`` whose training FLOPs
    ``expert`` or ``mixed`` goes on to, past equal rollouts, for rows at equal FLOPs."""

    changes: dict[str, Any] = Field(default_factory=dict)
    branches: tuple[str, ...] | None = None
    each_branch: dict[str, Any] = Field(default_factory=dict)
    experts: str | None = None
    flops_of: str | None = None

    @property
    def needs(self) -> tuple[str, ...]:
        """The variants that are trained before it."""
        return tuple(name for name in (self.experts, self.flops_of) if name is not None)


class NamedModel(NamedTuple):
    """A model, written VARIANT or VARIANT/ROW; where the config names it, and the domain that it is needed on."""

    where: str
    name: str
    domain: str = "average"


class TableConfig(Section):
    """``rows``: label -> model. A model is written VARIANT, for what the variant's run ends with, or VARIANT/ROW for
    another row of its result: ``expert2/expert:text``."""

    title: str
    rows: dict[str, str]


class SweepConfig(Section):
    """A figure of accuracy over a setting. ``lines``: label -> value of the setting -> model."""

    title: str
    x_label: str
    lines: dict[str, dict[Float, str]]
    domain: str = "average"


class StepsConfig(Section):
    """A figure of a diagnostic over optimizer steps, mean over pairs of branches. ``lines``: label -> variant."""

    title: str
    measure: Measure
    lines: dict[str, str]


class PilotConfig(Section):
    """Gain from distillation against starting overlap, with one fixed teacher.

    ``teacher`` is a branch's expert of the variant ``experts``. The students stand between the base and the experts of
    ``students``: theta_0 + fraction * (theta_expert - theta_0) for each of ``fractions``. Each learns from the teacher
    for ``opd_steps`` steps on the teacher's prompts; the gain is what its accuracy there rises by.
    """

    experts: str
    teacher: str
    students: Annotated[tuple[str, ...], Field(min_length=1)]
    fractions: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)]
    opd_steps: PositiveInt


class ClaimConfig(Section):
    """One sentence, and the number per seed whose sign decides it.

    ``accuracy``: that of the model ``better`` minus that of ``than``, on ``domain``.
    ``phase``: how the ``measure`` of ``variant`` changes over a ``phase``, mean over all of them and all pairs, but
    for the first phase I, which starts from equal models.
    ``above``: the ``measure`` of ``variant`` minus that of the variant ``than``, mean over the steps at which both have
    it after the first phase I of the one that is CoPD (until then it trains as independent experts do).
    ``stays_above``: the smallest such difference, or the smallest difference to the number ``level`` at any step after
    the start; it holds only if that is above 0 in every seed.
    ``pilot``: the correlation of the pilot's gain with starting overlap; ``pilot_headroom``: of the gain per headroom,
    the teacher's accuracy minus the student's before, without students near their teacher.
    """

    claim: str
    kind: Literal["accuracy", "phase", "above", "stays_above", "pilot", "pilot_headroom"] = "accuracy"
    better: str | None = None
    than: str | None = None
    domain: str = "average"
    variant: str | None = None
    measure: Measure | None = None
    phase: Literal["rl", "opd"] | None = None
    direction: Literal["falls", "rises"] | None = None
    level: Float | None = None

    @model_validator(mode="after")
    def _kind_has_its_fields(self) -> ClaimConfig:
        needed = CLAIM_FIELDS[self.kind]
        for key in needed:
            if getattr(self, key) is None:
                raise ValueError(f"kind '{self.kind}' needs '{key}'")
        optional = ("than", "level") if self.kind == "stays_above" else ()
        for key in ("better", "than", "variant", "measure", "phase", "direction", "level"):
            if getattr(self, key) is not None and key not in (*needed, *optional):
                raise ValueError(f"kind '{self.kind}' takes no '{key}'")
        if self.kind == "stays_above" and (self.than is None) == (self.level is None):
            raise ValueError("kind 'stays_above' needs 'than' or 'level', and not both")
        return self


class FastConfig(Section):
    """What ``--fast`` changes: the seeds, and keys of every unit's run and of each of its branches, merged in last."""

    seeds: Seeds = (1,)
    run: dict[str, Any] = Field(default_factory=dict)
    each_branch: dict[str, Any] = Field(default_factory=dict)
    pilot_opd_steps: PositiveInt = 1


class StudyConfig(Section):
    """A whole study. ``run`` is a run config that all variants share. ``processes`` train side by side, each with the
    ``num_threads`` of ``run``."""

    name: Name = "study"
    output_dir: Path = Path("studies")
    seeds: Seeds
    processes: PositiveInt = 1
    run: dict[str, Any]
    variants: dict[Name, VariantConfig] = Field(min_length=1)
    tables: tuple[TableConfig, ...] = ()
    sweeps: tuple[SweepConfig, ...] = ()
    steps: tuple[StepsConfig, ...] = ()
    pilot: PilotConfig | None = None
    claims: tuple[ClaimConfig, ...] = ()
    fast: FastConfig = FastConfig()

    @model_validator(mode="after")
    def _names_fit(self) -> StudyConfig:
        if PILOT in self.variants:
            raise ValueError(f"variants: the name {PILOT!r} is taken")
        named = [(f"variants.{name}.experts", variant.experts, "expert") for name, variant in self.variants.items()]
        named += [(f"variants.{name}.flops_of", variant.flops_of, "copd") for name, variant in self.variants.items()]
        named += [("pilot.experts", self.pilot.experts, "expert")] if self.pilot else []
        for where, name, method in named:
            if name is not None:
                self._check(where, name)
                if self.variants[name].changes.get("method", self.run.get("method", "copd")) != method:
                    raise ValueError(f"{where}: variant {name!r} is not of method {method!r}")
        for i, steps in enumerate(self.steps):
            for variant in steps.lines.values():
                self._check(f"steps.{i}.lines", variant)
        for i, claim in enumerate(self.claims):
            compared = [claim.variant, claim.than if claim.kind != "accuracy" else None]
            for name in compared:
                if name is not None:
                    self._check(f"claims.{i}", name)
            if claim.kind in ("pilot", "pilot_headroom") and self.pilot is None:
                raise ValueError(f"claims.{i}: kind {claim.kind!r} needs the section 'pilot'")
        for model in self.models:
            self._check(model.where, variant_of(model.name))
        return self

    @property
    def models(self) -> list[NamedModel]:
        """Every place that names a model whose accuracy is shown or compared."""
        found = [
            NamedModel(f"tables.{i}.rows", name) for i, table in enumerate(self.tables) for name in table.rows.values()
        ]
        for i, sweep in enumerate(self.sweeps):
            names = [name for line in sweep.lines.values() for name in line.values()]
            found += [NamedModel(f"sweeps.{i}.lines", name, sweep.domain) for name in names]
        for i, claim in enumerate(self.claims):
            names = [name for name in (claim.better, claim.than) if name is not None and claim.kind == "accuracy"]
            found += [NamedModel(f"claims.{i}", name, claim.domain) for name in names]
        return found

    def _check(self, where: str, variant: str) -> None:
        if variant not in self.variants:
            raise ValueError(f"{where}: no variant is named {variant!r}{suggest(variant, self.variants)}")


def variant_of(model: str) -> str:
    """The variant of a model that is written VARIANT or VARIANT/ROW."""
    return model.partition("/")[0]


def load_study(path: str | Path, overrides: list[str] | None = None, fast: bool = False) -> StudyConfig:
    """Read a study's YAML file. ``run`` may be a path, from the file's own folder; ``methods`` stands for the variants,
    table, figures and claims of :func:`copd_engine.study.defaults.expand_methods`, before those that are written out.

    UserError as in :func:`copd_engine.config.load_config`.
    """
    path = Path(path)
    data = _read(path, overrides or [])
    if "methods" in data:
        methods = data.pop("methods")
        wrong = [m for m in methods if m not in METHODS] if isinstance(methods, list) else [methods]
        if wrong or not methods:
            raise UserError(f"{path}: methods = {methods!r}: must be a list of {', '.join(METHODS)}")
        _check_run(path, data)
        for key, value in expand_methods(data["run"], methods).items():
            given = data.get(key)
            if given is not None and not isinstance(given, type(value)):
                kind = "mapping of names to sections" if isinstance(value, dict) else "list"
                raise UserError(f"{path}: {key} = {given!r}: must be a {kind}")
            data[key] = {**value, **(given or {})} if isinstance(value, dict) else [*value, *(given or [])]
    study = validate(StudyConfig, data, str(path))
    if not fast:
        return study
    pilot = study.pilot and study.pilot.model_copy(update={"opd_steps": study.fast.pilot_opd_steps})
    return study.model_copy(update={"name": f"{study.name}-fast", "seeds": study.fast.seeds, "pilot": pilot})


def _read(path: Path, overrides: list[str]) -> dict[str, Any]:
    """The file with the run config that it names in place of the path; overrides of ``run.*`` change either."""
    of_run = [override for override in overrides if override.startswith("run.")]
    data = read_mapping(path, [override for override in overrides if override not in of_run])
    if not isinstance(data.get("run"), str):
        return read_mapping(path, overrides)
    return {**data, "run": read_mapping(path.parent / data["run"], [o.removeprefix("run.") for o in of_run])}


def _check_run(path: Path, data: dict[str, Any]) -> None:
    """What variants are made for: branches with names."""
    run = data.get("run")
    if not isinstance(run, dict):
        raise UserError(f"{path}: " + ("key 'run' is missing" if run is None else f"run = {run!r}: must be a section"))
    branches = run.get("branches")
    if not isinstance(branches, list) or not branches or not all(isinstance(b, dict) and "name" in b for b in branches):
        raise UserError(f"{path}: run.branches must be a list of branches, each with a name")
    if not isinstance(run.get("model") or {}, dict):
        raise UserError(f"{path}: run.model = {run['model']!r}: must be a section of keys")
