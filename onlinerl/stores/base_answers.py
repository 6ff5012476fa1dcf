"""What the base model answers to the held-out prompts, and how that is judged: the same in all runs that ask for it in the same way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from onlinerl.protocols.store import EVALUATION, EVALUATION_VERDICTS
from onlinerl.stores import rows, summary
from onlinerl.stores._tables import TableFiles
from onlinerl.stores.directory import RunDirectory
from onlinerl.stores.tables import StoredTable
from onlinerl.types import Cost, Failure, Group, Label, Verdict


def measured(run: Path) -> bool:
    """Whether a run has measured its base model, and every held-out prompt was answered and judged."""
    if "measure" not in summary.records(run).get(0, {}):
        return False
    whole = all(not group.rejected for group in _answers(run))
    return whole and not any(isinstance(label.result, Failure) for label in _labels(run))


def take_over(store: RunDirectory, source: Path, oracle_version: str | None) -> None:
    """Copy them from another run into one that has none yet; every byte that is read is compared with its checksum.

    The run then finds its answers on the disk, as after a resume, and measures them itself. It is on the caller that both runs would
    have asked for the same.

    Args:
        store: of the run that takes them over.
        source: the other run.
        oracle_version: of the oracle as it is now; what another version has judged, or none that is known, is judged again.

    Raises:
        StoreError: if the tables of `source` are damaged.
    """
    answers = store.groups(0, EVALUATION)
    answers.append(list(_answers(source)))
    answers.seal()
    labels = list(_labels(source))
    judges = {label.result.oracle_version for label in labels if isinstance(label.result, Verdict)}
    if labels and judges == {oracle_version}:  # an oracle that only compares has not been asked
        verdicts = store.labels(0, EVALUATION_VERDICTS)
        verdicts.append([_reused(label, source) for label in labels])
        verdicts.seal()
        store.update_manifest(base_verdicts_of=source.name)
    store.update_manifest(base_answers_of=source.name)


def _reused(label: Label, source: Path) -> Label:
    """A label that this run has not paid for."""
    assert isinstance(label.result, Verdict)
    if label.reused_from is not None:
        return label
    place = f"{source.name}/iterations/0000/{EVALUATION_VERDICTS}"
    return replace(label, result=replace(label.result, cost=Cost()), reused_from=place, saved=label.result.cost)


def _answers(run: Path) -> StoredTable[Group]:
    return StoredTable(TableFiles(run / "iterations" / "0000", EVALUATION), rows.groups_of(None))


def _labels(run: Path) -> StoredTable[Label]:
    return StoredTable(TableFiles(run / "iterations" / "0000", EVALUATION_VERDICTS), rows.LABELS)
