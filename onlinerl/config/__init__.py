"""Configuration of a run: its sections, how they are read, and what identifies a run."""

from onlinerl.config.identity import changes, digest, fingerprint, flatten, resumable, without_unread
from onlinerl.config.loading import algorithm, dump, load, oracle, pair_builder, parse, resolved
from onlinerl.config.paths import at_home
from onlinerl.config.roles import component
from onlinerl.config.sections import (
    CheckpointConfig,
    ClusterConfig,
    Device,
    EvaluationConfig,
    LedgerConfig,
    MetricsConfig,
    OnlineMergingConfig,
    ReferenceConfig,
    RunConfig,
    SamplingConfig,
    ScheduleConfig,
    Section,
    TrainingConfig,
)
from onlinerl.config.settling import runs_on_cpu, settled
from onlinerl.protocols.engine import EngineConfig
from onlinerl.protocols.learner import LearnerConfig
from onlinerl.protocols.prompts import PromptsConfig
from onlinerl.protocols.transport import TransportConfig

__all__ = [
    "CheckpointConfig",
    "ClusterConfig",
    "Device",
    "EngineConfig",
    "EvaluationConfig",
    "LearnerConfig",
    "LedgerConfig",
    "MetricsConfig",
    "OnlineMergingConfig",
    "PromptsConfig",
    "ReferenceConfig",
    "RunConfig",
    "SamplingConfig",
    "ScheduleConfig",
    "Section",
    "TrainingConfig",
    "TransportConfig",
    "algorithm",
    "at_home",
    "changes",
    "component",
    "digest",
    "dump",
    "fingerprint",
    "flatten",
    "load",
    "oracle",
    "pair_builder",
    "parse",
    "resolved",
    "resumable",
    "runs_on_cpu",
    "settled",
    "without_unread",
]
