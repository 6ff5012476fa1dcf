"""What the oracle of a run has said of what was sampled, read without the run's lock."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from onlinerl.errors import StoreError
from onlinerl.protocols.store import ROLLOUTS, SELECTION, VERDICTS
from onlinerl.stores import rows, summary
from onlinerl.stores._tables import TableFiles
from onlinerl.stores.tables import StoredTable
from onlinerl.types import Group, Prompt, Verdict


def judged(run: Path) -> Iterator[tuple[int, Group, Verdict]]:
    """Iteration, group and verdict of every group that was judged, of iterations whose judging is finished. A group that later iterations have
    reused is there once, in the iteration that sampled it.

    Raises:
        StoreError: if there is no run, or its tables are damaged.
    """
    finished = [t for t, phases in sorted(summary.records(run).items()) if t and "label" in phases]
    if not finished:
        raise StoreError(
            f"{run} has judged nothing yet", field="preferences.runs", fix="wait for its first iteration, or name another run"
        )
    kept: StoredTable[Prompt] = StoredTable(TableFiles(run / "prompts", "train"), rows.PROMPTS)
    prompts = {prompt.id: prompt for prompt in kept}
    for iteration in finished:
        folder = run / "iterations" / f"{iteration:04d}"
        chosen = StoredTable(TableFiles(folder, SELECTION), rows.SELECTION)
        reused = {one.prompt_id for one in chosen if one.reused_from is not None}
        said = StoredTable(TableFiles(folder, VERDICTS), rows.LABELS)
        # The latest: one of which replies had failed may have been asked for again.
        labels = list({label.prompt_id: label for label in said if label.prompt_id not in reused}.values())
        groups = StoredTable(TableFiles(folder, ROLLOUTS), rows.groups_of(prompts)).select(label.prompt_id for label in labels)
        for label, group in zip(labels, groups, strict=True):
            if group is not None and isinstance(label.result, Verdict):
                yield iteration, group, label.result
