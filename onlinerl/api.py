"""Runs from Python: start and resume them, and read them from a notebook. Documented in docs/python-api.md."""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from rich.console import Console

from onlinerl import config as configuration
from onlinerl.config import RunConfig
from onlinerl.errors import OnlineRLError, StoreError
from onlinerl.stores import labelled, querying, summary
from onlinerl.trackers.console import sturdy_console
from onlinerl.trackers.jsonl import read_metrics
from onlinerl.types import Metric
from onlinerl.views import tables, timeline
from onlinerl.views.tables import Format

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

    Frame: TypeAlias = pd.DataFrame | pa.Table

__all__ = ["Run", "list_runs", "load_config"]

Overrides = Sequence[str] | Mapping[str, Any]
"""Dotted keys and their values, `{"algorithm.name": "grpo"}`, or as they are typed, `["algorithm.name=grpo"]`."""


def load_config(path: str | Path, overrides: Overrides = ()) -> RunConfig:
    """Read a configuration file, with some of its keys replaced.

    Raises:
        ConfigError: naming the field, the cause and the fix.
    """
    return configuration.load(path, _typed(overrides))


def list_runs(folder: str | Path = "runs") -> list[Run]:
    """The runs in a folder, by name. One that is damaged is left out with a warning that says what is wrong with it."""
    found = []
    for path in summary.runs(folder):
        try:
            found.append(Run.open(path))
        except StoreError as error:
            warnings.warn(f"{path} is left out: {error.cause}; {error.fix}", stacklevel=2)
    return found


class Run:
    """A run directory: what a run has sampled, judged, trained and measured. Use `start` or `open`.

    Reading takes no lock and writes nothing: it works while another process works on the run, and shows what is durable by then.
    Methods that return tables return pandas data frames, or Arrow tables with `format="arrow"`, for which pandas is not needed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        """The run directory."""
        summary.status(self.path)  # refuses what is no run

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """A run that is there, finished or not.

        Raises:
            StoreError: if there is none.
        """
        return cls(path)

    @classmethod
    def start(cls, config: RunConfig, *, fresh: bool = False, quiet: bool = False) -> Run:
        """Start a run and wait until it is finished, as `onlinerl run` does.

        Args:
            config: see `load_config`.
            fresh: move an older run of this name aside first.
            quiet: print nothing.

        Raises:
            OnlineRLError: naming field, cause and fix.
            Interrupted: after SIGINT (Ctrl-C, or a notebook's stop button) or SIGTERM; `resume` goes on.
        """
        from onlinerl import app

        _require_main_thread()
        app.run(config, _console(quiet), fresh=fresh)
        return cls(config.directory)

    def resume(self, overrides: Overrides = (), *, quiet: bool = False) -> int:
        """Continue at the first unfinished phase and wait until the run is finished, as `onlinerl resume` does.

        Args:
            overrides: where it runs and when it stops, e.g. `{"iterations": 8}`.
            quiet: print nothing.

        Returns:
            the number of iterations run; 0 if nothing was left to do.

        Raises:
            OnlineRLError: naming field, cause and fix; also if another process works on the run.
            Interrupted: as for `start`.
        """
        from onlinerl import app

        _require_main_thread()
        return app.resume(self.path, _typed(overrides), _console(quiet))

    def relabel(self, overrides: Overrides, *, iteration: int | None = None, quiet: bool = False) -> str:
        """Let another oracle judge what this run was trained on, as `onlinerl relabel` does. Returns the version of that oracle.

        Args:
            overrides: keys of `oracle` and `ledger`, e.g. `{"oracle.name": "math_verifier"}`.
            iteration: only of this one.
            quiet: print nothing.

        Raises:
            OnlineRLError: naming field, cause and fix; also if another process works on the run.
            Interrupted: as for `start`; the same call goes on.
        """
        from onlinerl import relabelling

        _require_main_thread()
        return relabelling.relabel(self.path, _typed(overrides), _console(quiet), iteration=iteration)

    # --- how it stands ---

    @property
    def name(self) -> str:
        """Of the run."""
        return self.path.name

    @property
    def status(self) -> str:
        """`running`, `interrupted`, `failed` or `finished`."""
        return summary.status(self.path)

    @property
    def config(self) -> RunConfig:
        """Its whole configuration, defaults included."""
        return configuration.without_unread(configuration.load(self.path / "config.yaml", stored=True))

    @property
    def iterations(self) -> list[int]:
        """Those of which anything is recorded, ascending; 0 is the base model."""
        return list(summary.records(self.path))

    def export_path(self, iteration: int | None = None) -> Path:
        """Folder of an iterate in Hugging Face format, for `from_pretrained`; the last one that was kept by default.

        Raises:
            StoreError: if it was not kept.
        """
        kept = {int(path.name): path for path in (self.path / "exports").glob("[0-9]*") if path.name.isdigit()}
        chosen = max(kept, default=0) if iteration is None else iteration
        if chosen not in kept:
            known = (
                f"choose one of {', '.join(map(str, sorted(kept)))}" if kept else "wait until the first iteration is trained"
            )
            raise StoreError(
                f"{self.path} has no export of iteration {chosen}",
                field="iteration",
                fix=f"{known}; checkpoints.exports says which are kept",
            )
        return kept[chosen]

    # --- figures ---

    def summary(self) -> dict[str, Any]:
        """What the run has reached, as plain data: the same as `onlinerl show RUN --json`."""
        return summary.summarise(self.path)

    def history(self, *, format: Format = "pandas") -> Frame:
        """One row per iteration: reward, KL, win rate with its interval, seconds of each phase (`phases_train`, ...), and so on."""
        found = summary.summarise(self.path, extras=True)["iterations"]
        return tables.converted([tables.flat(row) for row in found], format)

    def metrics(self, name: str | None = None, *, format: Format = "pandas") -> Frame:
        """One row per figure, with its error bar where it is an estimate; docs/metrics.md explains each name.

        A figure that a resume measured again is there once, as it was measured last.
        """
        found = [record for record in read_metrics(self.path / "metrics.jsonl") if name in (None, record["name"])]
        return tables.converted(
            [{**record, **_joined(record)} for record in found], format, [field.name for field in fields(Metric)]
        )

    def timeline(self, *, format: Format = "pandas") -> Frame:
        """When each phase worked, on which parts: one row per finished phase."""
        found = [
            {
                "iteration": span.iteration,
                "phase": span.phase,
                "parts": list(span.parts),
                "began": span.began,
                "ended": span.ended,
                "waited": span.waited,
            }
            for span in timeline.spans(self.path)
        ]
        return tables.converted(found, format)

    # --- what was sampled and judged ---

    def tables(self) -> list[str]:
        """Names of the tables that `table` takes, e.g. `rollouts`, `verdicts`, `pairs`."""
        return summary.tables(self.path)

    def table(self, name: str, iteration: int | None = None, *, format: Format = "pandas") -> Frame:
        """The rows of a table that are durable by now, of one iteration or of all of them; the column `iteration` says which.

        Raises:
            StoreError: if there is no such table, or it is damaged.
        """
        chosen = self.iterations if iteration is None else [iteration]
        return tables.converted(tables.rows(self.path, name, chosen), format)

    def labels(self, iteration: int | None = None, *, oracle: str = "", format: Format = "pandas") -> Frame:
        """One row per label with what it is about: prompt, responses, verdict, words, cost, seeds. docs/usage.md explains the columns.

        Args:
            iteration: all of them by default.
            oracle: only of annotators and versions that contain it.
            format: see the class.
        """
        return tables.converted(list(labelled.rows(self.path, iteration, oracle)), format, labelled.SCHEMA.names)

    def query(self, statement: str, *, format: Format = "pandas") -> Frame:
        """What SQL finds in the table `labels`, which has the rows of `labels()`, as `onlinerl labels RUN --query` does.

        Args:
            statement: in DuckDB's SQL, e.g. `SELECT oracle_version, sum(usd) FROM labels GROUP BY ALL`.
            format: see the class.

        Raises:
            StoreError: if the run is damaged or the statement cannot be answered.
        """
        found = querying.query(self.path, statement)
        return tables.converted(found.to_pylist(), format, found.column_names)

    def samples(self, iteration: int | None = None, *, limit: int = 5, heldout: bool = False) -> list[dict[str, Any]]:
        """Prompts of an iteration with responses, scores and trained pairs: the same as `onlinerl show RUN --samples --json`.

        Args:
            iteration: the last one that has any by default.
            limit: how many prompts.
            heldout: the iterate's own answers to the held-out prompts, instead of what it was trained on.
        """
        chosen = max(summary.sampled(self.path, heldout=heldout), default=0) if iteration is None else iteration
        return summary.samples(self.path, chosen, limit, heldout=heldout)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}: {self.status}, iterations {', '.join(map(str, self.iterations)) or 'none'})"


def _typed(overrides: Overrides) -> list[str]:
    """Overrides as they are typed on the command line."""
    if isinstance(overrides, str):
        raise OnlineRLError(
            f"{overrides!r} is one text",
            field="overrides",
            fix="give a mapping, {'iterations': 8}, or a list, ['iterations=8']",
        )
    if isinstance(overrides, Mapping):
        return [f"{key}={json.dumps(value, default=str)}" for key, value in overrides.items()]
    return list(overrides)


def _joined(record: Mapping[str, Any]) -> dict[str, str]:
    """Labels as one text, `reason=tie`: a mapping is no cell of a table."""
    return {"labels": " ".join(f"{key}={value}" for key, value in record["labels"].items())}


def _console(quiet: bool) -> Console:
    return Console(quiet=True) if quiet else sturdy_console()


def _require_main_thread() -> None:
    if threading.current_thread() is not threading.main_thread():
        raise OnlineRLError(
            "a run listens for SIGINT and SIGTERM, which Python allows in the main thread only",
            field="Run",
            fix="call it from the main thread, or start a process of its own: `onlinerl run ...`",
        )
