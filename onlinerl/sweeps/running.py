"""Checks and runs the combinations of a sweep, one after the other; each is an ordinary run, and the sweep can be stopped anywhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from onlinerl import app, preflight, resuming, trials
from onlinerl import config as configuration
from onlinerl.budget import Account
from onlinerl.config import RunConfig
from onlinerl.errors import ConfigError, Interrupted, OnlineRLError, PromptError, StoreError
from onlinerl.preflight import Checked
from onlinerl.standing import Standing
from onlinerl.stores import _files, base_answers, summary, sweeps
from onlinerl.stores._lock import Lock
from onlinerl.stores.sweeps import SweepRecord
from onlinerl.sweeps.file import Combination, Sweep, all_at_once, sampled_beside
from onlinerl.views import sweep as view

UNREAD_BY_THE_BASE = ("name", "prompts.per_iteration", "algorithm.", "pairing.", "reference.", "training.")
"""Keys on which nothing depends that the base model answers, or that is said about it."""


@app.signals()
def run(sweep: Sweep, console: Console) -> int:
    """Run what is not finished. Returns how many runs failed.

    A run that fails is recorded, and the sweep goes on with the next one.

    Raises:
        OnlineRLError: before anything is started, naming field, cause and fix.
        Interrupted: after SIGINT or SIGTERM; the same call goes on.
    """
    with _locked(sweep.folder):
        _say_changes(sweep, console)
        record = _recorded(sweep, check(sweep, console))
        open_ = [c for c in sweep.combinations if c.name in record.runs and not _finished(sweep, c)]
        record.write(sweep.folder)
        # One that has failed may have been resumed by itself since.
        failed = {c.name: record.failed[c.name] for c in open_ if c.name in record.failed}
        with Standing() as standing:
            for number, combination in enumerate(_in_order(open_), 1):
                console.print(f"\n{combination.name}: run {number} of {len(open_)}", style="bold", highlight=False)
                failed.pop(combination.name, None)
                try:
                    if (reason := _attempt(sweep, combination, console, standing)) is not None:
                        failed[combination.name] = reason
                except Interrupted as stop:
                    raise Interrupted(stop.cause, fix="start it again: the sweep goes on where it was") from None
                finally:
                    record = SweepRecord(**{**vars(record), "failed": failed})
                    record.write(sweep.folder)
                    view.write_plot(sweep.folder, view.summarise(sweep.folder, record))
        return len(failed)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with _files.explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    lock = Lock(folder / sweeps.LOCK)
    try:
        yield
    finally:
        lock.release()


def _attempt(sweep: Sweep, combination: Combination, console: Console, standing: Standing) -> str | None:
    """Start or resume a run; returns what it failed on."""
    path = sweep.folder / combination.name
    try:
        if (path / "manifest.json").exists():
            app.resume(path, _moved(combination.config, _stored(path)), console, standing=standing)
        else:
            app.run(combination.config, console, standing=standing, base_of=_same_base(sweep, combination))
    except OnlineRLError as error:
        console.print(f"{combination.name} failed: {error.boundary}: {error}", style="red", highlight=False, markup=False)
        return f"{error.boundary}: {error}".splitlines()[0]
    except Exception as error:  # noqa: BLE001  (its traceback is in the run's failure.json)
        console.print(f"{combination.name} failed: {type(error).__name__}: {error}", style="red", highlight=False, markup=False)
        return f"bug: {type(error).__name__}: {error}".splitlines()[0]
    return None


# --- what may run ---


def check(sweep: Sweep, console: Console) -> dict[str, str]:
    """Check all that has not been started yet, as `onlinerl check` does each.

    Returns:
        What is left out because it was refused, and why; only with `exclude_refused`.

    Raises:
        ConfigError: with everything that is wrong. A model, a prompt file or an oracle that does not work is never left out; prompts that
            lack only what one of the algorithms needs are no reason for the others.
    """
    absent: dict[str, OnlineRLError] = {}
    new = [c for c in sweep.combinations if not (sweep.folder / c.name / "manifest.json").exists()]
    ask = _once()
    wrong: dict[str, OnlineRLError] = {}
    kept = 0
    for combination in new:
        config = configuration.settled(combination.config)
        try:
            checked = app.check(config, Console(quiet=True), ask=ask)
        except OnlineRLError as error:
            wrong[combination.name] = error
        else:
            checked.oracle.close()
            kept += checked.kept_bytes
            if lacking := app.lacking(checked):
                absent[combination.name] = lacking[0]
    serves = [_prompts(c) for c in sweep.combinations if c.name not in wrong]
    faulty = {c.name for c in new if isinstance(wrong.get(c.name), PromptError) and _prompts(c) not in serves}
    broken = absent | {
        name: error for name, error in wrong.items() if name in faulty or not isinstance(error, ConfigError | PromptError)
    }
    if broken or (wrong and not sweep.exclude_refused) or len(wrong) == len(sweep.combinations):
        raise all_at_once(wrong | broken, len(sweep.combinations))
    _require_room(sweep, kept)
    refused = {name: f"{error.field}: {error.cause}" for name, error in wrong.items()}
    for name, reason in refused.items():
        console.print(f"{name} is left out: {reason}", highlight=False, markup=False, soft_wrap=True)
    left = [c for c in sweep.combinations if c.name not in refused]
    console.print(f"{sweep.name}: {len(left)} runs in {sweep.folder}", highlight=False, soft_wrap=True)
    for amount in dict.fromkeys(map(_amount, left)):
        console.print(f"  {amount}", highlight=False, soft_wrap=True)
    return refused


def _once() -> Callable[[Checked, Account | None], trials.Asked]:
    """`trials.asked`, but each oracle once, also one that does not work: a question may cost money."""
    known: list[tuple[dict[str, Any], trials.Asked]] = []

    def ask(checked: Checked, account: Account | None) -> trials.Asked:
        oracle = checked.config.oracle
        for other, said in known:
            if other == oracle:
                return said
        known.append((oracle, trials.Asked()))
        known[-1] = (oracle, trials.asked(checked, account))
        return known[-1][1]

    return ask


def _require_room(sweep: Sweep, kept: int) -> None:
    """Refuse a disk that would be full before the last run: `kept` is what those that have not been started will leave there."""
    free = shutil.disk_usage(preflight.existing(sweep.folder / "run")).free
    least = max(int(c.config.checkpoints.min_free_gib * 2**30) for c in sweep.combinations)
    if kept > free - least:
        raise ConfigError(
            f"the runs that are left will keep {kept / 2**30:.1f} GiB of checkpoints and models, and {free / 2**30:.1f} GiB are free in "
            f"{sweep.folder}, of which {least / 2**30:.1f} GiB have to stay free (checkpoints.min_free_gib)",
            field="checkpoints.when_finished",
            fix="set it to remove and checkpoints.exports to last, so that a run keeps its last model alone; free some space; or choose "
            "another disk (runs)",
        )


def _prompts(combination: Combination) -> tuple[object, ...]:
    """What is read as prompts; algorithms and oracles may ask for different things in them."""
    return combination.config.prompts, combination.config.model


def _amount(combination: Combination) -> str:
    """How much a run samples."""
    config = combination.config
    beside = sampled_beside(config)
    prompts, k, most = config.prompts.per_iteration, config.sampling.samples_per_prompt + beside, config.sampling.max_new_tokens
    return (
        f"{config.iterations} iterations x {prompts} prompts x {k} samples of at most {most} tokens: at most "
        f"{config.iterations * prompts * k * most} sampled tokens a run"
    )


def _recorded(sweep: Sweep, refused: Mapping[str, str]) -> SweepRecord:
    before = sweeps.read(sweep.folder)
    return SweepRecord(
        name=sweep.name,
        file=str(sweep.file),
        runs={c.name: c.choices for c in sweep.combinations if c.name not in refused},
        refused=refused,
        failed={} if before is None else before.failed,
    )


def _in_order(combinations: Sequence[Combination]) -> list[Combination]:
    """Those one after the other that the same engine can serve."""
    engines = [(c.config.model, c.config.engine, c.config.cluster, c.config.learner, c.config.seed) for c in combinations]
    return [combinations[i] for i in sorted(range(len(engines)), key=lambda i: engines.index(engines[i]))]


def _same_base(sweep: Sweep, combination: Combination) -> Path | None:
    """A run that has measured the base model in the very same way."""
    wanted = _base(combination.config)
    for other in sweep.combinations:
        path = sweep.folder / other.name
        if other is not combination and (path / "manifest.json").exists() and _base(other.config) == wanted:
            try:
                if base_answers.measured(path):
                    return path
            except StoreError:  # damaged: it says so itself when it is resumed or shown
                continue
    return None


def _base(config: RunConfig) -> dict[str, Any]:
    fingerprint = configuration.fingerprint(configuration.settled(config))
    read = {key: value for key, value in fingerprint.items() if not key.startswith(UNREAD_BY_THE_BASE)}
    return {**read, "goals": configuration.algorithm(config).needs.goals}  # the algorithm's, and the base model is told one too


# --- what is there already ---


def _stored(path: Path) -> RunConfig:
    return resuming.stored_config(path, ())


def _finished(sweep: Sweep, combination: Combination) -> bool:
    """Whether nothing is left to do."""
    path = sweep.folder / combination.name
    there = (path / "manifest.json").exists() and summary.status(path) == "finished"
    return there and _stored(path).iterations >= combination.config.iterations


def _moved(config: RunConfig, stored: RunConfig) -> list[str]:
    """What a resume has to change in a stored run so that it is run as the sweep file says now."""
    free = tuple(key for key in configuration.resumable(config) if key != "runs")
    now, before = (configuration.flatten(configuration.resolved(_settled_as(each, stored))) for each in (config, stored))
    return [
        f"{key}={json.dumps(value, default=str)}"
        for key, value in now.items()
        if any(key == one or key.startswith(f"{one}.") for one in free) and before.get(key) != value
    ]


def _settled_as(config: RunConfig, stored: RunConfig) -> RunConfig:
    """With what was decided on the machine where the run was started."""
    decided = {
        name: section.model_copy(update={"dtype": getattr(stored, name).dtype})
        for name in ("engine", "learner")
        if (section := getattr(config, name)).dtype == "auto"
    }
    return configuration.settled(config.model_copy(update=decided))


def _say_changes(sweep: Sweep, console: Console) -> None:
    """Compare the sweep file with the runs that are there.

    Raises:
        ConfigError: if any of them was started with something that no resume changes.
    """
    refused: dict[str, ConfigError] = {}
    said: dict[str, list[str]] = {}
    for combination in sweep.combinations:
        path = sweep.folder / combination.name
        if not (path / "manifest.json").exists():
            continue
        stored = _stored(path)
        fingerprint = _files.read_json(path / "manifest.json").get("fingerprint") or {}
        for key, change in configuration.changes(fingerprint, _settled_as(combination.config, stored)).items():
            refused.setdefault(combination.name, ConfigError(change, field=key))
        for change in _moved(combination.config, stored):
            said.setdefault(change, []).append(combination.name)
    if refused:
        changed = all_at_once(refused, len(sweep.combinations))
        raise ConfigError(
            changed.cause.replace("cannot run", "were started with something else"),
            field="name",
            fix=f"give the changed sweep another name, take the change back, or move these runs out of {sweep.folder}",
        )
    for change, names in said.items():
        console.print(f"changed: {change} from now on, in {', '.join(names)}", highlight=False, markup=False, soft_wrap=True)
    before = sweeps.read(sweep.folder)
    now = {c.name for c in sweep.combinations}
    if before is not None and (gone := [name for name in before.runs if name not in now]):
        console.print(f"not in the sweep any more, and left as they are: {', '.join(gone)}", highlight=False, soft_wrap=True)
