"""A sweep as one table and one plot: what each combination has reached, and at which cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from onlinerl.errors import StoreError
from onlinerl.stores import summary
from onlinerl.stores.sweeps import SweepRecord
from onlinerl.views import timeline
from onlinerl.views.svg import Line, Panel, render

PLOT = "sweep.svg"
_JUDGED = ("verdicts", "evaluation_verdicts", "anchor_verdicts", "comparisons_")
"""Tables of verdicts, by the beginning of their names."""


def summarise(folder: Path, record: SweepRecord) -> dict[str, Any]:
    """What the runs of a sweep have reached, as plain JSON.

    Returns `{"sweep", "runs": [{"name", "choices", "status", "state", "iterations", "reward", "kl_ref", "kl_estimator", "win_rate",
    "length", "tokens", "seconds", "labels", "usd", "insufficient", "history"}], "refused": {name: reason}}`. Figures are those of the last iterate
    that was measured, and None before there is one; `iterations` is its number. `tokens` were sampled to train on, `seconds` are those
    in which any phase ran, `labels` the verdicts that were asked for, and `usd` what they cost by the oracle's own account. `history` has
    iteration, reward, kl_ref and win_rate of every iterate that was measured.
    """
    runs = [_run(folder / name, name, choices, record.failed.get(name)) for name, choices in record.runs.items()]
    return {"sweep": record.name, "runs": runs, "refused": dict(record.refused)}


def _run(path: Path, name: str, choices: Mapping[str, str], failure: str | None) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "choices": dict(choices), "status": "failed" if failure else "not started"}
    row["state"] = f"failed: {failure}" if failure else "not started"
    figures = ("iterations", "reward", "kl_ref", "kl_estimator", "win_rate", "length", "tokens", "seconds", "labels", "usd")
    row |= dict.fromkeys(figures) | {"insufficient": [], "history": []}
    if not (path / "manifest.json").exists():
        return row
    try:
        return row | _reached(path, figures)
    except StoreError as error:  # a table of many runs must not end at the first damaged one
        return row | {"status": "damaged", "state": f"damaged: {error.cause}; {error.fix}"}


def _reached(path: Path, figures: Sequence[str]) -> dict[str, Any]:
    row: dict[str, Any] = {"status": summary.status(path), "state": summary.state(path)}
    iterations = summary.summarise(path, extras=True)["iterations"]
    measured = [one for one in iterations if "measure" in one["phases"]]
    if measured:
        last = measured[-1]
        row |= {"iterations": last["iteration"]} | {key: last[key] for key in figures if key in last}
        row["insufficient"] = last["insufficient"]
        row["history"] = [{key: one[key] for key in ("iteration", "reward", "kl_ref", "win_rate")} for one in measured]
    records = summary.records(path)
    row["tokens"] = sum(phases.get("sample", {}).get("tokens") or 0 for phases in records.values())
    row["seconds"] = timeline.working(timeline.spans(path))
    asked = sum(one["oracle_calls"] or 0 for one in iterations)
    shared = summary.taken_over(path)
    row["labels"] = asked - (iterations[0]["oracle_calls"] or 0 if shared and iterations else 0)
    row["usd"] = _usd(path, [t for t in records if not (shared and t == 0)])
    return row


def _usd(path: Path, iterations: Sequence[int]) -> float:
    tables = [table for table in summary.tables(path) if table.startswith(_JUDGED)]
    rows = (row for t in iterations for table in tables for row in summary.rows(path, t, table))
    return sum((row.get("cost") or {}).get("usd") or 0.0 for row in rows)


# --- the table ---


def table(found: Mapping[str, Any]) -> Table:
    """One line per run."""
    runs = found["runs"]
    paid = any(run["usd"] for run in runs)
    few = any(run["insufficient"] for run in runs)
    shown = Table(
        title=Text(found["sweep"]),
        caption=Text(
            "the last iterate that was measured; KL in nats, length in tokens, tokens sampled to train on, minutes in which any phase ran"
            + ("; some figures come from too few prompts to decide by (see the runs)" if few else "")
        ),
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    shown.add_column("run")
    for header in (
        "it",
        "reward",
        "KL base",
        "win rate vs base",
        "len",
        "tokens",
        "min",
        "labels",
        *(["USD"] if paid else []),
    ):
        shown.add_column(header, justify="right", no_wrap=True)
    shown.add_column("status")
    for run in runs:
        cells = (
            run["name"],
            _number(run["iterations"], 0),
            _number(run["reward"], 3),
            _number(run["kl_ref"], 2) + (" k1" if run["kl_estimator"] == "k1" else ""),
            _rate(run["win_rate"]),
            _number(run["length"], 1),
            _number(run["tokens"], 0),
            _number(run["seconds"] and run["seconds"] / 60, 1),
            _number(run["labels"], 0),
            *([_number(run["usd"], 2)] if paid else []),
            run["status"],
        )
        shown.add_row(*map(Text, cells))
    return shown


def remarks(found: Mapping[str, Any]) -> list[str]:
    """What does not fit the table: why runs failed, and what is left out."""
    stands = ("finished", "not started", "running")
    return [
        *(f"{run['name']}: {run['state']}" for run in found["runs"] if run["status"] not in stands),
        *(f"{name} is left out: {reason}" for name, reason in found["refused"].items()),
    ]


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _rate(rate: Mapping[str, Any] | None) -> str:
    if rate is None or rate["value"] is None:
        return "-"
    bounds = ", ".join(_number(rate[end], 2) for end in ("low", "high") if rate[end] is not None)
    return f"{rate['value']:.2f}" + (f" [{bounds}]" if bounds else "")


# --- the plot ---


def plot(found: Mapping[str, Any]) -> str:
    """The same as a picture (SVG): reward against KL, and reward and win rate by iteration; a line is the mean over seeds.

    KL is spaced by its square root, as in "Scaling Laws for Reward Model Overoptimization" (arXiv 2210.10760).
    """
    groups: dict[str, list[Sequence[Mapping[str, Any]]]] = {}
    for run in found["runs"]:
        if run["history"]:
            groups.setdefault("-".join(w for axis, w in run["choices"].items() if axis != "seed") or "all", []).append(
                run["history"]
            )
    means = {name: _means(histories) for name, histories in groups.items()}
    against_kl = [_line(name, rows, "kl_ref", "reward") for name, rows in means.items()]
    panels = [
        Panel(
            title="reward against KL to the base model",
            x="KL (nats), spaced by its square root",
            root_x=True,
            y="reward",
            lines=against_kl,
            frontier=frontier([point for line in against_kl for point in line.points]),
        ),
        Panel(
            title="reward",
            x="iteration",
            whole_x=True,
            y="reward",
            lines=[_line(name, rows, "iteration", "reward") for name, rows in means.items()],
        ),
        Panel(
            title="win rate against the base model",
            x="iteration",
            whole_x=True,
            y="win rate",
            lines=[_line(name, rows, "iteration", "win_rate") for name, rows in means.items()],
        ),
    ]
    return render(found["sweep"], [replace(panel, lines=[line for line in panel.lines if line.points]) for panel in panels])


def _means(histories: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, float | None]]:
    """By iteration that all runs have reached."""
    rows = []
    for same in zip(*histories, strict=False):
        values = [{**row, "win_rate": row["win_rate"] and row["win_rate"]["value"]} for row in same]
        rows.append({key: _mean([value[key] for value in values]) for key in ("iteration", "reward", "kl_ref", "win_rate")})
    return rows


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None


def _line(name: str, rows: Sequence[Mapping[str, float | None]], x: str, y: str) -> Line:
    points = ((row[x], row[y]) for row in rows)
    return Line(name=name, points=[(a, b) for a, b in points if a is not None and b is not None])


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points of which no other one has at least as high a reward at no more KL, by KL.

    >>> frontier([(0.0, 0.1), (2.0, 0.5), (1.0, 0.6), (3.0, 0.9)])
    [(0.0, 0.1), (1.0, 0.6), (3.0, 0.9)]
    """
    best: list[tuple[float, float]] = []
    for kl, reward in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or reward > best[-1][1]:
            best.append((kl, reward))
    return best


def write_plot(folder: Path, found: Mapping[str, Any]) -> Path:
    """Draw it into the sweep's folder.

    Raises:
        StoreError: if it cannot be written.
    """
    path = folder / PLOT
    try:
        path.write_text(plot(found))
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error.strerror}", field="runs", fix="free some space") from error
    return path
