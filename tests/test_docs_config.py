"""docs/config.md shows every key of a config with the default that it has."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from copd_engine.config import BranchConfig, DataConfig, RunConfig

PAGE = Path(__file__).parents[1] / "docs" / "config.md"


def test_every_key_stands_there_with_its_default() -> None:
    shown: dict[str, Any] = {}
    for block in re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL):
        shown |= yaml.safe_load(block)
    (branch,) = shown.pop("branches")
    data = DataConfig.model_construct()  # a source without its path is no valid one, but has the defaults
    plain = RunConfig(branches=(BranchConfig(name="text", data=DataConfig(domain="text")),))
    expected = plain.model_dump(mode="json")
    (expected_branch,) = expected.pop("branches")
    expected_branch["data"] = data.model_dump(mode="json")
    assert branch == expected_branch
    assert shown == expected


def test_the_sections_that_are_off_by_default_are_shown_as_they_are_built() -> None:
    text = PAGE.read_text()
    branches = [{"name": name, "data": {"domain": "text"}} for name in ("a", "b")]
    for key in ("lora", "adaptive"):
        example = yaml.safe_load(re.search(rf"{key}: null +# ({{.*}})", text)[1])  # type: ignore[index]
        section = {"lora": "model", "adaptive": "schedule"}[key]
        found = RunConfig.model_validate({"branches": branches, section: {key: example}})
        assert getattr(getattr(found, section), key).model_dump(mode="json") == example
