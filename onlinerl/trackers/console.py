"""What a person sees: a progress bar per phase with its throughput, one line per finished phase, and the table of iterations."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, cast

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from onlinerl.errors import ConfigError
from onlinerl.graph import NAMES
from onlinerl.metrics.catalogue import CATALOGUE
from onlinerl.metrics.collection import Catalogue
from onlinerl.metrics.definition import Column
from onlinerl.protocols.tracker import Tracked, Tracker, TrackerConfig

__all__ = ["ConsoleTracker", "OnConsole", "render_table", "sturdy_console"]

QUIET_S = 30.0
"""Without a terminal, a long phase says how far it is this often."""


def sturdy_console() -> Console:
    """A console on stdout that cannot end a run: when its reader is gone it falls silent, which is said once on stderr, and a letter
    that the terminal does not know becomes a question mark. Square brackets are text: paths and ids may hold them."""
    return Console(file=cast(IO[str], _Sturdy()), markup=False)


class _Sturdy:
    """`sys.stdout`, whatever it is at the moment, for a writer that must not fail."""

    def __init__(self) -> None:
        self._gone = False

    def write(self, text: str) -> int:
        """All of it, as well as it can be."""
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._attempt(self._stream.write, text.encode(encoding, "replace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        """Let the reader have it."""
        self._attempt(self._stream.flush)

    @property
    def _stream(self) -> Any:
        # While a progress bar is shown, rich puts a proxy there that would write back to us.
        return getattr(sys.stdout, "rich_proxied_file", sys.stdout)

    def _attempt(self, act: Callable[..., object], *arguments: str) -> None:
        if self._gone:
            return
        try:
            act(*arguments)
        except (OSError, ValueError) as error:  # the reader has gone, or the stream was closed
            self._gone = True
            logging.getLogger(__name__).warning("stdout takes no more text, and the run goes on without it: %s", error)
            with contextlib.suppress(OSError, ValueError):  # or the interpreter fails when it flushes at its end
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class OnConsole(TrackerConfig):
    """What every run says."""

    name: str = "console"

    def check(self) -> None:
        """Nobody has to ask for it."""
        raise ConfigError("is what every run has", field="metrics.trackers", fix="leave it out")

    def open(self, run: Tracked) -> ConsoleTracker:
        """On the console of the command."""
        return ConsoleTracker(run.console)


class ConsoleTracker(Tracker):
    """Live bars on a terminal, plain lines anywhere else."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._progress: Progress | None = None
        self._running: dict[tuple[int, str], _Running] = {}

    def phase_started(self, iteration: int, phase: str, total: int | None, unit: str) -> None:
        """Show a bar."""
        self._remove(iteration, phase)
        now = time.monotonic()
        running = _Running(iteration=iteration, phase=phase, total=total, unit=unit, started=now, reported=now)
        self._running[iteration, phase] = running
        if not self._console.is_terminal:
            return
        if self._progress is None:
            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                _RateColumn(),
                TimeElapsedColumn(),
            )
            self._progress = Progress(*columns, console=self._console, transient=True)
            self._progress.start()
        running.bar = self._progress.add_task(_head(iteration, phase), total=total, unit=unit)

    def phase_advanced(self, iteration: int, phase: str, amount: int) -> None:
        """Move the bar."""
        running, now = self._running.get((iteration, phase)), time.monotonic()
        if running is None:
            return
        running.done += amount
        if self._progress is not None and running.bar is not None:
            self._progress.advance(running.bar, amount)
        elif now - running.reported >= QUIET_S:
            running.reported = now
            of = f" of {running.total}" if running.total else ""
            self._line(f"{_head(iteration, phase)}  {running.done}{of} {running.unit} after {now - running.started:.0f} s")

    def phase_finished(self, iteration: int, phase: str, seconds: float) -> None:
        """Replace the bar by one line."""
        running = self._remove(iteration, phase)
        work = ""
        if running is not None and running.done:
            work = f"{running.done:>8} {running.unit}  {_rate(running.done, seconds, running.unit)}"
        self._line(f"{_head(iteration, phase)}  {seconds:>8.1f} s  {work}".rstrip())

    def note(self, text: str) -> None:
        """Show a line."""
        self._line(text)

    def close(self) -> None:
        """Remove all bars. May be called twice."""
        for iteration, phase in [*self._running]:
            self._remove(iteration, phase)

    def _remove(self, iteration: int, phase: str) -> _Running | None:
        running = self._running.pop((iteration, phase), None)
        if self._progress is not None and not self._running:
            self._progress.stop()
            self._progress = None
        elif self._progress is not None and running is not None and running.bar is not None:
            self._progress.remove_task(running.bar)
        return running

    def _line(self, text: str) -> None:
        # Texts may hold square brackets and paths: no markup, no colours guessed from content, no wrapping in log files.
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


_COLUMNS = {"annotate": "train", "checkpoint": "save", "answer": "eval", "measure": "eval"}
"""Where the seconds of a phase are shown, if not under its own name."""


def render_table(summary: Mapping[str, Any], catalogue: Catalogue = CATALOGUE) -> Table:
    """The iterations of a run (see `stores.summary.summarise`) as a table: the metrics with a column, and the seconds of each phase."""
    columns = catalogue.columns()
    title = " ".join(filter(None, (summary["run"], f"({summary['algorithm']})" if summary["algorithm"] else None)))
    # One narrow column per group of phases that took any time: the whole table fits a terminal of 80 columns.
    seconds = [_seconds(row["phases"]) for row in summary["iterations"]]
    slow = {name for row in seconds for name, s in row.items() if s >= 0.5}
    groups = [name for name in dict.fromkeys([*map(_column, NAMES), *sorted(slow)]) if name in slow]
    table = Table(
        title=Text(title),
        caption=Text("; ".join(_remarks(summary["iterations"], catalogue))),
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0) if len(groups) <= 5 else 0,
    )
    table.add_column("it", justify="right")
    for column in columns.values():
        table.add_column(column.header, justify="right", no_wrap=column.interval)
    for name in groups:
        table.add_column(name, justify="right")
    for row, took in zip(summary["iterations"], seconds, strict=True):
        cells = (
            str(row["iteration"]),
            *(_cell(name, column, row) for name, column in columns.items()),
            *(_number(took.get(name), 0) for name in groups),
        )
        table.add_row(*map(Text, cells))
    return table


def _column(phase: str) -> str:
    return _COLUMNS.get(phase, phase)


def _seconds(phases: Mapping[str, float]) -> dict[str, float]:
    """By column."""
    seconds: dict[str, float] = {}
    for name, took in phases.items():
        seconds[_column(name)] = seconds.get(_column(name), 0.0) + took
    return seconds


def _remarks(rows: Sequence[Mapping[str, Any]], catalogue: Catalogue) -> list[str]:
    """What must be said about the figures and the iterations of the table."""
    columns = catalogue.columns()
    units = [f"{column.short} in {catalogue[name].unit}" for name, column in columns.items() if column.say_unit]
    remarks = [*units, "phases in seconds"]
    few = {name for row in rows for name in row.get("insufficient") or ()}
    if named := [column.short for name, column in columns.items() if name in few]:
        remarks.append(f"too few prompts to decide by: {', '.join(named)}")
    if any(row.get("kl_estimator") == "k1" for row in rows):
        remarks.append("k1: there k3 is the noisier estimate of the KL")
    if any(row.get("kl_conflict") for row in rows):
        remarks.append("!: the two estimates of the KL disagree")
    if judges := list(dict.fromkeys(version for row in rows for version in row.get("oracle_versions") or ())):
        first, *later = judges
        others = [str(row["iteration"]) for row in rows if not {first}.issuperset(row.get("oracle_versions") or ())]
        if others:
            remarks.append(
                f"not to be compared with what {first} judged alone: iteration{'s' * (len(others) > 1)} {', '.join(others)}, "
                f"judged by another version of the oracle ({', '.join(later)})"
            )
    remarks += [_refreshed(row) for row in rows if row.get("refreshed")]
    remarks += _reused([row for row in rows if row.get("reused")])
    for row in rows:
        if row["status"] == "keep":
            remarks.append(f"iteration {row['iteration']} gave nothing to learn")
        elif row["status"] != "promoted":
            remarks.append(f"iteration {row['iteration']} is {row['status']}")
    return remarks


def _refreshed(row: Mapping[str, Any]) -> str:
    """What a training of the reward model has come to."""
    said = row["refreshed"]
    before, after = (_number(said[name]["value"], 3) for name in ("before", "after"))
    became = f"was trained after iteration {row['iteration']}, held-out accuracy {before} -> {after}"
    if not said["taken"]:
        return f"the reward model {became}: not taken"
    shift = (said["reward_shift"] or {}).get("value")
    return f"the reward model {became}; the same answers score {_number(shift, 3)} higher"


def _reused(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """How many prompts were not sampled, how old their responses are, and what that has saved."""
    ages = Counter[str]()
    for row in rows:
        ages.update(row["reused"]["prompts"])
    if not ages:
        return []
    old = ", ".join(f"{ages[age]} from {age} iteration{'s' * (age != '1')} before" for age in sorted(ages, key=int))
    saved = sum(row["reused"]["tokens"] or 0 for row in rows)
    return [f"responses to {ages.total()} prompts were reused ({old}), {saved:,} tokens not sampled"]


@dataclass(kw_only=True, slots=True)
class _Running:
    iteration: int
    phase: str
    total: int | None
    unit: str
    started: float
    reported: float
    done: int = 0
    bar: TaskID | None = None


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        """E.g. 12.3 prompts/s."""
        return Text(_rate(task.completed, task.elapsed or 0.0, task.fields["unit"]))


def _head(iteration: int, phase: str) -> str:
    return f"iteration {iteration}  {phase:<10}"


def _rate(done: float, seconds: float, unit: str) -> str:
    return f"{done / seconds:.1f} {unit}/s" if done and seconds > 0 else ""


def _cell(name: str, column: Column, row: Mapping[str, Any]) -> str:
    """A figure of an iteration, with its interval or with what makes it doubtful, where the summary has that."""
    value = row.get(name)
    if not column.interval:
        return _number(value, column.digits) + (_kl_marks(row) if name == "kl_ref" else "")
    if value is None or value["value"] is None:
        return "-"
    bounds = ", ".join(_number(value[end], column.digits) for end in ("low", "high") if value[end] is not None)
    return _number(value["value"], column.digits) + (f" [{bounds}]" if bounds else "")


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _kl_marks(row: Mapping[str, Any]) -> str:
    return (" k1" if row.get("kl_estimator") == "k1" else "") + ("!" if row.get("kl_conflict") else "")
