"""The command that shows what is on disk: show, of a run, a sweep, a reward model or a folder of runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from onlinerl.cli._app import AsJson, Run, out, print_json, print_lines, print_whole
from onlinerl.trackers.console import render_table

commands = typer.Typer()


@commands.command()
def show(
    run: Run,
    as_json: AsJson = False,
    samples: Annotated[
        bool, typer.Option("--samples", help="What an iteration was trained on, and how it was judged.")
    ] = False,
    heldout: Annotated[bool, typer.Option("--heldout", help="An iterate's own answers to the held-out prompts.")] = False,
    iteration: Annotated[int | None, typer.Option(help="Iteration of the samples; the last one by default.")] = None,
    limit: Annotated[int, typer.Option(help="How many prompts of samples.")] = 5,
    full: Annotated[bool, typer.Option("--full", help="Do not shorten the texts of samples.")] = False,
    timeline: Annotated[
        bool, typer.Option("--timeline", help="When each phase worked, on which parts; with --json as a Chrome trace.")
    ] = False,
) -> None:
    """Show a run: one line per iteration and how it stands, or what was sampled, or what ran when. Of a folder of runs, a line each."""
    from onlinerl.stores import summary

    if timeline:
        _show_timeline(run, as_json=as_json)
        return
    if _show_reward_model(run, as_json=as_json):
        return
    if not (run / "manifest.json").exists() and show_sweep(run, as_json=as_json):
        return
    if not (run / "manifest.json").exists() and (found := summary.runs(run)):
        _show_runs(found, as_json=as_json)
        return
    if samples or heldout:
        _show_samples(run, iteration, limit, heldout=heldout, as_json=as_json, full=full)
    elif as_json:
        print_json(summary.summarise(run))
    else:
        out.print(render_table(summary.summarise(run, extras=True)))
        out.print(summary.state(run), highlight=False, soft_wrap=True)


def _show_reward_model(folder: Path, *, as_json: bool) -> bool:
    """False if the folder holds none."""
    from onlinerl.reward_training import reports

    found = reports.stored(folder)
    if found is None:
        return False
    if as_json:
        print_json(found)
        return True
    if "heldout" in found:
        out.print(reports.table(found))
    out.print(f"{folder}: a reward model, {found['status']}", highlight=False, soft_wrap=True)
    return True


def show_sweep(folder: Path, *, as_json: bool) -> bool:
    """False if the folder holds no sweep."""
    from onlinerl.stores import sweeps
    from onlinerl.views import sweep as view

    record = sweeps.read(folder)
    if record is None:
        return False
    found = view.summarise(folder, record)
    if as_json:
        print_json(found)
        return True
    print_whole(view.table(found))
    print_lines(view.remarks(found))
    if (folder / view.PLOT).exists():
        out.print(f"plot: {folder / view.PLOT}", highlight=False, soft_wrap=True)
    return True


def _show_samples(run: Path, iteration: int | None, limit: int, *, heldout: bool, as_json: bool, full: bool) -> None:
    from onlinerl.stores import summary
    from onlinerl.views import samples

    chosen = max(summary.sampled(run, heldout=heldout), default=0) if iteration is None else iteration
    if as_json:
        found = summary.samples(run, chosen, limit, heldout=heldout)
        print_json(found)
        return
    print_lines(samples.page(run, chosen, limit, heldout=heldout, width=out.width, full=full))


def _show_runs(found: Sequence[Path], *, as_json: bool) -> None:
    from onlinerl.stores import summary

    states = {path.name: summary.state_or_damage(path) for path in found}
    if as_json:
        print_json({"runs": states})
        return
    for name, state in states.items():
        out.print(f"{name:<{max(map(len, states))}}  {state}", highlight=False, soft_wrap=True)


def _show_timeline(run: Path, *, as_json: bool) -> None:
    from onlinerl.views import timeline

    spans = timeline.spans(run)
    if as_json:
        sys.stdout.write(json.dumps(timeline.chrome_trace(spans)) + "\n")
        return
    print_lines(timeline.text(spans))
