"""Commands about what oracles and people have said of a run: labels, relabel, people."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from onlinerl.cli._app import KEYS_FOLLOW, AsJson, Run, err, out, print_json, print_lines, print_whole
from onlinerl.errors import OnlineRLError

commands = typer.Typer()


@commands.command()
def labels(
    run: Run,
    as_json: AsJson = False,
    export: Annotated[
        Path | None,
        typer.Option("--export", help="A Parquet file of all labels with what they are about, for DuckDB or pandas."),
    ] = None,
    query: Annotated[
        str | None,
        typer.Option(
            help="What SQL finds in these labels, the table `labels`: 'SELECT iteration, sum(usd) FROM labels GROUP BY ALL'."
        ),
    ] = None,
    iteration: Annotated[int | None, typer.Option(help="Only of this iteration.")] = None,
    oracle: Annotated[str, typer.Option(help="Only of annotators and versions that contain this.")] = "",
) -> None:
    """What the oracle has said and cost: by iteration, whether oracles agree, and whether they go by place or length."""
    from onlinerl.stores import labelled, querying
    from onlinerl.views import labels as view

    if export is not None and query is not None:
        raise OnlineRLError(
            "is given with --query", field="--export", fix="ask for one at a time; COPY (...) TO 'FILE' writes from a query"
        )
    if query is not None:
        found = querying.query(run, query, iteration, oracle)
        if as_json:
            print_json({"rows": querying.plain(found)})
        else:
            print_whole(view.queried(found.column_names, querying.plain(found)))
        return
    if export is not None:
        count = labelled.export(run, export, iteration, oracle)
        err.print(f"{count} labels are in {export}", highlight=False, soft_wrap=True)
        return
    _print_labels(view.summarise(run, iteration, oracle), as_json=as_json)


@commands.command(context_settings=KEYS_FOLLOW)
def relabel(
    run: Run,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="The other oracle, e.g. oracle.name=math_verifier.")
    ] = None,
    iteration: Annotated[int | None, typer.Option(help="Only of this iteration.")] = None,
) -> None:
    """Let another oracle judge what a run was trained on, and say how far it agrees. Called again, it goes on; no label is paid for twice."""
    from onlinerl import relabelling
    from onlinerl.views import labels as view

    relabelling.relabel(run, overrides or (), out, iteration=iteration)
    _print_labels(view.summarise(run, iteration), as_json=False)


@commands.command()
def people(
    run: Run,
    host: Annotated[
        str, typer.Option(help="Address to listen at; others than this machine's own are reached by others.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8765,
    as_json: Annotated[
        bool, typer.Option("--json", help="How many questions there are, and how far people agree; no page.")
    ] = False,
    export: Annotated[
        Path | None, typer.Option("--export", help="What people have decided, as JSON lines for train-rm; no page.")
    ] = None,
) -> None:
    """Serve the page at which people compare answers, for a run whose oracle asks them. It may be stopped and started at any time."""
    from onlinerl import annotation

    if as_json:
        print_json(annotation.summary(run))
    elif export is not None:
        err.print(f"{annotation.export(run, export)} comparisons are in {export}", highlight=False, soft_wrap=True)
    else:
        annotation.serve(run, host, port, lambda line: print_lines([line]))


def _print_labels(found: Mapping[str, Any], *, as_json: bool) -> None:
    from onlinerl.views import labels as view

    if as_json:
        print_json(found)
        return
    print_whole(view.table(found))
    print_lines(view.remarks(found))
