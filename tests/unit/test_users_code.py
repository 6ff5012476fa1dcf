"""A loss of the user's own that fails in a rank: what arrives says whose it is, as it does within one process."""

from __future__ import annotations

import pickle

import pytest
import torch

from onlinerl.algorithms.dpo import Dpo
from onlinerl.batch import Batch, Outputs
from onlinerl.config.sections import TrainingConfig
from onlinerl.errors import LearnerError
from onlinerl.learners._rank import Rank
from onlinerl.loss import LossOutput
from onlinerl.ops.whole_step import WholeStep
from onlinerl.types import TrainItem, TrainSequence

ITEM = TrainItem(prompt_id="a", sequences=(TrainSequence(prompt_ids=(1,), response_ids=(2, 3)),) * 2)


def rank_with(loss):
    """A rank that needs no group and no model."""

    class Mine(Dpo):
        def loss(self, outputs: Outputs, batch: Batch) -> LossOutput:
            return loss(outputs)

    rank = Rank.__new__(Rank)
    rank.algorithm, rank.device, rank.training = Mine(), torch.device("cpu"), TrainingConfig()
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
    totals, _ = rank_with(lambda outputs: LossOutput(total=outputs.logprobs_BT.sum() + 2))._backward([[ITEM]], 1)
    assert totals["loss"][0] == 2


def whole_step_rank(**methods):
    """A rank whose loss is one of the whole step, with methods of the user's own."""
    plain = {
        "initial_state": lambda self: {"seen": 0.0},
        "values": lambda self, outputs, batch: outputs.logprobs_BT.sum(dim=1),
        "step_loss": lambda self, rows: rows.values_N.sum(),
        "next_state": lambda self, rows: {"seen": rows.state["seen"] + 1},
    }
    rank = rank_with(None)
    rank.algorithm = type("Mine", (WholeStep,), plain | methods)()
    rank._state = rank.algorithm.initial_state()
    rank._gather = lambda own: ([own], 0)
    return rank


def of_one(self, *arguments):
    return 1 / 0


@pytest.mark.parametrize("method", ["values", "facts", "step_loss", "next_state"])
def test_a_loss_of_a_whole_step_that_fails_in_the_first_pass(method):
    with pytest.raises(LearnerError) as caught:
        whole_step_rank(**{method: of_one})._backward([[ITEM]], 1)
    assert caught.value.field == "algorithm.name"
    assert caught.value.cause.startswith(f"Mine.{method} failed: ZeroDivisionError: division by zero\n  in ")
    assert caught.value.cause.endswith(": return 1 / 0")


@pytest.mark.parametrize(
    ("method", "returned", "cause"),
    [
        ("values", 1.0, r"Mine\.values returned a value of type float instead of a number for each of 2 rows"),
        ("values", torch.zeros(3), r"Mine\.values returned a tensor of shape \[3\] instead of a number for each of 2 rows"),
        ("next_state", None, r"Mine\.next_state returned None instead of {name: float}"),
        ("next_state", {"seen": torch.ones(())}, r"Mine\.next_state returned {'seen': tensor\(1\.\)} instead of {name: float}"),
        ("next_state", {"seen": float("inf")}, r"Mine\.next_state returned seen = inf instead of finite numbers"),
    ],
)
def test_a_loss_of_a_whole_step_that_returns_something_else(method, returned, cause):
    with pytest.raises(LearnerError, match=cause):
        whole_step_rank(**{method: lambda self, *arguments: returned})._backward([[ITEM]], 1)


def test_a_loss_of_a_whole_step_that_is_right_is_trained():
    rank = whole_step_rank(step_loss=lambda self, rows: rows.values_N.sum() + 2)
    assert rank._backward([[ITEM]], 1)[0]["loss"][0] == 2
    assert (rank._state, rank._next_state) == ({"seen": 0.0}, {"seen": 1.0})


def test_a_device_that_is_full_is_not_the_fault_of_a_first_pass():
    def full(self, *arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        whole_step_rank(values=full)._backward([[ITEM]], 1)
