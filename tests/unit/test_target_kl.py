"""Early stopping on the KL to the weights that an iteration began with: what is measured, who decides, and what a stopped step leaves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from onlinerl.algorithms.bco import Bco
from onlinerl.algorithms.dpo import Dpo
from onlinerl.batch import Batch, Outputs
from onlinerl.config.sections import TrainingConfig
from onlinerl.learners import _rank
from onlinerl.learners._loss import kl_old
from onlinerl.learners._rank import Rank
from onlinerl.learners.toy import ToyLearner
from onlinerl.ops.batching import collate
from onlinerl.types import TrainItem, TrainSequence

VOCABULARY = 8


def pair(old: float = -1.0, lengths: tuple[int, int] = (3, 1)) -> TrainItem:
    """A pair whose responses of so many tokens had `old` nats per token where training began."""
    said = [np.full(n, old, np.float32) for n in lengths]
    sequences = [
        TrainSequence(prompt_ids=(1,), response_ids=(token,) * len(s), reference_logprobs=s, old_logprobs=s)
        for token, s in zip((2, 3), said, strict=True)
    ]
    return TrainItem(prompt_id="a", sequences=tuple(sequences))


def k3(moved: float) -> float:
    return math.exp(-moved) - 1 + moved


def test_it_is_the_mean_over_response_tokens_whatever_padding_holds():
    batch = collate([pair(), pair(-2.0)])
    logprobs_BT = torch.where(batch.mask_BT, torch.tensor(-0.5), torch.tensor(math.nan))
    mean = kl_old(Outputs(logprobs_BT=logprobs_BT.requires_grad_()), batch)["kl_old"]
    assert (mean.total / mean.count).item() == pytest.approx((4 * k3(0.5) + 4 * k3(1.5)) / 8, rel=1e-6)
    assert not mean.total.requires_grad


def test_a_micro_batch_without_items_counts_nothing():
    mean = kl_old(Outputs(logprobs_BT=torch.zeros(1, 1)), collate([]))["kl_old"]
    assert (mean.total.item(), mean.count.item()) == (0, 0)


def toy() -> tuple[ToyLearner, list[TrainItem]]:
    items = [pair(-math.log(VOCABULARY))]
    return ToyLearner(VOCABULARY, Dpo(), "base"), items


def test_the_toy_stops_before_the_step_whose_tokens_show_it():
    learner, items = toy()
    free = list(learner.update([items] * 5, [0.3] * 5, target_kl=1e9))
    kls = [report.metrics[0]["kl_old"] for report in free]
    assert kls[0] == pytest.approx(0.0, abs=1e-6)
    assert kls == sorted(kls)
    assert [report.stopped for report in free] == [0] * 5

    learner, items = toy()
    *taken, last = learner.update([items] * 5, [0.3] * 5, target_kl=(kls[2] + kls[3]) / 2)
    assert [report.metrics[0] for report in taken] == [report.metrics[0] for report in free[:3]]
    assert (last.steps, last.tokens, last.stopped) == (0, 0, 1)
    assert last.metrics[0]["kl_old"] == kls[3]
    again, items = toy()
    list(again.update([items] * 3, [0.3] * 3))
    assert torch.equal(learner.logits, again.logits)


class Stub(Rank):
    """A rank that needs no model: every token of the policy has `said` nats; another rank has `others`, a sum and a count."""

    def __init__(self, algorithm, said: float, others: tuple[float, float] | None = None) -> None:
        self.algorithm, self.device, self.needs, self.training = (
            algorithm,
            torch.device("cpu"),
            algorithm.needs,
            TrainingConfig(),
        )
        self.rank, self.world_size, self.said, self.others = 0, 1 if others is None else 2, said, others
        self.counts: list[float] = []
        self._state = self._next_state = _rank.initial_state(algorithm)

    _groups = ()

    def _gather(self, own):
        return [own], 0

    def _forward(self, batch: Batch) -> Outputs:
        return Outputs(logprobs_BT=torch.full(batch.mask_BT.shape, self.said, requires_grad=True))

    def _accumulate(self, total, count):
        self.counts.append(count)

    def _apply(self):
        return 1.0, all(map(math.isfinite, self.counts))

    def _reduce(self, totals, count):
        return {name: (row[0] / row[1]).item() for name, row in totals.items() if name == "kl_old"}


@pytest.fixture(autouse=True)
def gathered(monkeypatch):
    """What ranks tell each other."""

    def all_gather_object(parts, own):
        parts[0] = own
        if len(parts) > 1:
            parts[1] = [*STUBS[-1].others]

    monkeypatch.setattr(_rank.dist, "all_gather_object", all_gather_object)


STUBS: list[Stub] = []


def stub(*arguments) -> Stub:
    STUBS.append(Stub(*arguments))
    return STUBS[-1]


def test_a_step_that_begins_too_far_is_not_taken():
    rank = stub(Dpo(), -0.5)
    far = k3(0.5)
    metrics = rank.step([[pair()], [pair()]], 2, 0.1, far * 1.01)
    assert (metrics["stopped"], metrics["skipped"]) == (0, 0)
    assert metrics["kl_old"] == pytest.approx(far, rel=1e-5)
    assert rank.counts == [2, 2]
    rank.counts.clear()
    metrics = rank.step([[pair()], [pair()]], 2, 0.1, far * 0.99)
    assert (metrics["stopped"], metrics["skipped"]) == (1, 0)
    assert math.isnan(rank.counts[1])


def test_without_a_target_nothing_is_measured_and_nothing_said():
    item = TrainItem(prompt_id="a", sequences=tuple(s.with_(old_logprobs=None) for s in pair().sequences))
    metrics = stub(Dpo(), -0.5).step([[item]], 1, 0.1)
    assert "stopped" not in metrics
    assert "kl_old" not in metrics


@pytest.mark.parametrize(("target", "stopped"), [(4.5, 1), (4.6, 0)])
def test_all_tokens_of_all_ranks_decide(target, stopped):
    """(4 * 0.1065 + 36) / 8 = 4.55: the 4 tokens of this rank alone would always go on, and those of the other one always stop."""
    rank = stub(Dpo(), -0.5, (36.0, 4.0))
    assert rank.step([[pair()]], 1, 0.1, target)["stopped"] == stopped


def test_a_rank_without_items_stops_with_the_others():
    rank = stub(Dpo(), -0.5, (10.0, 4.0))
    assert rank.step([[]], 1, 0.1, 1.0)["stopped"] == 1


def test_a_step_that_is_not_taken_leaves_the_state_of_the_loss_before_it():
    rank = stub(Bco(), -0.5)
    before = dict(rank._state)
    item = TrainItem(prompt_id="a", sequences=(pair().sequences[0].with_(win_rate=0.9),))
    other = TrainItem(prompt_id="b", sequences=(pair().sequences[1].with_(win_rate=0.1),))
    assert rank.step([[item, other]], 2, 0.1, 1e-9)["stopped"] == 1
    assert rank._state == before
    rank.counts.clear()
    assert rank.step([[item, other]], 2, 0.1, 10.0)["stopped"] == 0
    assert rank._state != before
