"""Optimism: the responses that are likely anyway are made less likely, so that the policy explores others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field
from torch import Tensor

from onlinerl.algorithms.dpo import Dpo
from onlinerl.loss import LossOutput, Mean
from onlinerl.ops.preference import sequence_logprobs
from onlinerl.protocols.reported import Reported

if TYPE_CHECKING:
    from onlinerl.batch import Batch, Outputs


class Optimistic(Dpo):
    """f(z) + optimism * `explored`, per pair. Only the logistic loss is defined with it.

    The sum over tokens gives long exploration responses more of a say; a large `optimism` costs fluency. A subclass says in `items` which
    sequence of a pair the exploration response is (`TrainItem.exploration`).
    """

    metrics = (
        Reported("exploration_logprob", "Log-prob of the exploration response under the policy, which the loss lowers", "nats"),
    )

    optimism: float = Field(0.0, ge=0)
    """The alpha of the paper; 0 leaves the loss of the pair."""

    def explored(self, outputs: Outputs, batch: Batch) -> Tensor:
        """What the loss lowers, of every row [B], in nats."""
        raise NotImplementedError

    def loss(self, outputs: Outputs, batch: Batch) -> LossOutput:
        """Sum over pairs, each with its exploration response.

        Raises:
            ValueError: if a pair has none.
        """
        pairs, rows_P = super().loss(outputs, batch), batch.need("exploration_P")
        bonus_P = self.optimism * self.explored(outputs, batch)[rows_P]
        logprobs_P = sequence_logprobs(outputs, batch)[rows_P]
        return LossOutput(
            total=pairs.total + (bonus_P * batch.weight_P).sum(),
            metrics=pairs.metrics | {"exploration_logprob": Mean.of(logprobs_P)},
        )
