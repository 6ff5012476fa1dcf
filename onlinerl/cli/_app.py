"""What all commands share: the application, its two consoles, exit codes, arguments that several take, and how things are printed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from onlinerl.errors import Interrupted
from onlinerl.trackers.console import sturdy_console

# Exit codes beyond 0: what a launcher may want to tell apart.
FAILED = 1  # a run was under way; after a repair, resume continues
REFUSED = 2  # the configuration or its surroundings are not usable; nothing was started
NOTHING_LEFT = 4  # resume of a finished run
REQUEUE = Interrupted.exit_code  # stopped by a signal, or a learner rank was lost; resume continues

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help="Online iterative RLHF, the whole loop."
)
out = sturdy_console()
err = Console(stderr=True)

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, e.g. configs/quickstart.yaml.")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, e.g. runs/quickstart.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Dotted keys, e.g. algorithm.name=grpo.")]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable, one object.")]
WIDE = 160
"""Columns of a table that may be wider than the terminal."""
# What begins with dashes and is no option is taken for a key, and refused with a word on how keys are written.
KEYS_FOLLOW = {"ignore_unknown_options": True}


def print_json(found: Any) -> None:
    """One object for programs: no colour, no folding, and no NaN, which JSON does not have."""
    sys.stdout.write(json.dumps(found, indent=1, allow_nan=False) + "\n")


def print_lines(lines: Iterable[str | Text]) -> None:
    """As they are: what is in brackets is no markup, and the terminal folds what is too long."""
    for line in lines:
        out.print(line, highlight=False, markup=False, soft_wrap=True)


def print_whole(table: Table) -> None:
    """As wide as it takes: no name is cut short."""
    table.width = out.measure(table, options=out.options.update(width=WIDE)).maximum
    out.print(table, crop=False)
