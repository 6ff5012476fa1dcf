"""A verdict for every group."""

from __future__ import annotations

from collections import Counter

import numpy as np

from onlinerl.controller import collect, health
from onlinerl.controller.iteration import Iteration
from onlinerl.types import Failure, LabelRecord


def label(it: Iteration) -> LabelRecord:
    """Ask the oracle about what is sampled."""
    sampled, labels = it.sampled(), it.labels()
    expected = len(it.prompts()[0])
    calls = collect.judge(it, sampled, expected, labels, "label", wanted=it.large_enough, feed=it.answers)
    failures: list[Failure] = []
    spread: dict[str, float] = {}
    versions: Counter[str] = Counter()
    # Groups that were large enough to be judged are those with a label.
    for found in labels.select(dict.fromkeys(it.sampled_ids)):
        result = None if found is None else found.result
        if isinstance(result, Failure):
            failures.append(result)
        elif found is not None and result is not None:
            versions[result.oracle_version] += 1
            if result.scores is not None:
                spread[found.prompt_id] = float(np.std(result.scores))
    health.check_failures(failures, calls, it.parts.config.max_failed_labels)
    spreads = [spread[prompt_id] for prompt_id in it.sampled_ids if prompt_id in spread]
    it.report.labelled(it.number, ok=calls - len(failures), failed=len(failures), spreads=spreads)
    waited = sampled.waited / it.parts.asker.oracle.max_concurrent
    return {"oracle_calls": calls, "failures": len(failures), "oracle_versions": versions, "waited": waited}
