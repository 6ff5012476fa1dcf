"""A loss of the user's own that fails in a rank: what arrives says whose it is, as it does within one process."""

from __future__ import annotations

import pickle

import pytest
import torch

from onlinerl.algorithms.dpo import Dpo
from onlinerl.batch import Batch, LossOutput, Outputs
from onlinerl.errors import LearnerError
from onlinerl.learners._rank import Rank
from onlinerl.types import TrainItem, TrainSequence

ITEM = TrainItem(prompt_id="a", sequences=(TrainSequence(prompt_ids=(1,), response_ids=(2, 3)),) * 2)


def rank_with(loss):
    """A rank that needs no group and no model."""

    class Mine(Dpo):
        def loss(self, outputs: Outputs, batch: Batch) -> LossOutput:
            return loss(outputs)

    rank = Rank.__new__(Rank)
    rank.algorithm, rank.device = Mine(), torch.device("cpu")
    rank._forward = lambda batch: Outputs(logprobs_BT=torch.zeros(batch.mask_BT.shape, requires_grad=True))
    rank._accumulate = lambda total, count: total.backward()
    return rank


def divide(outputs):
    return 1 / 0


@pytest.mark.parametrize(
    ("loss", "cause"),
    [
        (divide, r"Mine\.loss failed: ZeroDivisionError: division by zero\n  in .*test_users_code\.py, line \d+: return 1 / 0"),
        (lambda outputs: 1.0, r"Mine\.loss returned a value of type float instead of a LossOutput"),
        (lambda outputs: LossOutput(total=outputs.logprobs_BT.sum(1)), r"`total` is a tensor of shape \[2\] instead of"),
        (lambda outputs: LossOutput(total=outputs.logprobs_BT.sum().detach()), r"a `total` without gradient .* instead of"),
        (
            lambda outputs: LossOutput(total=outputs.logprobs_BT.sum(), metrics={"mine": 1.0}),
            r"a value of type float as the metric 'mine' instead of",
        ),
    ],
)
def test_a_loss_that_fails_in_a_rank(loss, cause):
    runtime = pytest.importorskip("onlinerl.cluster.runtime")
    exceptions = pytest.importorskip("ray.exceptions")
    with pytest.raises(LearnerError, match=cause) as caught:
        rank_with(loss)._backward([[ITEM]], 1)
    travelled = pickle.loads(pickle.dumps(caught.value))
    arrived = runtime.explained(exceptions.RayTaskError("step", "traceback", travelled), "learner rank 0", "step", LearnerError)
    assert type(arrived) is LearnerError
    assert arrived.field == "algorithm.name"
    assert arrived.cause == f"learner rank 0: {caught.value.cause}"
    assert "onlinerl resume" in str(arrived.fix)


def test_a_device_that_is_full_is_not_the_fault_of_the_loss():
    def full(outputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        rank_with(full)._backward([[ITEM]], 1)


def test_a_loss_that_is_right_is_trained():
    totals = rank_with(lambda outputs: LossOutput(total=outputs.logprobs_BT.sum() + 2))._backward([[ITEM]], 1)
    assert totals["loss"][0] == 2
