"""The config: what is wrong is named, with what is right; what is right survives the way to YAML and back."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from copd_engine import config as config_module
from copd_engine.config import (
    BranchConfig,
    DataConfig,
    DistillationPhase,
    MergeConfig,
    RunConfig,
    ScheduleConfig,
    SourceConfig,
    build_config,
    load_config,
)
from copd_engine.study.config import load_study
from copd_engine.study.plan import units_of
from copd_engine.types import UserError


def minimal() -> dict[str, Any]:
    return {"branches": [{"name": name, "data": {"domain": name}} for name in ("text", "image", "video")]}


def with_value(key: str, value: Any) -> dict[str, Any]:
    """A good config with ``value`` at the dotted ``key``."""
    data: Any = minimal()
    node = data
    *parents, last = key.split(".")
    for part, following in zip(parents, key.split(".")[1:], strict=True):
        empty: Any = [{}] if following.isdigit() else {}
        node = node[int(part)] if isinstance(node, list) else node.setdefault(part, empty)
    if isinstance(node, list):
        node[int(last)] = value
    else:
        node[last] = value
    return data


def error_of(data: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        build_config(data)
    message = str(caught.value)
    assert message.startswith("config: ")
    assert "\n" not in message
    assert "pydantic" not in message
    return message.removeprefix("config: ")


def sections(model: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Every section of the config with its dotted key; lists of sections by their first."""
    yield prefix, model
    for name, field in model.model_fields.items():
        of_list = get_origin(field.annotation) is tuple
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from sections(kind, f"{prefix}{name}.0." if of_list else f"{prefix}{name}.")


def test_every_section_is_visited() -> None:
    every = {value for value in vars(config_module).values() if isinstance(value, type)}
    wanted = {c for c in every if issubclass(c, BaseModel) and c is not BaseModel and not c.__name__.startswith("_")}
    wanted -= {SourceConfig, DistillationPhase}  # bases of two sections each, none themselves
    assert {model for _, model in sections()} == wanted


@pytest.mark.parametrize(
    ("key", "right"), [(f"{prefix}{name}", name) for prefix, model in sections() for name in model.model_fields]
)
def test_an_unknown_key_at_any_depth_names_the_nearest_one(key: str, right: str) -> None:
    """Every key misspelt by a doubled letter; a required one that is then missing too must not hide that."""
    wrong = f"{key}{key[-1]}"
    data = with_value(wrong, "x")
    parent: Any = data
    for part in key.split(".")[:-1]:
        parent = parent[int(part)] if isinstance(parent, list) else parent[part]
    parent.pop(right, None)
    assert error_of(data) == f"unknown key '{wrong}' (did you mean {right!r}?)"


def test_an_unknown_key_far_from_all_lists_the_known_ones() -> None:
    known = "(known: density, method, scale, seed, weights)"
    assert error_of(with_value("merge.zzz", 1)) == f"unknown key 'merge.zzz' {known}"


@pytest.mark.parametrize(
    ("key", "value", "right"),
    [
        ("schedule.cycles", 0, "greater than 0"),
        ("schedule.cycles", 2.5, "valid integer"),
        ("schedule.cycles", True, "should be a number"),
        ("schedule.cycles", "two", "valid integer"),
        ("schedule.rl_steps", -1, "greater than or equal to 0"),
        ("schedule.cross_ratio", 0, "greater than 0"),
        (
            "schedule.topology",
            "hubb",
            "must be hub, full, ring (did you mean 'hub'?) or a list of [student, teacher] pairs",
        ),
        ("schedule.topology", [["text"]], "or a list of [student, teacher] pairs"),
        ("rollout.group_size", 1, "greater than or equal to 2"),
        ("rollout.temperature", 0, "greater than 0"),
        ("rollout.engine", "embeded", "must be one of auto, embedded, sglang (did you mean 'embedded'?)"),
        ("objective.clip_low", 1, "less than 1"),
        ("objective.std_mode", "pop", "must be one of population, sample, none"),
        ("optim.lr", "fast", "valid number"),
        ("optim.lr", float("inf"), "finite number"),
        ("optim.lr", float("nan"), "finite number"),
        ("optim.lr", True, "should be a number"),
        ("optim.betas.0", 1.0, "less than 1"),
        ("optim.weight_decay", -0.1, "greater than or equal to 0"),
        ("method", "coopd", "must be one of copd, expert, mixed, static_opd, mopd (did you mean 'copd'?)"),
        ("baselines", ["copd"], "must be one of expert, mixed"),
        ("merge.method", "tie", "must be one of mean, weighted, task_arithmetic, ties, dare, dare_ties, search"),
        ("model.dtype", "float16", "must be one of float32, bfloat16 (did you mean 'bfloat16'?)"),
        ("branches.1.beta", -1, "greater than or equal to 0"),
        ("branches.1.name", "an image", "must be letters, digits, _ and -"),
        (
            "branches.1.data.source",
            "json",
            "must be one of testbed, jsonl, parquet, reasoning_gym, mixture (did you mean 'jsonl'?)",
        ),
        ("branches.1.data.size", 0, "greater than 0"),
        ("branches", [], "must not be empty"),
        ("branches", {"text": {}}, "must be a list"),
        ("schedule", None, "must be a section of keys"),
        ("seed", -1, "greater than or equal to 0"),
        ("name", 7, "valid string"),
        ("name", "", "folder name"),
        ("name", "..", "folder name"),
        ("name", "a/b", "folder name"),
        ("tensorboard", "maybe", "valid boolean"),
    ],
)
def test_a_bad_value_names_key_value_and_what_is_right(key: str, value: Any, right: str) -> None:
    data = with_value("optim.betas", [0.9, 0.9]) if key.startswith("optim.betas") else minimal()
    node: Any = data
    *parents, last = key.split(".")
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
    node[int(last) if isinstance(node, list) else last] = value
    message = error_of(data)
    named = key if not isinstance(value, list) or key != "baselines" else f"{key}.0"
    shown = value if named == key else value[0]
    assert message.startswith(f"{named} = {shown!r}: ")
    assert right in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": {"hub": "txt"}}, "schedule.hub: no branch is named 'txt' (did you mean 'text'?)"),
        (
            {"schedule": {"topology": [["text", "image"], ["vidio", "text"]]}},
            "schedule.topology: no branch is named 'vidio' (did you mean 'video'?)",
        ),
        ({"schedule": {"topology": "ring", "hub": "text"}}, "schedule.hub needs schedule.topology 'hub'"),
        ({"schedule": {"topology": [["text", "text"]]}}, "schedule.topology: branch 'text' cannot teach itself"),
        (
            {"merge": {"method": "weighted", "weights": {"text": 1, "image": 1, "audio": 1}}},
            "merge.weights: no branch is named 'audio' (known: image, text, video)",
        ),
        (
            {"merge": {"method": "weighted", "weights": {"text": 1}}},
            "merge.method 'weighted' needs merge.weights for every branch: text, image, video",
        ),
        (
            {"merge": {"method": "weighted"}},
            "merge.method 'weighted' needs merge.weights for every branch: text, image, video",
        ),
        (
            {"merge": {"method": "weighted", "weights": {"text": 0, "image": 0, "video": 0}}},
            "merge.weights are all 0: at least one must be above 0",
        ),
        (
            {"merge": {"method": "task_arithmetic", "density": 0.5}},
            "merge: method 'task_arithmetic' takes no 'density'; ties, dare, dare_ties do",
        ),
        ({"merge": {"weights": {"text": 1, "image": 1, "video": 1}}}, "merge.weights needs merge.method 'weighted'"),
        ({"baselines": ["expert", "expert"]}, "baselines: 'expert' would be trained twice"),
        ({"method": "expert", "baselines": ["expert"]}, "baselines: 'expert' would be trained twice"),
        (
            {"schedule": {"rl_steps": 0, "opd_steps": 0}},
            "schedule: rl_steps and opd_steps are both 0: a cycle must have at least one step",
        ),
        ({"branches": [{"name": "text"}]}, "key 'branches.0.data' is missing"),
        ({"branches": [{"name": "a", "data": {}}]}, "branches.0.data: source 'testbed' needs 'domain'"),
        (
            {"branches": [{"name": "a", "data": {"source": "jsonl"}}]},
            "branches.0.data: source 'jsonl' needs 'path'",
        ),
        (
            {"branches": [{"name": "a", "data": {"domain": "text"}}] * 2},
            "branch name 'a' is used twice",
        ),
    ],
)
def test_parts_that_do_not_fit_together(changes: dict[str, Any], message: str) -> None:
    assert error_of({**minimal(), **changes}) == message


def test_a_branch_named_as_the_mean_is_refused() -> None:
    data = minimal()
    data["branches"][0]["name"] = "average"
    assert "'average' is taken" in error_of(data)


def test_a_long_bad_value_is_cut() -> None:
    assert len(error_of(with_value("seed", "9" * 5000 + "x"))) < 250


# Files and overrides


def write(folder: Path, text: str | bytes) -> Path:
    file = folder / "config.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config .*nothing\.yaml does not exist"):
        load_config(tmp_path / "nothing.yaml")
    with pytest.raises(UserError, match="does not exist"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "a: [1, 2",
        "a: b: c",
        "\tname: x",
        b"name: \xff\xfe\x00",
        "day: 2026-13-45",
        "{[1]: 2}",
        "name: !!python/object:x {}",
    ],
)
def test_broken_yaml_is_one_line(tmp_path: Path, text: str | bytes) -> None:
    file = write(tmp_path, text)
    with pytest.raises(UserError) as caught:
        load_config(file)
    assert str(caught.value).startswith(f"config {file} is not valid YAML: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "kind"), [("", "NoneType"), ("- a", "list"), ("just text", "str")])
def test_a_file_that_is_no_mapping(tmp_path: Path, text: str, kind: str) -> None:
    with pytest.raises(UserError, match=f"must be a mapping of keys to values, it is {kind}"):
        load_config(write(tmp_path, text))


def load(tmp_path: Path, *overrides: str) -> RunConfig:
    return load_config(write(tmp_path, yaml.safe_dump(minimal())), list(overrides))


def test_overrides(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        "schedule.cycles=7",
        "optim.lr=1e-4",
        "optim.betas=[0.8, 1e-1]",
        "branches.1.beta=0.5",
        "branches.2.data.task_config.rate=2E+3",
        "schedule.topology=[[text, image]]",
        "schedule.opd_steps=3",
        "tensorboard=true",
        "name='1e5'",
        "model.path=a=b",
        "branches.0.data.instruction=''",
        "branches.0.data.verifier=",
    )
    assert config.schedule == ScheduleConfig(cycles=7, topology=[("text", "image")], opd_steps=3)
    assert config.optim.lr == 1e-4
    assert config.optim.betas == (0.8, 0.1)
    assert [branch.beta for branch in config.branches] == [1.0, 0.5, 1.0]
    assert config.branches[2].data.task_config == {"rate": 2000.0}
    assert (config.tensorboard, config.name, config.model.path) == (True, "1e5", "a=b")


def test_a_later_override_wins(tmp_path: Path) -> None:
    assert load(tmp_path, "seed=1", "seed=2").seed == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("schedule.cycles", "override 'schedule.cycles' must look like key=value, e.g. schedule.cycles=2"),
        ("=3", "override '=3' must look like key=value"),
        ("branches.3.beta=1", "'3' must be a number from 0 to 2"),
        ("branches.text.beta=1", "'text' must be a number from 0 to 2"),
        ("branches.-1.beta=1", "'-1' must be a number from 0 to 2"),
        ("branches.².beta=1", "'²' must be a number from 0 to 2"),
        ("branches.0.name.x=1", "branches.0.name is a value, not a section"),
        ("seed=[1", "override 'seed=[1': the value is not valid YAML"),
        ("name=2026-13-45", "the value is not valid YAML"),
        ("schedule.cycle=2", "unknown key 'schedule.cycle' (did you mean 'cycles'?)"),
        ("shedule.cycles=2", "unknown key 'shedule' (did you mean 'schedule'?)"),
        ("branches.0.data.domian=text", "unknown key 'branches.0.data.domian' (did you mean 'domain'?)"),
        ("optim.lr=.inf", "optim.lr = inf: input should be a finite number"),
    ],
)
def test_bad_overrides(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, override)
    assert message in str(caught.value)


def test_the_shipped_configs_are_valid() -> None:
    files = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
    assert files
    studies = [file for file in files if "seeds:" in file.read_text()]
    for file in files:
        if file in studies:
            units_of(load_study(file))
        else:
            load_config(file)
    assert [file.name for file in studies] == ["testbed.yaml"]


# Any valid config, to YAML and back

finite = st.floats(min_value=1e-12, max_value=1e12, allow_nan=False)
counts = st.integers(min_value=1, max_value=10**12)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | finite | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
folder_names = st.from_regex(r"[A-Za-z0-9_ .:#-]*[A-Za-z0-9]", fullmatch=True)
data_configs = st.builds(
    DataConfig,
    source=st.just("testbed"),
    domain=texts,
    path=st.none() | folder_names.map(Path),
    task_config=st.dictionaries(texts, values, max_size=3),
    instruction=texts,
    verifier=st.none() | texts,
    size=counts,
)


@st.composite
def run_configs(draw: st.DrawFn) -> RunConfig:
    names = draw(st.lists(st.from_regex(r"[a-zA-Z0-9_-]{1,8}", fullmatch=True), min_size=1, max_size=4, unique=True))
    names = [name for name in names if name not in ("average", "base", "mixed", "student")] or ["a"]
    branches = tuple(BranchConfig(name=n, data=draw(data_configs), beta=draw(finite)) for n in names)
    edges = [(a, b) for a in names for b in names if a != b]
    topologies = st.sampled_from(["hub", "full", "ring"]) | st.lists(st.sampled_from(edges) if edges else st.nothing())
    topology = draw(topologies)
    weights = {name: draw(finite) for name in names}
    return RunConfig(
        name=draw(folder_names),
        seed=draw(counts),
        output_dir=Path(draw(folder_names)),
        branches=branches,
        schedule=ScheduleConfig(
            cycles=draw(counts),
            topology=topology,
            hub=draw(st.none() | st.sampled_from(names)) if topology == "hub" else None,
            native_share=draw(st.floats(0, 2)),
            beta_range=(draw(st.floats(0.1, 1)), draw(st.floats(1, 9))),
        ),
        static_opd={"student": draw(st.none() | st.sampled_from(names)), "experts": draw(st.none() | folder_names)},
        mopd={"teachers": draw(st.none() | st.just(tuple(names))), "opd_steps": draw(st.none() | counts)},
        merge=draw(st.sampled_from([MergeConfig(), MergeConfig(method="weighted", weights=weights)])),
        optim={"lr": draw(finite), "betas": (draw(st.floats(0, 0.99)), 0.999)},
    )


@given(config=run_configs())
def test_a_config_is_the_same_after_yaml(tmp_path_factory: pytest.TempPathFactory, config: RunConfig) -> None:
    file = tmp_path_factory.mktemp("config") / "config.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
    assert load_config(file) == config


def test_building_a_config_leaves_its_input_alone() -> None:
    data = minimal()
    before = copy.deepcopy(data)
    build_config(data)
    assert data == before


# Data, rewards, adapters

MIXTURE = {
    "source": "mixture",
    "sources": [
        {"source": "parquet", "path": "a.parquet", "weight": 2.5, "columns": {"answer": "reward_model.ground_truth"}},
        {"source": "testbed", "domain": "text", "on_error": "skip"},
        {"source": "jsonl", "path": "b.jsonl", "pass_rate": [0.1, 0.9], "columns": {"pass_rate": "difficulty"}},
    ],
}
REWARD = [
    {"kind": "verifier", "weight": 0.9, "name": "math"},
    {"kind": "format", "weight": 0.1, "pattern": "<think>.*</think>.*"},
    {"kind": "overlong", "buffer_tokens": 16},
]


def test_mixtures_rewards_and_adapters_are_the_same_after_yaml(tmp_path: Path) -> None:
    data = minimal()
    data["branches"][0] |= {"data": MIXTURE, "reward": REWARD}
    data["model"] = {"lora": {"rank": 4, "target_modules": ["q_proj", "v_proj"]}, "dtype": "bfloat16", "liger": False}
    data["media"] = {"video_fps": 0.5, "image_max_pixels": 1000}
    config = build_config(data)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
    assert load_config(file) == config
    assert [source.weight for source in config.branches[0].data.sources] == [2.5, 1.0, 1.0]
    assert config.branches[1].reward[0].kind == "verifier"


@pytest.mark.parametrize(
    ("key", "value", "right"),
    [
        ("branches.0.data", {"source": "mixture"}, "source 'mixture' needs 'sources'"),
        ("branches.0.data.sources", MIXTURE["sources"], "source 'mixture' needs 'sources', and only it takes them"),
        ("branches.0.data", {"source": "parquet"}, "source 'parquet' needs 'path'"),
        ("branches.0.data.columns", {"promt": "x"}, "columns: unknown field 'promt' (did you mean 'prompt'?)"),
        ("branches.0.data.pass_rate", [0.9, 0.1], "must be [low, high] with 0 <= low <= high <= 1"),
        ("branches.0.data.pass_rate", [0, 3], "must be [low, high] with 0 <= low <= high <= 1"),
        ("branches.0.data.on_error", "skp", "must be one of raise, skip (did you mean 'skip'?)"),
        ("branches.0.reward", [], "must not be empty"),
        ("branches.0.reward", [{"kind": "format"}], "kind 'format' needs 'pattern'"),
        ("branches.0.reward", [{"kind": "format", "pattern": "("}], "pattern '(' is no regular expression"),
        ("branches.0.reward", [{"kind": "overlong"}], "kind 'overlong' needs 'buffer_tokens'"),
        ("branches.0.reward", [{"kind": "verifier", "pattern": "x"}], "kind 'verifier' takes no 'pattern'"),
        ("model.lora", {"rank": 0}, "model.lora.rank = 0"),
        ("optim.max_length", 16_384, "optim.max_length = 16384: must be above rollout.max_prompt_tokens = 16384"),
        ("media.video_max_frames", 1, "greater than or equal to 2"),
    ],
)
def test_data_rewards_and_limits_that_do_not_fit(key: str, value: Any, right: str) -> None:
    assert right in error_of(with_value(key, value))
