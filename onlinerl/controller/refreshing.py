"""What a run knows of the trainings of its reward model: which weights are in use, and what they may learn from.

All of it follows from the records and tables on the disk, so a resume knows the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from onlinerl.protocols.oracle import Oracle
from onlinerl.protocols.refreshing import Labelled
from onlinerl.protocols.store import REFRESH_LABELS, ROLLOUTS, Store
from onlinerl.types import Prompt, RefreshRecord, Verdict


def records(store: Store, before: int) -> Iterator[tuple[int, RefreshRecord]]:
    """Of the iterations before this one, newest first."""
    found = ((t, store.phases(t).get("refresh")) for t in range(before - 1, 0, -1))
    return ((t, record) for t, record in found if record is not None)


def in_use(store: Store, before: int) -> list[str]:
    """The weights that were taken before an iteration was refreshed, those in use first; none where the oracle has those that the run
    began with."""
    return [record["weights"] for _, record in records(store, before) if record["weights"] is not None]


def follow(oracle: Oracle, store: Store, before: int) -> None:
    """An oracle that follows the policy takes on the iterate that it had before an iteration was refreshed; none where it has the model that the
    run began with.

    Raises:
        StoreError: if the export is not there, or damaged.
    """
    taken = in_use(store, before)
    if oracle.following is not None and taken:
        oracle.following.reload(str(store.require("exports", int(Path(taken[0]).name))))


def last_training(store: Store, before: int) -> int:
    """The newest iteration before this one with a training, taken or not; 0 if there was none."""
    return next((t for t, record in records(store, before) if record["trained"]), 0)


def versions(store: Store, before: int) -> set[str]:
    """Of the oracle, that it began with and as the trainings before an iteration have left it."""
    return {version for _, record in records(store, before) for version in record["oracle_versions"]}


def labelled(store: Store, prompts: Mapping[str, Prompt], until: int) -> Iterator[Labelled]:
    """What the other oracle has said of responses up to an iteration, in the order of iterations and prompts.

    Args:
        store: of the run.
        prompts: the training prompts, by id.
        until: the last iteration.
    """
    for t in range(1, until + 1):
        said = {label.prompt_id: label.result for label in store.labels(t, REFRESH_LABELS)}
        judged = {name: verdict for name, verdict in sorted(said.items()) if isinstance(verdict, Verdict)}
        groups = store.groups(t, ROLLOUTS, prompts).select(judged)
        for verdict, group in zip(judged.values(), groups, strict=True):
            if group is not None:
                yield Labelled(iteration=t, group=group, verdict=verdict)
