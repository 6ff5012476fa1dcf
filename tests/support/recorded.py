"""What a run has recorded, compared with the catalogue of metrics."""

from __future__ import annotations

from pathlib import Path

from onlinerl import registry
from onlinerl.metrics.catalogue import CATALOGUE
from onlinerl.protocols.algorithm import Algorithm
from onlinerl.trackers.jsonl import read_metrics
from onlinerl.types import Metric


def disagreements(run: Path, algorithm: str) -> list[str]:
    """In what the records of a run differ from their definitions."""
    records = [Metric(**record) for record in read_metrics(run / "metrics.jsonl")]
    assert records
    catalogue = CATALOGUE.including(registry.load("algorithms", algorithm, Algorithm)().metrics, algorithm)
    return [problem for record in records if (problem := catalogue.problem(record))]
