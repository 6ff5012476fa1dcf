"""What a configuration means where it is used: which files it names, and what it leaves to the machine."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from onlinerl import hardware
from onlinerl.config.loading import located
from onlinerl.config.paths import at_home
from onlinerl.config.sections import AnchorsConfig, LedgerConfig, RunConfig
from onlinerl.protocols.engine import EngineConfig
from onlinerl.protocols.learner import LearnerConfig

T = TypeVar("T", EngineConfig, LearnerConfig)


def settled(config: RunConfig) -> RunConfig:
    """The same configuration with absolute paths and with the dtypes decided, so that it means the same in every working directory and
    on every machine. A run is checked, started and stored with this one: what it computes must not depend on where it is resumed.
    """
    model = at_home(config.model, "model")
    # On a cluster of CPUs this machine stands for the others.
    dtype = "float32" if runs_on_cpu(config) and not hardware.computes_bfloat16() else "bfloat16"
    return config.model_copy(
        update={
            "model": str(model.absolute()) if model.is_dir() else config.model,  # otherwise perhaps a hub id
            "runs": str(at_home(config.runs, "runs").absolute()),
            "ledger": _at_home(config.ledger),
            "oracle": located(config, [Path()]).oracle,
            "prompts": config.prompts.located(),
            "anchors": _located(config.anchors),
            "engine": _decided(config.engine, dtype),
            "learner": _decided(config.learner, dtype),
        }
    )


def _at_home(ledger: LedgerConfig) -> LedgerConfig:
    if ledger.reuse_from is None:
        return ledger
    return ledger.model_copy(update={"reuse_from": str(at_home(ledger.reuse_from, "ledger.reuse_from").absolute())})


def _located(anchors: AnchorsConfig | None) -> AnchorsConfig | None:
    path = None if anchors is None else at_home(anchors.data, "anchors.data")
    if anchors is None or path is None or not path.exists():  # perhaps a hub id
        return anchors
    return anchors.model_copy(update={"data": str(path.absolute())})


def _decided(section: T, dtype: str) -> T:
    return section.model_copy(update={"dtype": dtype}) if section.dtype == "auto" else section


def runs_on_cpu(config: RunConfig) -> bool:
    """Whether it is known already."""
    device, alone = config.cluster.device, config.cluster.address is None
    return device == "cpu" or (device == "auto" and alone and not hardware.has_gpu())
