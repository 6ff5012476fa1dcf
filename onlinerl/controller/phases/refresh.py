"""The oracle gets other weights: its reward model learns from what another oracle says, or the policy that judges itself goes on to the next iterate."""

from __future__ import annotations

from collections.abc import Mapping

from onlinerl.controller import collect, refreshing
from onlinerl.controller.feed import Feed
from onlinerl.controller.iteration import Iteration
from onlinerl.controller.statistics import Estimate, bootstrap
from onlinerl.controller.tally import Paid
from onlinerl.graph import sampling_version
from onlinerl.protocols.refreshing import Refreshed, Refreshing, RewardTrainer
from onlinerl.protocols.store import EVALUATION, EVALUATION_VERDICTS, REFRESH_LABELS, REFRESHED_VERDICTS
from onlinerl.types import Failure, Group, Interval, RefreshRecord, Verdict, derive_seed


def refresh(it: Iteration) -> RefreshRecord:
    """Renew the weights of the oracle, in the way that it asks for."""
    return _learned(it) if it.parts.asker.oracle.following is None else _followed(it)


def _followed(it: Iteration) -> RefreshRecord:
    """Take on the iterate that the next iteration samples from.

    As for a training, the record is what decides: killed before it is there, a resume begins with the weights before and takes these on again.
    """
    oracle, store = it.parts.asker.oracle, it.parts.store
    before, iterate = oracle.version, sampling_version(it.number + 1, it.parts.config.schedule.max_lag)
    if iterate > 0:  # with lag the second iteration samples from the model that the run began with, too
        assert oracle.following is not None
        oracle.following.reload(str(store.require("exports", iterate)))
        it.parts.asker.renewed()
    return {
        "asked": 0,
        "failures": 0,
        "trained": False,
        "taken": iterate > 0,
        "reason": None,
        "weights": f"exports/{iterate:04d}" if iterate > 0 else None,
        "oracle_versions": [before, oracle.version],
        "comparisons": {"trained": 0, "heldout": 0},
        "before": None,
        "after": None,
        "change": None,
        "reward_shift": None,
    }


def _learned(it: Iteration) -> RefreshRecord:
    """Ask the other oracle about some of the responses; when it is its turn, train on all that it has said so far and take the new weights,
    unless they are worse.

    The record is what decides which weights are in use: killed before it is there, all of this is gone through again with the weights that
    were in use before, and what is on the disk is not computed again.
    """
    oracle, before = it.parts.asker.oracle, it.parts.asker.oracle.version
    plan = oracle.refreshing
    assert plan is not None, "the graph has this phase only where something is trained"
    asked, paid = collect.judge(
        it, Feed.of(_drawn(it, plan), it.stop), plan.prompts, REFRESH_LABELS, "refresh", asker=it.parts.label_asker
    )
    failures = sum(isinstance(label.result, Failure) for label in it.parts.store.labels(it.number, REFRESH_LABELS))
    made = _trained(it) if it.number % plan.every == 0 else Refreshed(weights=None, reason=None)
    shift = None
    if made.weights is not None:
        plan.model.reload(str(_trainer(it).path(made.weights)))
        it.parts.asker.renewed()
        shift, more = _shift(it)
        paid = Paid(cost=paid.cost.plus(more.cost), saved=paid.saved.plus(more.saved))
    after = oracle.version
    it.report.paid(it.number, "refresh", paid)
    it.report.budget(it.number, it.parts.asker.account)
    it.report.refreshed(it.number, made, shift, versions=(before, after))
    return {
        "asked": asked,
        "failures": failures,
        "trained": made.trained > 0,
        "taken": made.weights is not None,
        "reason": made.reason,
        "weights": made.weights,
        "oracle_versions": [before, after],
        "comparisons": {"trained": made.trained, "heldout": made.heldout},
        "before": made.before,
        "after": made.after,
        "change": made.change,
        "reward_shift": None if shift is None else _interval(shift),
    }


def _drawn(it: Iteration, plan: Refreshing) -> list[Group]:
    """The groups of this iteration that the other oracle is asked about, in the order of their prompts. Responses that were sampled before were
    asked about then, and of those that begin with given tokens nobody knows whole texts."""
    new = [name for name in it.prompt_ids if name not in it.reused]
    order = sorted(new, key=lambda name: derive_seed(it.parts.config.seed, "refresh", it.number, name))
    chosen = {*order[: plan.prompts]}
    groups = (group for group, _ in it.judged([name for name in new if name in chosen], labelled=False))
    return [group for group in groups if len(group.rollouts) > 1 and not any(r.prefix_ids for r in group.rollouts)]


def _trainer(it: Iteration) -> RewardTrainer:
    assert it.parts.reward_trainer is not None, "whoever wires a run with this phase gives it one"
    return it.parts.reward_trainer


def _trained(it: Iteration) -> Refreshed:
    """What comes of training on all that is known by now."""
    store, trainer = it.parts.store, _trainer(it)
    taken = refreshing.in_use(store, it.number)
    trainer.keep(taken[: it.parts.config.checkpoints.keep], it.number)
    since = refreshing.last_training(store, it.number)
    known = refreshing.labelled(store, it.parts.prompts_by_id, it.number)
    return trainer.train(it.number, taken[0] if taken else None, since, known, _Progress(it))


class _Progress:
    """Tells people how far a training is, and ends it where the run is being stopped."""

    def __init__(self, it: Iteration) -> None:
        self._it, self._told = it, 0

    def __call__(self, step: int, steps: int) -> None:
        self._it.check_stop()
        tracker, number = self._it.parts.tracker, self._it.number
        if not self._told:
            tracker.phase_started(number, "refresh", steps, "steps")
        tracker.phase_advanced(number, "refresh", step - self._told)
        self._told = step


def _shift(it: Iteration) -> tuple[Estimate, Paid]:
    """By how much the answers of this iterate to the held-out prompts score higher under the new version than under the one that has measured
    them: without that, a jump of the reward could be the oracle's or the policy's."""
    store = it.parts.store
    answered = [group for group in store.groups(it.number, EVALUATION, {p.id: p for p in it.parts.heldout}) if group.rollouts]
    _, paid = collect.judge(it, Feed.of(answered, it.stop), len(answered), REFRESHED_VERDICTS, "refresh")
    then, now = (_scores(it, table) for table in (EVALUATION_VERDICTS, REFRESHED_VERDICTS))
    return bootstrap([now[name] - then[name] for name in sorted(now.keys() & then.keys())]), paid


def _scores(it: Iteration, table: str) -> Mapping[str, float]:
    """Of the one response to each prompt."""
    labels = ((label.prompt_id, label.result) for label in it.parts.store.labels(it.number, table))
    return {name: said.scores[0] for name, said in labels if isinstance(said, Verdict) and said.scores is not None}


def _interval(estimate: Estimate) -> Interval:
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high, "n": estimate.n}
