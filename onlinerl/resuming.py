"""What a resume may go on with, what it refuses, and what may be changed while a run is under way."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import count
from pathlib import Path

from onlinerl import config as configuration
from onlinerl import graph, preflight
from onlinerl.config import RunConfig
from onlinerl.errors import ConfigError, StoreError
from onlinerl.prompts._kept import Kept
from onlinerl.stores import scaling, summary
from onlinerl.stores.directory import KINDS, RunDirectory


def kept(store: RunDirectory) -> Kept | None:
    """The prompts of a run; None if it was stopped before it had stored any, or is older than that."""
    train, heldout = store.prompts("train"), store.prompts("heldout")
    if train is None or heldout is None:
        return None
    return Kept(train=train, heldout=heldout, anchors=store.anchors())


def require_unchanged(config: RunConfig, store: RunDirectory) -> None:
    """A resume may change where it runs, not what is computed; the reference must be the very same weights."""
    was, found = store.manifest.get("reference") or {}, preflight.identity(config.model)
    same_model = all(found.get(key) == value for key, value in was.items() if key != "model")
    changed = configuration.changes(store.manifest["fingerprint"], config)
    if same_model and "checksum" in was:
        changed.pop("model", None)  # it lies somewhere else now
    if changed:
        key, *others = changed
        raise ConfigError(
            changed[key] + (f" (also changed: {', '.join(others)})" if others else ""),
            field=key,
            fix="resume without this change, or start a new run with it",
        )
    if not same_model:
        raise ConfigError(
            "the base model on disk is not the one this run started from"
            if "checksum" in found
            else f"the base model is no longer at {config.model}",
            field="model",
            fix="restore it, or say where it is now with model=...: the reference and every KL figure depend on it",
        )


def stored_config(directory: Path, overrides: Sequence[str]) -> RunConfig:
    """The configuration that a run is kept with, and what this resume changes.

    Raises:
        ConfigError: naming the file if it is the file that is wrong.
    """
    file = directory / "config.yaml"
    try:
        _require_same_place(file, overrides)
        config = configuration.load(file, [*overrides, f"runs={json.dumps(str(directory.parent))}"], stored=True)
        return config if any(o.startswith("pairing") for o in overrides) else configuration.without_unread(config)
    except ConfigError as error:
        if not file.is_file():
            fix = f"copy the configuration there that the run was started with; {file.name} is compared with the run's manifest"
            raise ConfigError(f"{file} is gone", field="CONFIG", fix=fix) from None
        try:
            configuration.load(file, stored=True)
        except ConfigError as stored:
            raise ConfigError(stored.cause, field=stored.field, fix=f"{stored.fix}, in {file}", also=stored.also) from error
        raise


def with_wish(directory: Path, overrides: Sequence[str]) -> Sequence[str]:
    """What a resume changes, with the number of replicas that `scale` has asked for and nobody has seen before the run ended, unless this
    resume says another one.

    Raises:
        StoreError: if the wish is damaged.
    """
    wish = scaling.wished(directory)
    said = any(override.partition("=")[0].strip() in ("engine", "engine.replicas") for override in overrides)
    return overrides if wish is None or said else [*overrides, f"engine.replicas={wish}"]


def _require_same_place(file: Path, overrides: Sequence[str]) -> None:
    """A run is resumed where it lies, so `runs` may say that and nothing else."""
    if not any(override.partition("=")[0].strip() == "runs" for override in overrides):
        return
    run = file.parent
    asked = configuration.load(file, overrides, stored=True).directory.parent
    if asked.resolve() != run.parent.resolve():
        raise ConfigError(
            f"the run lies in {run.parent} and is resumed there, not in {asked}",
            field="runs",
            fix=f"leave it out; or move the run first and resume it there: mv {run} {asked}/ && onlinerl resume {asked / run.name}",
        )


def require_in_order(store: RunDirectory, max_lag: int) -> None:
    """Nothing may be stored of an iteration that came from weights which are no longer there: those that it was sampled from, or those
    that it was trained from, which were pushed before."""
    unfinished = next(n for n in count() if not store.phase_done(n, "commit"))
    stored = {"iterations": store.iterations()} | {str(kind): store.artefacts(kind) for kind in KINDS}
    later = sorted({n for numbers in stored.values() for n in numbers if n > unfinished})

    def in_order(n: int) -> bool:
        sampled = n == 1 or store.phase_done(n - 1, "sample")
        trained = any(n in numbers for kind, numbers in stored.items() if kind != "iterations")
        pushed = n - 1 if trained else graph.sampling_version(n, max_lag)
        return sampled and store.phase_done(pushed, "sync")

    gap = next((n for n in later if not in_order(n)), None)
    if gap is not None:
        folders = " ".join(f"{kind}/{n:04d}" for kind, numbers in stored.items() for n in numbers if n >= gap)
        raise StoreError(
            f"iteration {unfinished} is not finished, and there are results of iteration {gap}: some files were removed",
            field="runs",
            fix=f"restore {store.path}/iterations/{unfinished:04d}; or, in {store.path}, rm -r {folders}, then resume, and all "
            f"from iteration {unfinished} on is computed again",
        )


def finish(store: RunDirectory, config: RunConfig) -> None:
    """Say that a run is finished, and remove what only a resume would read where the configuration says so."""
    if store.manifest["status"] != "finished":
        store.update_manifest(status="finished")
    if config.checkpoints.when_finished == "remove":
        for kind in ("checkpoints", "auxiliary", "references"):
            store.retain(kind, set())
        if config.checkpoints.exports != "all":
            last = max(t for t in store.iterations() if store.phase_done(t, "commit"))
            best = {store.phases(last)["commit"]["best"]} if config.checkpoints.exports == "best" else set()
            store.retain("exports", {last, *best})


def require_checkpoint(store: RunDirectory) -> None:
    """Refuse more iterations of a finished run that has kept no checkpoint to train them from.

    Raises:
        ConfigError: with what can be done instead.
    """
    last = max((t for t in store.iterations() if store.phase_done(t, "checkpoint")), default=0)
    if last and store.manifest["status"] == "finished" and not store.artefacts("checkpoints"):
        raise ConfigError(
            f"the run was finished after iteration {last} and has kept no checkpoint to go on from (checkpoints.when_finished)",
            field="iterations",
            fix=f"start a new run with more of them; it may begin with the model of this one: model={store.path}/exports/{last:04d}",
        )


def scale(directory: Path, replicas: int) -> None:
    """Ask a run that is under way for another number of replicas; it answers on its console, and a resume goes on with it.

    Raises:
        OnlineRLError: naming field, cause and fix, if it cannot have it.
    """
    summary.status(directory)  # refuses what is no run
    config = stored_config(directory, ())
    if config.engine.in_process:
        raise ConfigError("has no replicas", field="engine.name", fix="only a run on a cluster can be scaled")
    if config.cluster.colocate:
        raise ConfigError(
            "on shared GPUs each replica belongs to one rank of the learner, and ranks cannot be added during a run",
            field="cluster.colocate",
            fix=f"stop the run and resume it with engine.replicas={replicas} in a layout of its own GPUs (cluster.colocate=false)",
        )
    if replicas < config.engine.min_replicas:
        raise ConfigError(
            f"is {config.engine.min_replicas}, and {replicas} would be fewer",
            field="engine.min_replicas",
            fix="ask for as many, or resume the run with a lower one",
        )
    scaling.ask(directory, replicas)
