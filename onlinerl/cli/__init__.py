"""The command line: each command stands in the module of its group. `onlinerl --help` lists them in this order."""

from __future__ import annotations

import sys

from onlinerl.cli import checking, labelling, reference, showing, starting
from onlinerl.cli._app import FAILED, REFUSED, REQUEUE, app, err
from onlinerl.errors import Interrupted, LearnerLost, OnlineRLError

__all__ = ["app", "main"]

for group in (starting, checking, showing, labelling, reference):
    app.add_typer(group.commands)


def main() -> None:
    """Entry point: errors on purpose become one readable message and an exit code."""
    try:
        app(standalone_mode=True)
    except Interrupted as stop:
        err.print(f"{stop}", highlight=False, markup=False, soft_wrap=True)
        sys.exit(REQUEUE)
    except OnlineRLError as error:
        err.print(f"error: {error.boundary}: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        if not error.started:
            sys.exit(REFUSED)
        sys.exit(REQUEUE if isinstance(error, LearnerLost) else FAILED)
