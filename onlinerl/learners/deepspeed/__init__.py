"""DeepSpeed, ZeRO 0 to 3, on CPU over gloo or on GPUs over NCCL."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from onlinerl import hardware, releases
from onlinerl.errors import ConfigError
from onlinerl.learners.deepspeed.memory import learner_rank
from onlinerl.protocols.learner import LearnerConfig, RankSettings

if TYPE_CHECKING:
    import torch

    from onlinerl.learners.deepspeed.rank import DeepSpeedRank


class DeepSpeed(LearnerConfig):
    """Any number of ranks, which divide as much of the learner's state among them as `zero_stage` says."""

    balances_experts: ClassVar[bool] = True
    adapts: ClassVar[bool] = True
    trains_rewards: ClassVar[bool] = True
    samples_mixtures: ClassVar[bool] = True

    name: str = "deepspeed"
    zero_stage: Literal[0, 1, 2, 3] = 0
    """What the ranks divide among them: 0 nothing, 1 the optimizer's state, 2 also gradients, 3 also weights."""

    @property
    def layout(self) -> str:
        """Stage and dtype."""
        return f"ZeRO-{self.zero_stage}, {self.dtype}"

    def check(self) -> None:
        """Refuse ZeRO-2 of a release that is known to compute wrong gradients with it; see `LearnerConfig.check`."""
        version = releases.installed("deepspeed")
        fault = None if version is None or self.zero_stage != 2 else releases.deepspeed_fault(releases.release(version))
        if fault is not None:
            raise ConfigError(
                f"is 2, and {fault}; {version} is installed on {socket.gethostname()}",
                field="learner.zero_stage",
                fix="install the release that onlinerl is tested with (`make install`) on every machine, or set it to 1 or 3",
            )

    def memory(self, parameters: float, *, critic: float = 0, adapters: float | None = None) -> Mapping[str, float]:
        """Bytes that one rank holds when it holds most, without activations, by what they are for."""
        return learner_rank(self, parameters, critic=critic, adapters=adapters)

    def environment(self, device: str, threads: int) -> dict[str, str]:
        """Environment variables that a rank's process must start with."""
        env = {
            "TOKENIZERS_PARALLELISM": "false",
            "DEEPSPEED_LOG_LEVEL": "WARNING",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "ONLINERL_DIE_WITH_PARENT": "1",
        }
        on_cpu = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(threads), **hardware.keeping_memory()}
        return env | (on_cpu if device == "cpu" else {})

    def rank(self, settings: RankSettings, *, rank: int, store: torch.distributed.TCPStore, address: str) -> DeepSpeedRank:
        """Load the model."""
        from onlinerl.learners.deepspeed.rank import DeepSpeedRank

        return DeepSpeedRank(self, settings, rank=rank, store=store, address=address)
