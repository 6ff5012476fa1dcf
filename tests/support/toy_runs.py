"""What a run of the toy engine and learner leaves behind, without what measures time, so that two runs can be compared."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from onlinerl.stores.directory import RunDirectory
from onlinerl.stores.summary import summarise
from onlinerl.trackers.jsonl import read_metrics

HELDOUT, PROMPTS, BATCH = 10, 8, 4
COUNTED = {
    "oracle.name": "python",
    "oracle.function": "hooks.judge",
    "oracle.groups_per_call": BATCH,
    "metrics.prometheus": False,
}
PROBE = [" It was good.", " It was bad, the answer is 7."]
"""What the oracle is asked at every start before anything else; it is no label."""


def events(log: Path) -> list[dict]:
    """What the hooks in the processes logged."""
    return [json.loads(line) for line in log.read_text().splitlines()]


def figures(run: Path) -> dict:
    """Everything a run reports that does not measure time."""
    report = summarise(run, extras=True)
    for row in report["iterations"]:
        row["phases"] = list(row["phases"])
        row["sync"].pop("seconds")
    return report


def unpaid(row: dict[str, Any]) -> dict[str, Any]:
    """A row of any table without what a label has cost, and whether it was known: of two equal questions that which comes first is asked."""
    return {key: value for key, value in row.items() if key not in ("cost", "saved", "reused_from")}


def metrics(run: Path) -> list[tuple]:
    """The run's records without times, in an order of their own; an attempt that was superseded does not count. Questions that were asked,
    and those that were not because the answer was known, are one figure: which of two equal ones is asked depends on what comes first."""
    records = [r for r in read_metrics(run / "metrics.jsonl") if "seconds" not in r["name"]]
    questions: Counter[str] = Counter()
    for record in records:
        record.pop("attempt")
        if record["name"].startswith("oracle_requests"):
            questions[f"{record['iteration']} {record['labels']['phase']}"] += record["value"]
    others = [record for record in records if not record["name"].startswith("oracle_requests")]
    return [*sorted(json.dumps(record, sort_keys=True) for record in others), *sorted(questions.items())]


def weights(run: Path, iteration: int) -> np.ndarray:
    """The iterate."""
    return np.load(run / "exports" / f"{iteration:04d}" / "logits.npy")


def everything(run: Path, iterations: int = 3) -> dict:
    """Figures, metrics and weights of a run."""
    return {
        "figures": figures(run),
        "metrics": metrics(run),
        "weights": [weights(run, i).tolist() for i in range(1, iterations + 1)],
        "pairs": [pairs(run, i) for i in range(1, iterations + 1)],
    }


def pairs(run: Path, iteration: int) -> list[dict]:
    with RunDirectory.open(run) as opened:
        return opened.read(iteration, "pairs")
