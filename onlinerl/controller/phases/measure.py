"""What an iterate is worth: the figures about its answers to the held-out prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial

import numpy as np

from onlinerl.controller import collect, evaluation, health
from onlinerl.controller.feed import Feed
from onlinerl.controller.iteration import Iteration
from onlinerl.controller.statistics import Divergence, Estimate, wilson
from onlinerl.controller.tally import Paid
from onlinerl.errors import EngineError
from onlinerl.protocols.store import BASE_LOGPROBS, EVALUATION, EVALUATION_VERDICTS
from onlinerl.types import Failure, Group, LogProbs, MeasureRecord, Verdict


def measure(it: Iteration) -> MeasureRecord:
    """Reward, divergences, win rates, and whether engine and learner agree."""
    config, learner = it.parts.config, it.parts.learner
    now, calls = _scored(it)
    own = learner.logprobs(evaluation.sequences(now.groups), model=it.model_of(it.number), temperature=1.0)
    wins, gains, more = _win_rates(it, now)
    kl_ref = _divergence(it, now, own, 0)
    sample = now.groups[: config.evaluation.mismatch_sample]
    versions, paid = _oracle_versions(it)
    measured = evaluation.Measured(
        answers=now,
        kl_ref=kl_ref,
        kl_prev=kl_ref if it.number <= 1 else _divergence(it, now, own, it.number - 1),
        kl_forward=_forward_kl(it, now.groups, own),
        entropy_token=evaluation.entropy_token(own),
        entropy_seq=evaluation.entropy_seq(own),
        wins=wins,
        gains=gains,
        components=evaluation.components(now, None if it.number == 0 else _evaluated(it, 0)),
        mismatch=evaluation.mismatch(sample, own[: len(sample)]),
        oracle_versions=versions,
    )
    it.report.paid(it.number, "measure", paid)
    it.report.budget(it.number, it.parts.asker.account)
    it.report.mismatch(it.number, measured.mismatch)
    health.check_mismatch(measured.mismatch.k3, config.evaluation.max_mismatch_k3)
    return it.report.evaluated(it.number, measured, calls + more)


def _scored(it: Iteration) -> tuple[evaluation.Evaluated, int]:
    """This iterate's answers and their scores, and how many oracle calls these are.

    Raises:
        EngineError: if no prompt was answered.
    """
    groups = _evaluated(it, it.number).groups
    if not groups:
        raise EngineError(
            "not one held-out prompt got a usable response",
            field="engine.max_rejected",
            fix="lower it, and look at the engine's log",
        )
    calls, verdicts = 0, dict[str, Verdict | Failure]()
    if it.parts.oracle_scores:  # an oracle that only compares has nothing to say about one response
        calls, verdicts = _judged(it, groups, EVALUATION_VERDICTS)
    return evaluation.Evaluated(groups=groups, verdicts=verdicts), calls


def _answered(groups: Sequence[Group]) -> list[Group]:
    """Without the prompts whose response the engine rejected: they are in no figure."""
    return [g for g in groups if g.rollouts]


def _win_rates(it: Iteration, now: evaluation.Evaluated) -> tuple[dict[str, Estimate], evaluation.Gains | None, int]:
    """Against the base model and the iterate before, what is gained over the base model, and how many oracle calls that took."""
    if it.number == 0:
        return {}, None, 0
    won, calls = {}, 0
    for iterate in sorted({0, it.number - 1}):
        judge = partial(_judged, it, table=_comparisons(iterate))
        won[iterate], more = evaluation.outcomes(now, _evaluated(it, iterate), judge)
        calls += more
    gains = evaluation.gains(now, _evaluated(it, 0), won[0])
    return {"base": wilson(won[0]), "prev": wilson(won[it.number - 1])}, gains, calls


def _comparisons(iterate: int) -> str:
    """The table of comparisons with an earlier iterate."""
    return f"comparisons_{iterate:04d}"


def _oracle_versions(it: Iteration) -> tuple[Counter[str], Paid]:
    """Verdicts and comparisons of this iterate by the version of the oracle that gave them, and what they and the failures have cost."""
    tables = (EVALUATION_VERDICTS, *(_comparisons(iterate) for iterate in sorted({0, max(0, it.number - 1)})))
    said: dict[tuple[str, str], str] = {}
    paid = Paid()
    for table in tables:
        for label in it.parts.store.labels(it.number, table):
            paid = paid.plus(label)
            if isinstance(label.result, Verdict):  # the latest: one of which replies had failed may have been asked for again
                said[table, label.prompt_id] = label.result.oracle_version
    return Counter(said.values()), paid


def _judged(it: Iteration, groups: Sequence[Group], table: str) -> tuple[int, dict[str, Verdict | Failure]]:
    calls, _ = collect.judge(it, Feed.of(groups, it.stop), len(groups), table, "measure")
    return calls, {label.prompt_id: label.result for label in it.parts.store.labels(it.number, table)}


def _evaluated(it: Iteration, iterate: int) -> evaluation.Evaluated:
    """What an earlier iterate answered, from disk."""
    store = it.parts.store
    groups = {g.prompt.id: g for g in store.groups(iterate, EVALUATION, {p.id: p for p in it.parts.heldout})}
    verdicts = {label.prompt_id: label.result for label in store.labels(iterate, EVALUATION_VERDICTS)}
    return evaluation.Evaluated(groups=_answered([groups[p.id] for p in it.parts.heldout]), verdicts=verdicts)


def _divergence(it: Iteration, now: evaluation.Evaluated, own: Sequence[np.ndarray], iterate: int) -> Divergence:
    model = None if iterate == it.number else it.model_of(iterate)
    return evaluation.drift(now, it.parts.learner, own, model)


def _forward_kl(it: Iteration, groups: Sequence[Group], own: Sequence[np.ndarray]) -> Estimate | None:
    """From the base model's answers; its log-probs of them, from the learner like all others, are kept at iteration 0."""
    table = it.parts.store.logprobs(0, BASE_LOGPROBS)
    if it.number == 0:
        if not table.sealed:
            pairs = zip(groups, own, strict=True)
            table.append([LogProbs(prompt_id=g.prompt.id, arrays={"logprobs": (lp,)}) for g, lp in pairs])
            table.seal()
        return None
    if not table.sealed:  # the run was started by a version that did not keep them
        return None
    kept = {one.prompt_id: one.arrays["logprobs"][0] for one in table}
    base = _evaluated(it, 0).groups
    policy = it.parts.learner.logprobs(evaluation.sequences(base), model=it.model_of(it.number), temperature=1.0)
    return evaluation.forward_kl([np.asarray(kept[g.prompt.id], np.float64) for g in base], policy)
