"""Commands that start something, or steer what was started: run, resume, sweep, train-rm, scale."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onlinerl import config as configuration
from onlinerl.cli._app import FAILED, KEYS_FOLLOW, NOTHING_LEFT, Config, Overrides, Run, out, print_lines
from onlinerl.cli.showing import show_sweep
from onlinerl.errors import StoreError

commands = typer.Typer()


@commands.command(context_settings=KEYS_FOLLOW)
def run(
    config: Config,
    overrides: Overrides = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Move an older run of this name aside first.")] = False,
) -> None:
    """Start a run."""
    from onlinerl import app as application

    application.run(configuration.load(config, overrides or ()), out, fresh=fresh)


@commands.command(context_settings=KEYS_FOLLOW)
def resume(
    run: Run,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...", help="Where it runs and when it stops, e.g. iterations=8 or engine.replicas=2."
        ),
    ] = None,
    finished_ok: Annotated[bool, typer.Option("--finished-ok", help="Exit with 0 if nothing is left to do.")] = False,
) -> None:
    """Continue a run at its first unfinished phase; nothing is generated or labelled twice."""
    from onlinerl import app as application

    if application.resume(run, overrides or (), out) == 0:
        out.print(f"nothing left to do: {run} is finished; raise iterations=... to go on", highlight=False)
        raise typer.Exit(0 if finished_ok else NOTHING_LEFT)


@commands.command(context_settings=KEYS_FOLLOW)
def sweep(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A sweep file, e.g. configs/sweeps/quickstart-all.yaml.")],
    overrides: Overrides = None,
    check: Annotated[bool, typer.Option("--check", help="Check every combination, start nothing.")] = False,
    show: Annotated[bool, typer.Option("--show", help="The table of what is there; start nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --show: machine-readable, one object.")] = False,
) -> None:
    """Run every combination of algorithms, oracles, pairings, seeds or other keys, or go on where a sweep was stopped.

    Exit code 0: all are finished. 1: some failed, and the same call tries them again. 2: nothing was started. 75: stopped by a signal.
    """
    from onlinerl.sweeps import file as sweeps
    from onlinerl.sweeps import running

    loaded = sweeps.load(file, overrides or ())
    if check:
        running.check(loaded, out)
        out.print("ok", style="green")
        return
    failed = 0 if show else running.run(loaded, out)
    if not show_sweep(loaded.folder, as_json=as_json):
        raise StoreError(f"{loaded.folder} holds no sweep", field="name", fix=f"start it: onlinerl sweep {file}")
    if failed:
        raise typer.Exit(FAILED)


@commands.command("train-rm", context_settings=KEYS_FOLLOW)
def train_rm(
    config: Config,
    overrides: Overrides = None,
    check: Annotated[bool, typer.Option("--check", help="Check it, train nothing.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Move an older one of this name aside first.")] = False,
) -> None:
    """Train a reward or preference model on stored comparisons, or go on where it was stopped; the result is an oracle's path.

    Exit code 0: it is trained and measured. 1: it failed, and the same call goes on. 2: nothing was started. 75: stopped by a signal.
    """
    from onlinerl import app as application
    from onlinerl.config import reward_model as configuration
    from onlinerl.reward_training import checks, running

    loaded = configuration.load(config, overrides or ())
    if check:
        print_lines(checks.check(loaded).notes)
        out.print("ok", style="green")
        return
    with application.signals():
        running.run(loaded, out, fresh=fresh)


@commands.command()
def scale(
    run: Run, replicas: Annotated[int, typer.Option(min=1, help="How many replicas of the engine there are to be.")]
) -> None:
    """Give a run that is under way more or fewer replicas. Its console says what becomes of it; a resume goes on with as many."""
    from onlinerl import resuming

    resuming.scale(run, replicas)
    out.print(f"{run} is asked for {replicas} replicas: see its console", highlight=False, soft_wrap=True)
