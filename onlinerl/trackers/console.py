"""What a person sees: a progress bar per phase with its throughput, one line per finished phase, and the table of iterations."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
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
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from onlinerl.protocols import Tracker

__all__ = ["ConsoleTracker", "render_table", "sturdy_console"]

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


class ConsoleTracker(Tracker):
    """Live bars on a terminal, plain lines anywhere else."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._progress: Progress | None = None
        self._running: _Running | None = None

    def phase_started(self, iteration: int, phase: str, total: int | None, unit: str) -> None:
        """Show a bar."""
        self._stop()
        now = time.monotonic()
        self._running = _Running(iteration=iteration, phase=phase, total=total, unit=unit, started=now, reported=now)
        if self._console.is_terminal:
            self._progress = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                _RateColumn(unit),
                TimeElapsedColumn(),
                console=self._console,
                transient=True,
            )
            self._progress.add_task(_head(iteration, phase), total=total)
            self._progress.start()

    def phase_advanced(self, iteration: int, phase: str, amount: int) -> None:
        """Move the bar."""
        running, now = self._running, time.monotonic()
        if running is None:
            return
        running.done += amount
        if self._progress is not None:
            self._progress.advance(self._progress.task_ids[0], amount)
        elif now - running.reported >= QUIET_S:
            running.reported = now
            of = f" of {running.total}" if running.total else ""
            self._line(f"{_head(iteration, phase)}  {running.done}{of} {running.unit} after {now - running.started:.0f} s")

    def phase_finished(self, iteration: int, phase: str, seconds: float) -> None:
        """Replace the bar by one line."""
        running = self._running
        self._stop()
        work = ""
        if running is not None and running.phase == phase and running.done:
            work = f"{running.done:>8} {running.unit}  {_rate(running.done, seconds, running.unit)}"
        self._line(f"{_head(iteration, phase)}  {seconds:>8.1f} s  {work}".rstrip())

    def note(self, text: str) -> None:
        """Show a line."""
        self._line(text)

    def close(self) -> None:
        """Remove the bar. May be called twice."""
        self._stop()

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._progress = self._running = None

    def _line(self, text: str) -> None:
        # Texts may hold square brackets and paths: no markup, no colours guessed from content, no wrapping in log files.
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


_PHASES = ("sample", "label", "train", "checkpoint", "sync", "evaluate", "commit")
_FIGURES = {"reward": "reward", "kl_ref": "KL", "win_rate": "win rate", "length": "length"}
_SHORT = {"checkpoint": "save", "evaluate": "eval"}


def render_table(summary: Mapping[str, Any]) -> Table:
    """The iterations of a run (see `stores.summary.summarise`) as a table; `length` is shown where the summary has it."""
    title = " ".join(filter(None, (summary["run"], f"({summary['algorithm']})" if summary["algorithm"] else None)))
    table = Table(
        title=Text(title),
        caption=Text("; ".join(_remarks(summary["iterations"]))),
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("it", justify="right")
    table.add_column("reward", justify="right")
    table.add_column("KL base", justify="right")
    table.add_column("win rate vs base", justify="right", no_wrap=True)
    table.add_column("len", justify="right")
    # One narrow column per phase that took any time: the whole table fits a terminal of 80 columns.
    names = list(dict.fromkeys(n for row in summary["iterations"] for n, s in row["phases"].items() if s >= 0.5))
    order = [n for n in _PHASES if n in names] + [n for n in names if n not in _PHASES]
    for name in order:
        table.add_column(str(_SHORT.get(name, name)), justify="right")
    for row in summary["iterations"]:
        cells = (
            str(row["iteration"]),
            _number(row["reward"], ".3f"),
            _kl(row),
            _win_rate(row["win_rate"]),
            _number(row.get("length"), ".1f"),
            *(_number(row["phases"].get(name), ".0f") for name in order),
        )
        table.add_row(*map(Text, cells))
    return table


def _remarks(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What must be said about the figures and the iterations of the table."""
    remarks = ["phases in seconds"]
    few = {name for row in rows for name in row.get("insufficient") or ()}
    if named := [shown for name, shown in _FIGURES.items() if name in few]:
        remarks.append(f"too few prompts to decide by: {', '.join(named)}")
    if any(row.get("kl_estimator") == "k1" for row in rows):
        remarks.append("k1: there k3 is the noisier estimate of the KL")
    if any(row.get("kl_conflict") for row in rows):
        remarks.append("!: the two estimates of the KL disagree")
    for row in rows:
        if row["status"] == "keep":
            remarks.append(f"iteration {row['iteration']} gave nothing to learn")
        elif row["status"] != "promoted":
            remarks.append(f"iteration {row['iteration']} is {row['status']}")
    return remarks


@dataclass(kw_only=True, slots=True)
class _Running:
    iteration: int
    phase: str
    total: int | None
    unit: str
    started: float
    reported: float
    done: int = 0


class _RateColumn(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        """E.g. 12.3 prompts/s."""
        return Text(_rate(task.completed, task.elapsed or 0.0, self._unit))


def _head(iteration: int, phase: str) -> str:
    return f"iteration {iteration}  {phase:<10}"


def _rate(done: float, seconds: float, unit: str) -> str:
    return f"{done / seconds:.1f} {unit}/s" if done and seconds > 0 else ""


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _kl(row: Mapping[str, Any]) -> str:
    estimator = " k1" if row.get("kl_estimator") == "k1" else ""
    return _number(row["kl_ref"], ".2f") + estimator + ("!" if row.get("kl_conflict") else "")


def _win_rate(rate: Mapping[str, float | None] | None) -> str:
    if rate is None or rate["value"] is None:
        return "-"
    low, high = rate["low"], rate["high"]
    return f"{rate['value']:.2f}" + (f" [{low:.2f}, {high:.2f}]" if low is not None and high is not None else "")
