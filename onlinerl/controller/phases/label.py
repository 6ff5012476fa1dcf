"""A verdict for every group."""

from __future__ import annotations

from collections import Counter

import numpy as np

from onlinerl.controller import collect, health
from onlinerl.controller.comparing import Compared
from onlinerl.controller.iteration import Iteration
from onlinerl.controller.tally import Lost
from onlinerl.protocols.store import VERDICTS
from onlinerl.types import Failure, LabelRecord, Verdict


def label(it: Iteration) -> LabelRecord:
    """Ask the oracle about what is sampled."""
    sampled, labels = it.sampled(), it.labels()
    expected = len(it.prompts()[0])
    calls, paid = collect.judge(it, sampled, expected, VERDICTS, "label", wanted=it.large_enough, feed=it.answers)
    failures: list[Failure] = []
    lost = Lost()
    spread: dict[str, float] = {}
    unsure: dict[str, float] = {}
    compared: list[str] = []
    versions: Counter[str] = Counter()
    # Groups that were large enough to be judged are those with a label.
    for found in labels.select(dict.fromkeys(it.sampled_ids)):
        result = None if found is None else found.result
        if found is not None:
            lost.add(found)
        if isinstance(result, Failure):
            failures.append(result)
        elif found is not None and result is not None:
            versions[result.oracle_version] += 1
            if result.preferences is not None:
                compared.append(found.prompt_id)
            if result.scores is not None:
                spread[found.prompt_id] = float(np.nanstd(result.scores))
            if (nats := result.mean_uncertainty()) is not None:
                unsure[found.prompt_id] = nats
    it.report.paid(it.number, "label", paid)
    it.report.budget(it.number, it.parts.asker.account)
    it.report.oracle(it.number, it.parts.asker.oracle.figures())
    health.check_failures(failures, calls, it.parts.config.max_failed_labels)
    health.check_replies(lost, lost.groups, it.parts.config.max_failed_labels)
    spreads, uncertainties = ([known[i] for i in it.sampled_ids if i in known] for known in (spread, unsure))
    it.report.labelled(it.number, ok=calls - len(failures), failed=len(failures), spreads=spreads, uncertainties=uncertainties)
    if compared:  # only then are the responses read again
        answered = it.judged(compared)
        it.report.compared(it.number, [Compared.of(group, said) for group, said in answered if isinstance(said, Verdict)])
    waited = sampled.waited / it.parts.asker.oracle.max_concurrent
    return {"oracle_calls": calls, "failures": len(failures), "oracle_versions": versions, "waited": waited}
