"""Which versions of the oracle gave the verdicts of a run: what was paid for is kept when the oracle is changed, and that is said."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from onlinerl.errors import StoreError
from onlinerl.protocols.store import EVALUATION_VERDICTS, VERDICTS
from onlinerl.stores import _manifest, summary
from onlinerl.stores._tables import TableFiles


def count(folder: Path, phases: Mapping[str, Mapping[str, Any]]) -> Counter[str]:
    """How many verdicts of an iteration each version gave, from its folder and the records of its finished phases.

    Finished phases have recorded it; those of older versions have not, and their tables are read, as are those that still grow.
    """
    found: Counter[str] = Counter()
    for phase, tables in (("label", _label_tables), ("measure", _measure_tables)):
        recorded = phases.get(phase, {}).get("oracle_versions")
        found.update(_read(folder, tables(folder)) if recorded is None else recorded)
    return found


def _label_tables(folder: Path) -> list[str]:
    return [VERDICTS]


def _measure_tables(folder: Path) -> list[str]:
    return [EVALUATION_VERDICTS, *sorted(name for name in _manifest.tables(folder) if name.startswith("comparisons_"))]


def _read(folder: Path, tables: Iterable[str]) -> Counter[str]:
    found: Counter[str] = Counter()
    for table in tables:
        with contextlib.suppress(StoreError):  # whoever needs a damaged table refuses it
            for rows in TableFiles(folder, table).chunks(["oracle_version"]):
                found.update(row["oracle_version"] for row in rows if row.get("oracle_version") is not None)
    return found


def caveat(path: str | Path, now: str, own: Collection[str] = ()) -> str | None:
    """What to know before a run goes on with an oracle of version `now`; None if it has no verdicts of another one.

    Args:
        path: of the run.
        now: of the oracle.
        own: versions that the run has made itself, by training the oracle further, and the one that it began with.

    Raises:
        StoreError: if there is no run or it is damaged.
    """
    others: Counter[str] = Counter()
    mixed = []
    for t, phases in summary.records(path).items():
        found = count(Path(path) / "iterations" / f"{t:04d}", phases)
        other = {version: n for version, n in found.items() if version != now and version not in own}
        others.update(other)
        if other and t > 0 and "label" not in phases:
            mixed.append(t)
    if not others:
        return None
    known = ", ".join(f"{n} by {version}" for version, n in others.items())
    batch = f"; iteration {mixed[0]} may be trained on verdicts of both" if mixed else ""
    return (
        f"the oracle is {now} now, and this run has verdicts of another version: {known}. They are kept{batch}. Rewards of different "
        "versions cannot be compared: `onlinerl show` names the iterations. To stay with one version, stop the run, restore the oracle as "
        "it was and resume; otherwise nothing is to be done"
    )
