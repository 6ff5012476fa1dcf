"""The likelihood of responses as a term of a loss on something else."""

from __future__ import annotations

from torch import Tensor

from onlinerl.batch import Batch, LossOutput, Mean, Outputs
from onlinerl.ops.logprobs import lengths
from onlinerl.ops.preference import sequence_logprobs


def with_nll(loss: LossOutput, outputs: Outputs, batch: Batch, coef: float, rows_N: Tensor, weight_N: Tensor) -> LossOutput:
    """The loss plus coef times the sum of weight * -log prob / length of the responses in these rows; the loss itself if `coef` is 0."""
    if not coef:
        return loss
    nll_N = (-sequence_logprobs(outputs, batch) / lengths(batch))[rows_N]
    metrics = loss.metrics | {"chosen_nll": Mean.of(nll_N, weight_N > 0)}
    return LossOutput(total=loss.total + coef * (nll_N * weight_N).sum(), metrics=metrics)
