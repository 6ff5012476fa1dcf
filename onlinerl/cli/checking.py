"""Commands that look at a configuration before anything is started: check, data."""

from __future__ import annotations

from typing import Annotated

import typer

from onlinerl import config as configuration
from onlinerl.cli._app import KEYS_FOLLOW, REFUSED, AsJson, Config, Overrides, out, print_json, print_lines

commands = typer.Typer()


@commands.command(context_settings=KEYS_FOLLOW)
def check(config: Config, overrides: Overrides = None) -> None:
    """Check a configuration, its data and its oracle; print the derived numbers, the memory and the placement.

    Exit code 0: a run would start here. 2: it would not, though all else may be right where a model is not on this machine.
    """
    from onlinerl import app as application
    from onlinerl import placement

    loaded = configuration.settled(configuration.load(config, overrides or ()))
    checked = application.check(loaded, out)
    checked.oracle.close()
    device = (
        "cpu"
        if loaded.cluster.device == "cpu"
        else "cuda"
        if loaded.cluster.device == "cuda"
        else "cpu or cuda, whatever the cluster has"
    )
    out.print(f"placement ({device}):", highlight=False)
    for line in placement.describe(placement.plan(loaded, loaded.cluster.device)):
        out.print(f"  {line}", highlight=False)
    if lacking := application.lacking(checked):
        for error in lacking:
            out.print(f"not ok yet: {error}", style="yellow", highlight=False, soft_wrap=True)
        raise typer.Exit(REFUSED)
    out.print("ok", style="green")


@commands.command(context_settings=KEYS_FOLLOW)
def data(
    config: Config,
    overrides: Overrides = None,
    limit: Annotated[int, typer.Option(min=0, help="How many prompts of each kind to show whole.")] = 2,
    as_json: AsJson = False,
) -> None:
    """Show what the model will really see: prompts with the bounds of their tokens, how long they are, what is left out or in both files."""
    from onlinerl import hub, model_checks
    from onlinerl.views import data as view

    loaded = configuration.settled(configuration.load(config, overrides or ()))
    found = view.inspect(loaded, model_checks.tokenizer(loaded.model) if hub.local(loaded.model) else None, limit)
    if as_json:
        print_json(found)
        return
    print_lines(view.page(loaded, found))
