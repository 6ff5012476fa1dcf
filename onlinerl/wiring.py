"""Starts the parts of a run, connects them, and ends them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from onlinerl import config as configuration
from onlinerl import graph, model_checks, placement, preflight
from onlinerl.budget import Account
from onlinerl.config import RunConfig
from onlinerl.controller import refreshing
from onlinerl.controller.asking import Asker
from onlinerl.controller.fleet import FleetReporter
from onlinerl.controller.parts import Parts, samples_dynamically
from onlinerl.metrics.catalogue import CATALOGUE
from onlinerl.oracle_checks import check_verdict
from onlinerl.preflight import Checked
from onlinerl.protocols.engine import InProcessEngine, ReplicaSettings, RolloutEngine
from onlinerl.protocols.learner import InProcessLearner, Learner
from onlinerl.protocols.oracle import Oracle, with_weights
from onlinerl.protocols.sync import WeightSync
from onlinerl.protocols.tracker import Tracked, Tracker
from onlinerl.protocols.transport import Layout
from onlinerl.reward_training import in_a_run
from onlinerl.standing import Standing
from onlinerl.stores import labels, oracle_versions, scaling
from onlinerl.stores.directory import RunDirectory
from onlinerl.stores.labels import Ledger
from onlinerl.trackers._fanout import FanoutTracker
from onlinerl.trackers.console import OnConsole
from onlinerl.trackers.jsonl import Jsonl, read_metrics
from onlinerl.types import Prompt, Verdict

if TYPE_CHECKING:
    from onlinerl.cluster.colocation import Turns
    from onlinerl.cluster.pool import EnginePool
    from onlinerl.cluster.runtime import Cluster


@contextmanager
def started(
    checked: Checked, store: RunDirectory, account: Account, tracker: Tracker, standing: Standing | None = None
) -> Iterator[Parts]:
    """Engine, learner and what connects them, as the configuration names them.

    Args:
        checked: the run's.
        store: of the run.
        account: what it may pay for labels.
        tracker: who is told.
        standing: what is up already, and is to stay up for the next run if this one finishes; None: nothing is.
    """
    start = in_process if checked.config.engine.in_process else on_cluster
    up = standing or Standing()
    with ExitStack() as unless_finished:
        unless_finished.callback(up.close)
        with start(checked, store, account, tracker, up) as parts:
            yield parts
        if standing is not None:
            unless_finished.pop_all()


@contextmanager
def on_cluster(checked: Checked, store: RunDirectory, account: Account, tracker: Tracker, up: Standing) -> Iterator[Parts]:
    """Start what is not up yet of the cluster and the engine, and everything else on it. The learner and an oracle with weights end with
    the run."""
    from onlinerl.cluster.colocation import Turns, require_gpus
    from onlinerl.cluster.group import LearnerGroup
    from onlinerl.cluster.oracle import placed
    from onlinerl.cluster.sync import WeightPush

    config, algorithm = checked.config, checked.algorithm
    _take_on(checked, store)
    tracker.phase_started(0, "start", None, "")
    tracker.note("starting Ray, engine and learner: a minute or more, until the first phase begins")
    cluster = _cluster(checked, up)
    store.update_manifest(logs=cluster.logs)
    tracker.note(f"logs of all processes: {cluster.logs}")
    require_gpus(cluster.device, config.cluster.colocate)
    placement.require_apart(config, cores_are_shared=cluster.share_cores())
    transport = config.sync.resolve(
        Layout(device=cluster.device, colocated=config.cluster.colocate, joins=config.engine.joins_transfers)
    )
    settings = ReplicaSettings(
        device=cluster.device,
        colocated=config.cluster.colocate,
        max_model_len=checked.max_model_len,
        transport=transport,
        seed=config.seed,
    )
    pool: EnginePool | None = None
    learner: LearnerGroup | None = None
    oracle: Oracle = checked.oracle
    stays = False
    try:
        if with_weights(checked.oracle):
            oracle = placed(cluster, config.learner.ranks + config.engine.replicas, checked.oracle)
        turns = Turns(shared=config.cluster.colocate)
        pool = _engine(cluster, config, settings, turns, up, store, tracker)
        turns.engine_starts(pool)
        learner = LearnerGroup(cluster, config, algorithm, _loss_temperature(checked), turns)
        if oracle is not checked.oracle:
            checked = checked.tried(probed(checked, oracle))
        turns.learner_starts(learner)
        asked = canary(checked.heldout, config.evaluation.canary)
        sync = WeightPush(learner, pool, turns, transport, config.engine, asked)
        shared = config.cluster.colocate or cluster.share_cores()
        yield _wire(
            checked,
            store,
            tracker,
            asker=asker(checked, store, account, oracle, tracker),
            engine=pool,
            learner=learner,
            sync=sync,
            shared_hardware=shared,
        )
        # On shared GPUs whose turn it is belongs to engine and learner together: they end together.
        stays = pool.fleet.intact and not config.cluster.colocate
    finally:
        oracle.close()
        if not stays:
            up.engine.close()
        if learner is not None:
            learner.shutdown()


def _cluster(checked: Checked, up: Standing) -> Cluster:
    """One that is up already, if it has the very room that this run asks for."""
    from onlinerl.cluster.runtime import Cluster

    config = checked.config
    placed_oracle = config.oracle if with_weights(checked.oracle) else None
    room = (config.cluster, config.engine, config.learner, placed_oracle)
    cluster: Cluster
    cluster, _ = up.cluster.take(room, lambda: Cluster(config))
    return cluster


def _engine(
    cluster: Cluster,
    config: RunConfig,
    settings: ReplicaSettings,
    turns: Turns,
    up: Standing,
    store: RunDirectory,
    tracker: Tracker,
) -> EnginePool:
    """One that is up already, if its replicas would be started in the very same way."""
    from onlinerl.cluster.pool import EnginePool

    @contextmanager
    def opened() -> Iterator[EnginePool]:
        pool = EnginePool(cluster, config.learner.ranks, config.model, config.engine, settings, turns)
        try:
            yield pool
        finally:
            pool.shutdown()

    pool: EnginePool
    pool, was_up = up.engine.take((cluster, config.model, config.engine, settings), opened)
    _watch_over(pool, config, store, tracker)
    if was_up:
        tracker.note("the engine stays up; it serves once it has proved that it holds this run's weights")
        pool.begin_run(turns)
    return pool


def _watch_over(pool: EnginePool, config: RunConfig, store: RunDirectory, tracker: Tracker) -> None:
    """What the replicas need of the run: where the weights of a version are, who hears of what happens, who may ask for more."""
    pool.fleet.report = FleetReporter(tracker, store.manifest.get("attempt", 0))
    pool.starter.learner_dtype = config.learner.dtype
    pool.starter.timeout_s = config.sync.timeout_s
    pool.starter.weights_of = lambda version: store.require("exports", version) if version else config.model

    def resized(replicas: int) -> None:  # a resume goes on with as many
        engine = config.engine.model_copy(update={"replicas": replicas})
        store.write_config(configuration.dump(config.model_copy(update={"engine": engine})))

    pool.fleet.resized = resized
    pool.wanted = partial(scaling.take, store.path)


def canary(prompts: Sequence[Prompt], count: int) -> Sequence[tuple[Sequence[int], Sequence[int]]]:
    """What log-probs are compared on after each push: second halves of prompts, given the first; fixed for the whole run."""
    halves = [(p.token_ids[: len(p.token_ids) // 2], p.token_ids[len(p.token_ids) // 2 :]) for p in prompts]
    # Where no prompt has two tokens, each is given itself.
    return [(first, second) for first, second in halves if first][:count] or [
        (p.token_ids, p.token_ids) for p in prompts[:count]
    ]


@contextmanager
def in_process(checked: Checked, store: RunDirectory, account: Account, tracker: Tracker, up: Standing) -> Iterator[Parts]:
    """Everything in this process, for fast tests of the loop."""
    config = checked.config
    assert isinstance(config.engine, InProcessEngine)
    assert isinstance(config.learner, InProcessLearner)
    _take_on(checked, store)
    if with_weights(checked.oracle):
        checked = checked.tried(probed(checked, checked.oracle))
    tokenizer = model_checks.tokenizer(config.model)
    opened = config.engine.open
    engine, _ = up.engine.take((config.model, config.engine), lambda: nullcontext(opened(len(tokenizer), tokenizer.decode)))
    learner = config.learner.open(len(tokenizer), checked.algorithm, config.model, _loss_temperature(checked))
    sync = config.learner.connect(learner, engine)
    asking = asker(checked, store, account, checked.oracle, tracker)
    yield _wire(checked, store, tracker, asker=asking, engine=engine, learner=learner, sync=sync)


def _take_on(checked: Checked, store: RunDirectory) -> None:
    """The oracle goes on with the weights that the run has trained for it, or with the iterate that it had."""
    plan, trainer = checked.oracle.refreshing, _trainer(checked, store)
    newest = max(store.iterations(), default=0) + 1
    refreshing.follow(checked.oracle, store, newest)
    taken = refreshing.in_use(store, newest)
    if plan is not None and trainer is not None and taken:
        plan.model.reload(str(trainer.path(taken[0])))


def _trainer(checked: Checked, store: RunDirectory) -> in_a_run.Trainer | None:
    """Who trains the oracle's reward model further; None where it stays as it is."""
    plan = checked.oracle.refreshing
    folder = store.path / labels.KEPT / in_a_run.FOLDER
    return None if plan is None else in_a_run.Trainer(plan=plan, config=checked.config, folder=folder)


def asker(checked: Checked, store: RunDirectory, account: Account, oracle: Oracle, tracker: Tracker) -> Asker:
    """Who asks the oracle for a run, and never twice for the same."""
    source = checked.config.ledger.reuse_from
    ledger = Ledger(store, None if source is None else Path(source))
    if source is not None:
        tracker.note(f"{len(ledger)} labels are known, of this run and of those in {source}")
    for problem in ledger.unreadable:
        tracker.note(f"labels are left out: {problem}")
    return Asker(oracle, ledger, account)


def _loss_temperature(checked: Checked) -> float:
    """At which the loss takes log-probs."""
    return checked.algorithm.needs.temperature(checked.config.sampling.temperature)


def _wire(
    checked: Checked,
    store: RunDirectory,
    tracker: Tracker,
    *,
    asker: Asker,
    engine: RolloutEngine,
    learner: Learner,
    sync: WeightSync,
    shared_hardware: bool = False,
) -> Parts:
    assert checked.train is not None
    version, plan = checked.oracle_version, asker.oracle.refreshing
    own = refreshing.versions(store, max(store.iterations(), default=0) + 1)
    if version is not None and (caveat := oracle_versions.caveat(store.path, version, own)) is not None:
        tracker.note(caveat)
    for remark in asker.oracle.remarks:
        tracker.note(remark)
    schedule = checked.config.schedule
    # Where engine and learner take turns, an evaluation would only be reported later.
    beside = schedule.evaluate_beside and not shared_hardware
    return Parts(
        phases=graph.phases(
            stream=schedule.stream,
            evaluate_beside=beside,
            max_lag=schedule.max_lag,
            dynamic=samples_dynamically(checked.config, checked.algorithm),
            reference_samples=checked.algorithm.needs.reference_samples > 0,
            mixture_samples=checked.algorithm.needs.mixture_samples > 0,
            anchors=checked.config.anchors is not None,
            select=checked.config.selection.chooses,
            refresh=plan is not None or asker.oracle.following is not None,
        ),
        config=checked.config,
        algorithm=checked.algorithm,
        pairing=checked.pairing,
        train_prompts=checked.train,
        heldout=checked.heldout,
        anchors=checked.anchors,
        oracle_scores=checked.oracle_scores,
        store=store,
        tracker=tracker,
        base_model=checked.config.model,
        tokenizer=model_checks.tokenizer(checked.config.model) if checked.algorithm.needs.mixture_samples else None,
        state_bytes=checked.state_bytes,
        asker=asker,
        label_asker=None if plan is None else asker.beside(plan.labels),
        reward_trainer=_trainer(checked, store),
        engine=engine,
        learner=learner,
        sync=sync,
        shared_hardware=shared_hardware,
    )


def trackers(config: RunConfig, directory: Path, console: Console) -> list[Tracker]:
    """Who is told what happens in a run."""
    run = _tracked(config, directory, console)
    return [each.open(run) for each in (OnConsole(), Jsonl(), *config.metrics.all())]


def tell_finished(config: RunConfig, directory: Path, console: Console) -> None:
    """Of a run that was stopped behind its last phase and has nothing left to do: Prometheus and the like know it as stopped."""
    run = _tracked(config, directory, console)
    tracker = FanoutTracker([each.open(run) for each in config.metrics.all()])
    tracker.ended("finished")
    tracker.close()


def _tracked(config: RunConfig, directory: Path, console: Console) -> Tracked:
    return Tracked(
        name=config.name,
        directory=directory,
        catalogue=CATALOGUE.including(configuration.algorithm(config).metrics, config.algorithm["name"]),
        earlier=read_metrics(directory / "metrics.jsonl"),
        console=console,
    )


def probed(checked: Checked, oracle: Oracle) -> Verdict:
    """Ask the oracle once; returns what it said: without scores, it only compares.

    Raises:
        OracleError: if it cannot judge.
        ConfigError: if it only compares, and there is nothing to compare.
    """
    verdict = preflight.probe_oracle(oracle, checked.heldout[0])
    check_verdict(checked.config, checked.algorithm, verdict)
    return verdict
