"""Whether the oracle can be trusted."""

from __future__ import annotations

from onlinerl.controller import anchors, collect
from onlinerl.controller.feed import Feed
from onlinerl.controller.iteration import Iteration
from onlinerl.protocols.store import ANCHOR_VERDICTS
from onlinerl.types import ExamineRecord, Failure


def examine(it: Iteration) -> ExamineRecord:
    """Ask the oracle about pairs whose better response is known: before anything is pushed, again as often as configured, and whenever its reward
    model has been trained further.

    What it says again it is asked again, whatever the ledger knows: a model behind an endpoint may change, and keep its name.
    """
    config, groups = it.parts.config.anchors, it.parts.anchors
    assert config is not None
    first = it.number == 0
    renewed = it.parts.store.phases(it.number - 1 - it.parts.config.schedule.max_lag).get("refresh", {}).get("taken", False)
    due = first or renewed or (config.every and it.number % config.every == 0)
    if not due:
        return {"asked": 0, "failures": 0, "figures": None, "agreement": None}
    feed = Feed.of(groups, it.stop)
    asked, paid = collect.judge(it, feed, len(groups), ANCHOR_VERDICTS, "examine", anew=not first)
    said = {label.prompt_id: label.result for label in it.parts.store.labels(it.number, ANCHOR_VERDICTS)}
    before = {label.prompt_id: label.result for label in it.parts.store.labels(0, ANCHOR_VERDICTS)}
    found = anchors.examined(groups, said, None if first else before)
    it.report.paid(it.number, "examine", paid)
    it.report.budget(it.number, it.parts.asker.account)
    it.report.examined(it.number, found)
    of_each = config.min_accuracy_by_source
    anchors.require_accuracy(found, config.min_accuracy, min(0.5, config.min_accuracy) if of_each is None else of_each)
    return {
        "asked": asked,
        "failures": sum(isinstance(each, Failure) for each in said.values()),
        "figures": found.figures,
        "agreement": None if found.agreement is None else found.agreement.value,
    }
