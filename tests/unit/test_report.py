"""The reporter records every metric of the catalogue, and only as the catalogue has it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from onlinerl.budget import Account, Limits
from onlinerl.controller import evaluation
from onlinerl.controller.anchors import examined
from onlinerl.controller.comparing import Compared
from onlinerl.controller.fleet import FleetReporter
from onlinerl.controller.parts import Built
from onlinerl.controller.report import Reporter
from onlinerl.controller.statistics import bootstrap, divergence, wilson
from onlinerl.controller.tally import Lost, Paid, Sampled
from onlinerl.metrics.catalogue import CATALOGUE
from onlinerl.metrics.collection import Catalogue
from onlinerl.metrics.definition import per_step
from onlinerl.protocols.oracle import Figure
from onlinerl.protocols.refreshing import Refreshed
from onlinerl.protocols.tracker import Tracker
from onlinerl.trackers._fanout import FanoutTracker
from onlinerl.types import (
    Cost,
    Group,
    Interval,
    Label,
    Metric,
    Prompt,
    Replies,
    Rollout,
    Sampling,
    SyncReport,
    TrainItem,
    TrainSequence,
    UpdateReport,
    Verdict,
)
from onlinerl.types.preferences import CHOSEN, REJECTED


class Recorder(Tracker):
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.records: list[Metric] = []
        self.notes: list[str] = []

    def log(self, metrics) -> None:
        self.records += metrics

    def note(self, text: str) -> None:
        self.notes.append(text)


class Broken(Tracker):
    """Takes no figures."""

    def log(self, metrics) -> None:
        raise OSError("no")


def group(number: int, responses: int = 2) -> Group:
    rollouts = tuple(
        Rollout(
            token_ids=(k,),
            logprobs=(-1.0,),
            text=str(k) * (k + 1),
            finish_reason="stop",
            policy_version=0,
            sampler=Sampling(),
            seed=k,
        )
        for k in range(responses)
    )
    return Group(prompt=Prompt(id=str(number), text="", token_ids=(1,)), rollouts=rollouts, rejected=("logprob", "abort"))


VERDICT = Verdict(annotator="a", oracle_version="1", scores=(0.0, 1.0))
GROUPS = [group(n) for n in range(3)]
LOST = Lost()
LOST.add(Label(prompt_id="0", result=replace(VERDICT, replies=Replies(asked=8, failed={"timeout": 1, "refused": 1}), raw="")))
LOGPROBS = [np.array([-1.0, -2.0]), np.array([-1.5])]
SAMPLED_BY = {4: 3, 3: 1}
ITEMS = tuple(
    TrainItem(prompt_id=str(n), sequences=(TrainSequence(prompt_ids=(1,), response_ids=(2,)),))
    for n in range(sum(SAMPLED_BY.values()))
)
BUILT = Built(
    items=ITEMS,
    sampled_by=SAMPLED_BY,
    spreads=(),
    earned=(),
    dropped={"tie": 1},
    contradicted=0,
    truncated=0,
    useful=2,
    groups=3,
)


def steps(*metrics: dict[str, float]) -> UpdateReport:
    return UpdateReport(steps=len(metrics), tokens=9, metrics=metrics)


def measured() -> evaluation.Measured:
    one = [Group(prompt=g.prompt, rollouts=g.rollouts[:1]) for g in GROUPS]
    scores = Verdict(annotator="a", oracle_version="1", scores=(0.5,))
    kl = divergence(LOGPROBS, [x - 0.1 for x in LOGPROBS])
    return evaluation.Measured(
        answers=evaluation.Evaluated(groups=one, verdicts={g.prompt.id: scores for g in one}),
        kl_ref=kl,
        kl_prev=kl,
        kl_forward=bootstrap([0.1, 0.2]),
        entropy_token=evaluation.entropy_token(LOGPROBS),
        entropy_seq=evaluation.entropy_seq(LOGPROBS),
        wins={"base": wilson([1.0, 0.0]), "prev": wilson([0.5])},
        gains=evaluation.Gains(reward=bootstrap([0.1, 0.2]), win_rate=bootstrap([0.5, -0.5])),
        components={"watch": evaluation.Component(score=bootstrap([0.1, 0.2]), win_rate=wilson([1.0, 0.5]))},
        mismatch=evaluation.mismatch(one, [np.array([-1.0])] * 3),
        oracle_versions={"1": 3},
    )


def known_pair(n: int) -> Group:
    """Its first response is the better one."""
    pair = group(n, 2)
    sources = zip(pair.rollouts, (CHOSEN, REJECTED), strict=True)
    return replace(pair, rollouts=tuple(replace(rollout, source=source) for rollout, source in sources))


def everything(report: Reporter, learner: dict[str, float], figures: dict[str, float]) -> None:
    """All that can happen in an iteration."""
    report.phase(1, "sample", 1.0)
    report.sampled(1, [Sampled.of(group) for group in GROUPS], kept=2)
    report.reused(1, {"1": 2, "2": 1}, 40)
    report.labelled(1, ok=2, failed=1, spreads=[0.5, 0.5], uncertainties=[0.1, 0.3])
    report.asked(1, "label", 1, 3)
    report.replies(1, "label", LOST)
    report.paid(1, "label", Paid(cost=Cost(calls=3, seconds=2.0, usd=0.5, tokens=10, tokens_out=4), saved=Cost(calls=7)))
    report.budget(1, Account(Limits(calls=4, tokens=100, usd=2.0), Cost(calls=3, tokens=10, usd=0.5)))
    cells = ((math.nan, 0.9, 0.9), (0.8, math.nan, 0.9), (0.1, 0.1, math.nan))
    compares = Verdict(annotator="a", oracle_version="1", preferences=cells)
    report.compared(1, [Compared.of(group(n, 3), compares) for n in range(3)])
    pairs = [known_pair(n) for n in range(3)]
    flips = replace(compares, preferences=((math.nan, 0.9), (0.8, math.nan)))
    said = {pair.prompt.id: flips for pair in pairs}
    report.examined(1, examined(pairs, said, said))
    half: Interval = {"value": 0.6, "low": 0.5, "high": 0.7, "n": 40}
    made = Refreshed(
        weights="0001", reason=None, trained=90, heldout=40, before=half, after=half, change={**half, "value": 0.0}
    )
    report.refreshed(1, made, bootstrap([0.1, 0.3]), versions=("1", "2"))
    asked = [
        Figure("people_questions", 3.0, labels={"state": "open"}),
        Figure("people_questions", 9.0, labels={"state": "answered"}),
    ]
    report.oracle(
        1,
        [
            *asked,
            Figure("people_agreement", 0.8, n=5),
            Figure("people_kappa", 0.6, n=5, se=0.1),
            Figure("people_gold_accuracy", 0.9, n=5),
        ],
    )
    report.skipped(1, 1)
    report.trained(1, steps(learner, learner), BUILT, None, 0, figures)
    sync = SyncReport(
        version=1, seconds=1.0, bytes=8, replicas=1, backend="gloo", phases={}, proved=True, tensors_checked=1, canary_nats=0.0
    )
    report.synced(1, sync)
    report.push_failed(1)
    now = measured()
    report.mismatch(1, now.mismatch)
    report.evaluated(1, now, 9)
    fleet = FleetReporter(report.tracker, report.attempt)
    fleet.states(1, {"serving": 1, "dead": 1}, least=1)
    fleet.lost(1, 1, "replica 1", "died", "its process ended")
    fleet.restarted(1, 1, 3, "replica 1", "died")


def test_what_an_oracle_says_of_itself_has_its_interval():
    recorder = Recorder()
    asked = [
        Figure("people_agreement", 0.8, n=50),
        Figure("people_kappa", 0.6, n=50, se=0.1),
        Figure("people_questions", 3.0, labels={"state": "open"}),
    ]
    Reporter(FanoutTracker([recorder])).oracle(1, asked)
    share, kappa, count = recorder.records
    wins = wilson([1.0] * 40 + [0.0] * 10)
    assert (share.ci_low, share.ci_high, share.n) == pytest.approx((wins.low, wins.high, 50))
    assert (kappa.ci_low, kappa.ci_high, kappa.se) == pytest.approx((0.404, 0.796, 0.1), abs=1e-4)
    assert count.ci_low is None


def test_staleness_counts_versions_from_the_one_that_training_starts_from():
    recorder = Recorder()
    Reporter(FanoutTracker([recorder])).trained(5, steps(), BUILT, None, 0, {})
    found = {r.labels["stat"]: (r.value, r.n) for r in recorder.records if r.name == "staleness"}
    assert found == {"mean": (0.25, 4), "p95": (pytest.approx(0.85), 4), "max": (1.0, 4)}


def test_failed_replies_are_shares_of_all_that_were_asked_for_by_kind():
    recorder = Recorder()
    report = Reporter(FanoutTracker([recorder]))
    report.replies(3, "label", Lost())
    assert not recorder.records, "an oracle whose groups are one question each has no replies"
    report.replies(3, "label", LOST)
    found = {(r.labels["phase"], r.labels["kind"]): (r.value, r.n) for r in recorder.records}
    assert found == {("label", "all"): (0.25, 8), ("label", "timeout"): (0.125, 8), ("label", "refused"): (0.125, 8)}


def of(origin: str, catalogue: Catalogue = CATALOGUE) -> dict[str, float]:
    return {d.name: 0.5 for d in catalogue if d.origin == origin}


def test_every_metric_is_recorded_as_the_catalogue_has_it_and_none_is_left_out():
    recorder = Recorder()
    tracker = FanoutTracker([Broken(), recorder])
    everything(Reporter(tracker, attempt=2), of("step"), of("iteration"))
    problems = [CATALOGUE.problem(record) for record in recorder.records]
    assert not any(problems), problems
    assert {record.name for record in recorder.records} == {d.name for d in CATALOGUE}, "described, and measured nowhere"
    assert {(record.iteration, record.attempt) for record in recorder.records} == {(1, 2)}
    found = {record.name: record for record in recorder.records}
    assert found["loss"].estimator == "mean over steps"
    assert found["truncated"].estimator == "wilson"
    assert found["reward"].insufficient
    assert not found["pair_yield"].insufficient


@pytest.mark.parametrize("gone", ["phase_seconds", "kl_headline", "logp_mismatch"])
def test_a_metric_that_the_catalogue_does_not_have_is_an_error(gone):
    without = Catalogue([d for d in CATALOGUE if d.name != gone])
    with pytest.raises(ValueError, match=f"no metric '{gone}'"):
        everything(Reporter(Recorder(), catalogue=without), {"loss": 0.5}, {})


def trained(report: Reporter, learner: Sequence[dict[str, float]], figures: dict[str, float]) -> dict[str, Metric]:
    report.tracker.records.clear()
    report.trained(1, steps(*learner), BUILT, None, 0, figures)
    return {record.name: record for record in report.tracker.records}


def test_what_an_algorithm_declares_has_its_unit():
    own = per_step("surprise", "How unexpected it was", "nats")
    report = Reporter(Recorder(), catalogue=CATALOGUE.including([own], "mine"))
    found = trained(report, [{"surprise": 1.0}, {"surprise": 2.0}], {})
    assert (found["surprise"].value, found["surprise"].unit, found["surprise"].n) == (1.5, "nats", 2)
    assert report.tracker.notes == []


def test_what_an_algorithm_does_not_declare_is_recorded_all_the_same_and_said_once():
    report = Reporter(Recorder())
    for _ in range(2):
        found = trained(report, [{"surprise": 1.0}], {"mood": 3.0})
        assert (found["surprise"].value, found["surprise"].estimator) == (1.0, "mean over steps")
        assert (found["mood"].value, found["mood"].estimator) == (3.0, "exact")
    assert [note.split()[0] for note in report.tracker.notes] == ["mood", "surprise"]


def test_an_algorithm_cannot_take_the_place_of_another_metric():
    """Its mean score of a batch would be shown as the reward on held-out prompts."""
    report = Reporter(Recorder())
    for _ in range(2):
        found = trained(report, [{"reward": 1.0, "loss": 0.5}], {"length": 3.0, "z": 1.0})
        assert "loss" in found
        assert not {"reward", "length", "z"} & found.keys()
    assert sorted(note.split(",")[0] for note in report.tracker.notes) == ["length", "reward", "z"]
