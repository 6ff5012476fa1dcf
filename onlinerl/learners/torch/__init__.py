"""Plain torch: no DeepSpeed. Every rank keeps all weights; gradients are summed over ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from onlinerl import hardware
from onlinerl.protocols.learner import LearnerConfig, RankSettings

if TYPE_CHECKING:
    import torch

    from onlinerl.learners.torch.rank import TorchRank


class Torch(LearnerConfig):
    """One rank, or several that each hold the whole model: the learner with the fewest parts, for models that fit."""

    merges: ClassVar[bool] = True
    balances_experts: ClassVar[bool] = True
    adapts: ClassVar[bool] = True
    trains_rewards: ClassVar[bool] = True
    samples_mixtures: ClassVar[bool] = True

    name: str = "torch"

    def memory(self, parameters: float, *, critic: float = 0, adapters: float | None = None) -> Mapping[str, float]:
        """Bytes that one rank holds when it holds most, without activations, by what they are for."""
        low = self.dtype == "bfloat16"
        weight, networks = (2 if low else 4), parameters + critic
        trained = networks if adapters is None else adapters
        return {
            "weights": weight * networks
            + (0 if adapters is None else 2 * weight * adapters),  # the trained ones, and an older iterate's
            "gradients": (4 + weight * low) * trained,  # summed in fp32; a micro-batch's own are in the dtype of the weights
            "optimizer": (8 + 4 * low) * trained,
            "reference": weight * parameters if adapters is None else 0,  # else it is the policy with its adapters off
        }

    def environment(self, device: str, threads: int) -> dict[str, str]:
        """Environment variables that a rank's process must start with."""
        env = {"TOKENIZERS_PARALLELISM": "false", "VLLM_LOGGING_LEVEL": "WARNING", "ONLINERL_DIE_WITH_PARENT": "1"}
        return env | ({"OMP_NUM_THREADS": str(threads), **hardware.keeping_memory()} if device == "cpu" else {})

    def rank(self, settings: RankSettings, *, rank: int, store: torch.distributed.TCPStore, address: str) -> TorchRank:
        """Load the model."""
        from onlinerl.learners.torch.rank import TorchRank

        return TorchRank(self, settings, rank=rank, store=store, address=address)
