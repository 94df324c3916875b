"""Run configuration: pydantic models, YAML files, ``key=value`` overrides.

Unknown keys and bad values raise :class:`copd_engine.types.UserError` that names the key, the value and
the nearest right one. Defaults are the paper's where it reports one (arXiv 2604.27083); ``docs/config.md`` shows all.
"""

from copd_engine.config.branch import COLUMNS, BranchConfig, DataConfig, MixtureSource, RewardTerm, SourceConfig
from copd_engine.config.distillation import DistillationConfig
from copd_engine.config.load import build_config, load_config
from copd_engine.config.merge import MergeConfig
from copd_engine.config.model import LoraConfig, MediaConfig, ModelConfig
from copd_engine.config.rollout import RolloutConfig
from copd_engine.config.run import RunConfig
from copd_engine.config.schedule import AdaptiveConfig, DistillationPhase, MopdConfig, ScheduleConfig, StaticOpdConfig
from copd_engine.config.training import (
    DynamicSamplingConfig,
    ImportanceCorrectionConfig,
    ObjectiveConfig,
    OptimConfig,
    ReferenceKlConfig,
)
from copd_engine.config.watch import CheckpointConfig, DiagnosticsConfig, EvalConfig

__all__ = [
    "COLUMNS",
    "AdaptiveConfig",
    "BranchConfig",
    "CheckpointConfig",
    "DataConfig",
    "DiagnosticsConfig",
    "DistillationConfig",
    "DistillationPhase",
    "DynamicSamplingConfig",
    "EvalConfig",
    "ImportanceCorrectionConfig",
    "LoraConfig",
    "MediaConfig",
    "MergeConfig",
    "MixtureSource",
    "ModelConfig",
    "MopdConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "ReferenceKlConfig",
    "RewardTerm",
    "RolloutConfig",
    "RunConfig",
    "ScheduleConfig",
    "SourceConfig",
    "StaticOpdConfig",
    "build_config",
    "load_config",
]
