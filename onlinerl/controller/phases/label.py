"""A verdict for every group."""

from __future__ import annotations

from typing import Any

from onlinerl.controller import collect, health
from onlinerl.controller.iteration import Iteration, judged
from onlinerl.stores.rows import VERDICTS
from onlinerl.types import Failure


def label(it: Iteration) -> dict[str, Any]:
    """Ask the oracle about what is sampled."""
    sampled, expected = it.sampled(), len(it.prompts()[0])
    calls, results = collect.judge(it, sampled, expected, VERDICTS, "label", wanted=it.large_enough, feed=it.answers)
    groups = [group for group in it.groups() if it.large_enough(group)]
    failures = [r for r in results.values() if isinstance(r, Failure)]
    health.check_failures(failures, len(groups), it.parts.config.max_failed_labels)
    it.report.labelled(it.number, groups, results, judged(groups, results))
    waited = sampled.waited / it.parts.asker.oracle.max_concurrent
    return {"oracle_calls": calls, "failures": len(failures), "waited": waited}
