"""A verdict for every group."""

from __future__ import annotations

from typing import Any

from onlinerl.controller import collect
from onlinerl.controller.iteration import Iteration, judged
from onlinerl.stores.rows import VERDICTS
from onlinerl.types import Failure


def label(it: Iteration) -> dict[str, Any]:
    """Ask the oracle about what was sampled."""
    groups = it.large_enough(it.groups())
    calls, results = collect.judge(it, groups, VERDICTS, "label")
    failures = [r for r in results.values() if isinstance(r, Failure)]
    told = judged(groups, results)
    it.report.labelled(it.number, groups, results, told)
    return {"oracle_calls": calls, "failures": len(failures)}
