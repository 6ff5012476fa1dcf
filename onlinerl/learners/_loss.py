"""Calling the algorithm's loss, which may be the user's own: it returns what it must, or the error says what it returned."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from onlinerl import users_code
from onlinerl.batch import Batch, Outputs
from onlinerl.errors import LearnerError
from onlinerl.loss import LossOutput, Mean
from onlinerl.ops.logprobs import masked
from onlinerl.ops.ratios import k3
from onlinerl.protocols.algorithm import Algorithm

WANTED = "a LossOutput whose `total` is a tensor without axes, the sum over units"


@contextmanager
def called(algorithm: Algorithm, method: str) -> Iterator[None]:
    """Around a call of a method that works on tensors.

    Raises:
        LearnerError: naming it, in place of what it raises, unless the device is full.
    """
    try:
        with users_code.calling(algorithm, method):
            yield
    except LearnerError as error:
        if isinstance(error.__cause__, torch.OutOfMemoryError):  # not the fault of the formula
            raise error.__cause__ from None
        raise


def loss_of(algorithm: Algorithm, outputs: Outputs, batch: Batch, *, trained: bool = False) -> LossOutput:
    """The loss of one micro-batch.

    Args:
        algorithm: whose loss.
        outputs, batch: what it is given.
        trained: whether a backward pass follows, for which it must have a gradient.

    Raises:
        LearnerError: if it raises or returns something else.
    """
    with called(algorithm, "loss"):
        loss: object = algorithm.loss(outputs, batch)
    if not isinstance(loss, LossOutput):
        raise users_code.wrong_result(algorithm, "loss", shown(loss), WANTED)
    if not isinstance(loss.total, Tensor) or loss.total.dim():
        raise users_code.wrong_result(algorithm, "loss", f"a LossOutput whose `total` is {shown(loss.total)}", WANTED)
    if trained and not loss.total.requires_grad:
        got = "a `total` without gradient (detached, or made from numbers)"
        raise users_code.wrong_result(algorithm, "loss", got, "one calculated from `outputs`")
    for name, mean in loss.metrics.items():
        if not (isinstance(mean, Mean) and isinstance(mean.total, Tensor) and isinstance(mean.count, Tensor)):
            raise users_code.wrong_result(algorithm, "loss", f"{shown(mean)} as the metric {name!r}", "Mean.of(TENSOR)")
    return loss


def kl_old(outputs: Outputs, batch: Batch) -> dict[str, Mean]:
    """The metric of how far the policy is from `old_logprobs`, by k3: KL(old || policy) of tokens that the old one would sample.

    Raises:
        ValueError: if the batch carries none.
    """
    mask_BT = batch.sampled_BT
    return {"kl_old": Mean.of(k3(masked(outputs.logprobs_BT - batch.need("old_logprobs_BT"), mask_BT)), mask_BT)}


def shown(value: object) -> str:
    """What a method returned, for a message."""
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else f"a value of type {type(value).__name__}"
