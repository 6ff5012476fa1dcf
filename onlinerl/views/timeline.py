"""When each phase of a run worked, on which parts, and how long each part had nothing to do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onlinerl import graph
from onlinerl.stores.summary import records

PARTS = ("engine", "oracle", "learner")
_PARTS_OF = {
    phase.name: tuple(part for part in PARTS if part in phase.alone | phase.shares)
    for phase in graph.phases(stream=False, evaluate_beside=False, reference_samples=True, mixture_samples=True, anchors=True)
}
_MICRO = 1e6
WIDTH = 48


@dataclass(frozen=True, kw_only=True)
class Span:
    """One phase of one iteration. Times are seconds since 1970."""

    iteration: int
    phase: str
    parts: tuple[str, ...]
    began: float
    ended: float
    waited: float = 0.0
    """Of these seconds, those in which it waited for the phase that it follows."""


def spans(run: str | Path) -> list[Span]:
    """Every finished phase in the order in which they began. A phase that was resumed counts from its last start.

    Raises:
        StoreError: if there is no run or it is damaged.
    """
    found = [
        Span(
            iteration=iteration,
            phase=name,
            parts=_PARTS_OF.get(name, ()),
            began=record["began"],
            ended=record["ended"],
            waited=record.get("waited") or 0.0,
        )
        for iteration, phases in records(run).items()
        for name, record in phases.items()
        if record.get("began") is not None  # runs of older versions did not keep it
    ]
    return sorted(found, key=lambda span: (span.began, span.ended))


def idle(spans: Sequence[Span]) -> dict[str, float]:
    """By part: its share of the time in which any phase ran, between 0 and 1, during which it had nothing to do.

    A phase that followed another one is counted as if it had done all its waiting first.
    """
    total = working(spans)
    if total <= 0:
        return {}
    shares = {}
    for part in PARTS:
        mine = [span for span in spans if part in span.parts]
        busy = _covered((span.began + min(span.waited, span.ended - span.began), span.ended) for span in mine)
        shares[part] = 1.0 - busy / total
    return shares


def working(spans: Sequence[Span]) -> float:
    """Seconds in which any phase ran."""
    return _covered((span.began, span.ended) for span in spans)


def text(spans: Sequence[Span]) -> list[str]:
    """A line per phase, with a bar on the time axis of the run, and a line per part."""
    if not spans:
        return ["nothing is recorded yet"]
    start, end = min(span.began for span in spans), max(span.ended for span in spans)
    scale = WIDTH / max(end - start, 1e-9)
    lines = [f"{'it':>4}  {'phase':<10}  {'at':>9}  {'seconds':>9}"]
    for span in spans:
        left = min(WIDTH - 1, int((span.began - start) * scale))
        length = max(1, round((span.ended - span.began) * scale))
        bar = (" " * left + "#" * length)[:WIDTH]
        head = f"{span.iteration:>4}  {span.phase:<10}  {span.began - start:>9.1f}  {span.ended - span.began:>9.1f}"
        lines.append(f"{head}  |{bar:<{WIDTH}}|  {', '.join(span.parts)}".rstrip())
    lines += [f"{part}: idle {share:.0%} of the time" for part, share in idle(spans).items()]
    return lines


def chrome_trace(spans: Sequence[Span]) -> dict[str, Any]:
    """The same in the Trace Event format, for chrome://tracing and ui.perfetto.dev: a row per part, a slice per phase."""
    start = min((span.began for span in spans), default=0.0)
    rows = [*PARTS, "controller"]
    names = [{"name": "thread_name", "ph": "M", "pid": 1, "tid": row, "args": {"name": name}} for row, name in enumerate(rows)]
    slices = [
        {
            "name": f"{span.phase} {span.iteration}",
            "cat": span.phase,
            "ph": "X",
            "pid": 1,
            "tid": rows.index(part),
            "ts": (span.began - start) * _MICRO,
            "dur": (span.ended - span.began) * _MICRO,
            "args": {"iteration": span.iteration, "waited_s": span.waited},
        }
        for span in spans
        for part in span.parts or ("controller",)
    ]
    return {"traceEvents": names + slices, "displayTimeUnit": "ms"}


def _covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Seconds that lie in any of the intervals."""
    total, reached = 0.0, float("-inf")
    for began, ended in sorted(intervals):
        total += max(0.0, ended - max(began, reached))
        reached = max(reached, ended)
    return total
