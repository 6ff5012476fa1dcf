"""What a loss of a whole step keeps: what advances it and what does not, and its way through a checkpoint."""

from __future__ import annotations

import math

import pytest
import torch

from onlinerl.algorithms.bco import Bco
from onlinerl.algorithms.kto import Kto
from onlinerl.batch import Outputs
from onlinerl.config.sections import TrainingConfig
from onlinerl.errors import LearnerError
from onlinerl.learners import _rank
from onlinerl.learners._rank import Rank
from onlinerl.learners._whole_step import FILE, load_state, save_state
from onlinerl.learners.toy import ToyLearner
from onlinerl.types import TrainItem, TrainSequence


def item(token: int, win_rate: float, score: float = 0.0) -> TrainItem:
    import numpy as np

    zeros = np.zeros(2, np.float32)
    response = TrainSequence(
        prompt_ids=(1,), response_ids=(token, 3), win_rate=win_rate, score=score, reference_logprobs=zeros - 1.0
    )
    return TrainItem(prompt_id="a", sequences=(response,))


STEP = [item(0, 0.9), item(1, 0.1)]


class Stub(Rank):
    """A rank that needs no group and no model: each response has the log-prob `said` per token."""

    def __init__(self, *, norm: float = 1.0) -> None:
        self.algorithm, self.device = Bco(beta=1.0), torch.device("cpu")
        self.needs, self.training, self.rank, self.world_size, self.said, self.norm = (
            self.algorithm.needs,
            TrainingConfig(),
            0,
            1,
            0.0,
            norm,
        )
        self._state = self._next_state = self.algorithm.initial_state()

    _groups = ()

    def _gather(self, own):
        return [own], 0

    def _forward(self, batch):
        return Outputs(logprobs_BT=torch.full(batch.mask_BT.shape, self.said, requires_grad=True))

    def _accumulate(self, total, count):
        self.finite = math.isfinite(count)

    def _apply(self):
        return self.norm, self.finite and math.isfinite(self.norm)

    def _reduce(self, totals, count):
        return {"loss": 0.0}

    def _write(self, path):
        return []

    def _read(self, path):
        pass


@pytest.fixture
def rank(monkeypatch):
    monkeypatch.setattr(_rank.dist, "barrier", lambda: None)
    return Stub()


def test_a_step_advances_it_and_reports_it(rank):
    first = rank.step([STEP], 2, 0.1)
    rank.said = 1.0
    second = rank.step([STEP], 2, 0.1)
    # D = 2 tokens of 1 nat, then of 2
    assert (first["baseline"], second["baseline"]) == (2.0, 3.0)
    assert rank._state == {"baseline": 3.0, "steps": 2.0}


def test_a_gradient_alone_does_not(rank):
    rank._backward([STEP], 2)
    assert rank._state == {"baseline": 0.0, "steps": 0.0}


@pytest.mark.parametrize(("said", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan)])
def test_a_step_that_is_skipped_leaves_the_state_before_it(rank, said, norm):
    rank.step([STEP], 2, 0.1)
    rank.said, rank.norm = said, norm
    metrics = rank.step([STEP], 2, 0.1)
    assert metrics["skipped"] == 1.0
    assert metrics["baseline"] == 2.0
    assert rank._state == {"baseline": 2.0, "steps": 1.0}
    rank.said, rank.norm = 1.0, 1.0
    assert rank.step([STEP], 2, 0.1)["baseline"] == 3.0


def test_it_goes_through_a_checkpoint_bit_exactly(rank, tmp_path):
    rank.step([STEP], 2, 0.1)
    rank._state = {"baseline": 0.1 + 0.2, "steps": 1 / 3}
    assert FILE in rank.save(str(tmp_path))
    other = Stub()
    other.load(str(tmp_path))
    assert other._state == rank._state


def test_one_rank_writes_it(rank, tmp_path):
    rank.rank = 1
    assert list(rank.save(str(tmp_path))) == ["rng_1.json"]


def test_a_checkpoint_without_it_is_refused(rank, tmp_path):
    rank.save(str(tmp_path))
    (tmp_path / FILE).unlink()
    with pytest.raises(LearnerError, match="Bco keeps a state from step to step, and there is none in") as caught:
        rank.load(str(tmp_path))
    assert caught.value.field == "algorithm.name"
    assert "model=" in str(caught.value.fix)


def test_an_algorithm_that_keeps_nothing_writes_and_asks_for_nothing(tmp_path):
    assert save_state(tmp_path, None) == []
    assert load_state(tmp_path, Kto()) is None


@pytest.mark.parametrize("number", [0.1 + 0.2, 1 / 3, 5e-324, -0.0, 1.7976931348623157e308])
def test_every_float_comes_back_to_the_last_bit(tmp_path, number):
    save_state(tmp_path, {"baseline": number, "steps": 1.0})
    assert load_state(tmp_path, Bco())["baseline"].hex() == number.hex()


def test_the_self_test_does_not_advance_it(tmp_path):
    learner = ToyLearner(8, Bco(), str(tmp_path))
    list(learner.update([STEP], [0.1]))
    before = dict(learner._state)
    assert before["steps"] == 1.0
    learner.self_test(STEP, str(tmp_path))
    assert learner._state == before


def test_the_toy_goes_on_with_it(tmp_path):
    """And a state that begins anew makes other weights: the fault that this test is there for."""

    def logits(*, saved: bool) -> list[float]:
        learner = ToyLearner(8, Bco(beta=1.0), "base")
        list(learner.update([STEP], [0.1]))
        learner.save(tmp_path)
        if not saved:
            save_state(tmp_path, Bco().initial_state())
        again = ToyLearner(8, Bco(beta=1.0), "base")
        again.load(tmp_path)
        list(again.update([STEP], [0.1]))
        return again.logits.tolist()

    straight = ToyLearner(8, Bco(beta=1.0), "base")
    list(straight.update([STEP, STEP], [0.1, 0.1]))
    assert logits(saved=True) == straight.logits.tolist()
    assert logits(saved=False) != straight.logits.tolist()
