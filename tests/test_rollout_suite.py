"""The embedded engine in the suite of all engines."""

from __future__ import annotations

import pytest

from copd_engine.config import MediaConfig, ModelConfig
from copd_engine.models.loading import load_model
from copd_engine.rollout.embedded import EmbeddedEngine
from tests.helpers import prompts_of_all_domains
from tests.rollout_suite import RolloutSuite, Subject


@pytest.fixture(scope="module")
def subject() -> Subject:
    policy, encoder = load_model(ModelConfig(path="testbed"), MediaConfig(), "cpu")
    policies = {"a": policy.clone(), "b": policy.clone()}
    subject = Subject(EmbeddedEngine(policies, encoder), policies, encoder, prompts_of_all_domains(encoder))
    subject.change("a", 11)
    subject.change("b", 12)
    return subject


class TestEmbedded(RolloutSuite):
    pass
