"""A run that a scheduler stops after some time, and a phase that does not fit into it.

Most phases keep what they have done when they are stopped. Training, checkpoints and pushes begin again; one of them that is longer
than the time limit would be begun, stopped and queued again for ever. A launcher says the limit in ONLINERL_TIME_LIMIT_S (seconds from
the start of the run to the signal that stops it). What earlier iterations took is an estimate, of which the run warns. That the very
same phase was stopped after as much time as there is now, and left nothing behind, is a proof, and the run refuses to try again.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from onlinerl.errors import ConfigError
from onlinerl.graph import NAMES, PHASES, of_iteration
from onlinerl.protocols.tracker import Tracker

VARIABLE = "ONLINERL_TIME_LIMIT_S"
MARGIN = 1.1
"""A time limit must be this much longer than the one that was not enough."""

KEEPING = frozenset(phase.name for phase in PHASES if phase.keeps)
"""Phases that go on where they were stopped."""


class Run(Protocol):
    """What is asked of the store."""

    @property
    def manifest(self) -> dict[str, Any]:
        """How the run stands."""
        ...

    def phases(self, iteration: int) -> Mapping[str, Any]:
        """Finished phases of an iteration and their records."""
        ...

    def rows_from(self, iteration: int) -> int:
        """Rows in the tables of an iteration and of all later ones."""
        ...


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a run stands."""

    iteration: int
    phase: str
    rows: int
    """Rows on disk that the phase goes on from, and those of later iterations, which were worked on beside it: more of them are progress.
    Not bytes: a journal shrinks when it becomes a part."""

    @classmethod
    def of(cls, run: Run) -> Place:
        """The first phase that is not finished."""
        iteration = 0
        while "commit" in (done := run.phases(iteration)):
            iteration += 1
        order = [phase.name for phase in of_iteration(PHASES, iteration)]
        # Training counts from the moment its checkpoint is complete.
        phase = next(p for p in order if p not in done or (p == "train" and "checkpoint" not in done))
        return cls(iteration=iteration, phase=phase, rows=run.rows_from(iteration if phase in KEEPING else iteration + 1))


class PhaseClock(Tracker):
    """How long the phase that a run is in has lasted."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._began = self._since = time.monotonic()
        self._start_up: float | None = None
        self._place = Place.of(run)
        self._moved = False

    def phase_started(self, iteration: int, phase: str, total: int | None, unit: str) -> None:
        """The first phase after `start` ends the start-up."""
        if self._start_up is None and phase != "start":
            self._start_up = time.monotonic() - self._began

    def phase_finished(self, iteration: int, phase: str, seconds: float) -> None:
        """On to the next phase, if the one that is over is not only a part of one."""
        now = Place.of(self._run)
        if (now.iteration, now.phase) != (self._place.iteration, self._place.phase):
            self._place, self._since, self._moved = now, time.monotonic(), True

    def stopped(self) -> dict[str, Any]:
        """For the manifest: the phase that the run is in, and the time that it had, with a start-up before it."""
        seconds = time.monotonic() - self._since + (self._start_up or 0.0 if self._moved else 0.0)
        return {"iteration": self._place.iteration, "phase": self._place.phase, "rows": self._place.rows, "seconds": seconds}


def given() -> float | None:
    """The time limit in seconds, if there is one.

    Raises:
        ConfigError: if it is no number.
    """
    text = os.environ.get(VARIABLE, "")
    try:
        seconds = float(text) if text else None
        if seconds is not None and math.isnan(seconds):
            raise ValueError
        return seconds
    except ValueError:
        raise ConfigError(f"is {text!r}, which is no number of seconds", field=VARIABLE, fix="correct or unset it") from None


def check(run: Run, limit_s: float) -> list[str]:
    """What to say about a time limit before a run goes on.

    Raises:
        ConfigError: if an earlier attempt has shown that the phase does not fit.
    """
    here, stopped = Place.of(run), run.manifest.get("stopped")
    if stopped is not None and (stopped["iteration"], stopped["phase"]) == (here.iteration, here.phase):
        progress = here.rows != stopped.get("rows")  # which older versions did not record
        if not progress and limit_s <= MARGIN * stopped["seconds"]:
            raise ConfigError(
                f"{here.phase} of iteration {here.iteration} was stopped after {stopped['seconds']:.0f} s with nothing to go on "
                f"from, and there are only {limit_s:.0f} s this time",
                field=VARIABLE,
                fix="ask for a longer time limit, or start a new run whose iterations are smaller (prompts.per_iteration)",
            )
    notes = [f"time limit: {limit_s:.0f} s"]
    for phase in (p for p in NAMES if p not in KEEPING):
        took = [run.phases(i).get(phase, {}).get("seconds") or 0.0 for i in range(here.iteration + 1)]
        if (longest := max(took)) > limit_s:
            notes.append(
                f"warning: {phase} took {longest:.0f} s in iteration {took.index(longest)}; if it does not fit into the time limit, "
                "it begins again each time: ask for more time"
            )
    return notes
