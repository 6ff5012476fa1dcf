"""The likelihood of responses as a term of a loss on something else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from torch import Tensor

from onlinerl.loss import LossOutput, Mean
from onlinerl.ops.logprobs import lengths
from onlinerl.ops.preference import sequence_logprobs

if TYPE_CHECKING:
    from onlinerl.batch import Batch, Outputs


def with_nll(loss: LossOutput, outputs: Outputs, batch: Batch, coef: float, rows_N: Tensor, weight_N: Tensor) -> LossOutput:
    """The loss plus coef times the sum of weight * -log prob / length of the responses in these rows; the loss itself if `coef` is 0."""
    if not coef:
        return loss
    nll_N = (-sequence_logprobs(outputs, batch) / lengths(batch))[rows_N]
    metrics = loss.metrics | {"chosen_nll": Mean.of(nll_N, weight_N > 0)}
    return LossOutput(total=loss.total + coef * (nll_N * weight_N).sum(), metrics=metrics)


def with_pair_nll(
    loss: LossOutput,
    outputs: Outputs,
    batch: Batch,
    coef: float,
    weight_P: Tensor,
    norm: Literal["per_token", "batch_tokens", "sum"],
    *,
    of_chosen: bool,
) -> LossOutput:
    """The loss plus the sum over pairs of weight * coef * -log prob of what is imitated beside each.

    Args:
        loss: of the micro-batch, a sum.
        outputs: of the policy.
        batch: the micro-batch.
        coef: price of a nat.
        weight_P: of each pair.
        norm: whether a log-prob is divided by its number of tokens, by that of the iteration, or not at all.
        of_chosen: whether the chosen response is imitated; else the stored answer.

    Raises:
        ValueError: if the batch does not say what is imitated, or how many tokens the iteration has.
    """
    nll_B = -sequence_logprobs(outputs, batch)
    rows_P = batch.pairs_P2[:, 0] if of_chosen and batch.nll_P is None else batch.need("nll_P")
    mean_P = (nll_B / lengths(batch))[rows_P]
    nll_P = mean_P if norm == "per_token" else nll_B[rows_P]
    nll_P = coef * (nll_P / batch.need("nll_tokens_G") if norm == "batch_tokens" else nll_P)
    metrics = loss.metrics | {"chosen_nll" if of_chosen else "answer_nll": Mean.of(mean_P)}
    return LossOutput(total=loss.total + (nll_P * weight_P).sum(), metrics=metrics)
