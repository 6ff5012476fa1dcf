"""What a run has sampled, judged by another oracle."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from rich.console import Console

from onlinerl import app, ledger_checks, preflight, resuming, trials
from onlinerl import config as configuration
from onlinerl.budget import Account
from onlinerl.config import RunConfig
from onlinerl.controller import health
from onlinerl.controller.asking import Asker
from onlinerl.controller.tally import Lost, is_final
from onlinerl.errors import ConfigError, OnlineRLError, StoreError
from onlinerl.protocols.oracle import Oracle, leaves, with_weights
from onlinerl.protocols.store import ROLLOUTS, VERDICTS
from onlinerl.stores import labels
from onlinerl.stores.directory import RunDirectory
from onlinerl.types import Failure, Prompt, Query, Verdict


@app.signals()
def relabel(directory: Path, overrides: Sequence[str], console: Console, *, iteration: int | None = None) -> str:
    """Ask an oracle about the responses that a run was trained on; its labels are beside the run's own. Returns its version.

    What it has said already is not asked again, so the same call goes on where it was stopped. The oracle works in this process.

    Args:
        directory: of a run that nobody works on.
        overrides: `oracle.KEY=VALUE` and `ledger.KEY=VALUE`, on top of the run's configuration.
        console: where it says what it does.
        iteration: only of this one.

    Raises:
        OnlineRLError: naming field, cause and fix.
    """
    directory = directory.absolute()
    with RunDirectory.open(directory) as store:
        config = _config(directory, overrides)
        ledger_checks.check_source(config)
        kept = resuming.kept(store)
        if kept is None:
            raise StoreError(f"{directory} keeps no prompts", field="prompts", fix="an oracle needs them: resume the run first")
        chosen = _chosen(store, iteration)
        oracle = configuration.oracle(config)
        _require_fixed(oracle)
        _require_answers(oracle, kept.train)
        folder = directory / labels.KEPT
        if oracle.inner():  # what such a one keeps of itself is not to be taken for what that of the run keeps
            folder /= "relabels"
        account = ledger_checks.account(config.ledger, ledger_checks.spent(directory, oracle, folder))
        try:
            oracle.recall(folder)
            trial = _tried(config, oracle, account, kept.heldout[0])
            labels.record_trial(store, trial.cost.plus(oracle.opening_cost))
            oracle.remember(folder)
            with _started():
                _judge(store, config, oracle, account, kept.train, chosen, compares_only=trial.scores is None, console=console)
            return oracle.version
        finally:
            oracle.close()


@contextmanager
def _started() -> Iterator[None]:
    """What goes wrong from here on comes after something was asked for."""
    try:
        yield
    except OnlineRLError as error:
        error.started = True
        raise


def _config(directory: Path, overrides: Sequence[str]) -> RunConfig:
    other = next((each for each in overrides if not each.startswith(("oracle.", "ledger."))), None)
    if other is not None:
        raise ConfigError("is not read here", field=other.partition("=")[0], fix="give keys of oracle and ledger only")
    return configuration.settled(resuming.stored_config(directory, overrides))


def _require_fixed(oracle: Oracle) -> None:
    """One that moves with a policy has other weights in each iteration, and this is no iteration."""
    if any(each.following is not None for each in leaves(oracle).values()):
        raise ConfigError(
            "moves with the policy of a run",
            field="oracle.name",
            fix="choose one iterate: oracle.judge_version=initial oracle.path=RUN/exports/NNNN of self_judge, oracle.policy=... of implicit",
        )


def _require_answers(oracle: Oracle, prompts: Sequence[Prompt]) -> None:
    lacking = sum(prompt.reference_answer is None for prompt in prompts)
    if oracle.needs_reference_answer and lacking:
        raise ConfigError(
            f"{lacking} of {len(prompts)} prompts of this run have no reference answer, which this oracle needs",
            field="oracle.name",
            fix="choose another oracle",
        )


def _chosen(store: RunDirectory, iteration: int | None) -> list[int]:
    """Iterations whose responses are judged.

    Raises:
        StoreError: if there is none.
    """
    judged = [t for t in store.iterations() if store.phase_done(t, "label")]
    chosen = judged if iteration is None else [t for t in judged if t == iteration]
    if not chosen:
        known = f"choose one of {', '.join(map(str, judged))}" if judged else "wait until the first iteration is judged"
        raise StoreError(f"{store.path} has no judged responses of that iteration", field="iteration", fix=known)
    return chosen


def _tried(config: RunConfig, oracle: Oracle, account: Account, prompt: Prompt) -> Verdict:
    """A first question, which the account pays for."""
    for each in with_weights(oracle).values():
        each.inspect()
    verdict = trials.tried(oracle, account, lambda: preflight.probe_oracle(oracle, prompt))
    ledger_checks.check_limits(config, oracle, verdict.cost)
    return verdict


def _judge(
    store: RunDirectory,
    config: RunConfig,
    oracle: Oracle,
    account: Account,
    prompts: Sequence[Prompt],
    iterations: Sequence[int],
    *,
    compares_only: bool,
    console: Console,
) -> None:
    source = config.ledger.reuse_from
    asker = Asker(oracle, labels.Ledger(store, None if source is None else Path(source)), account)
    table = labels.RELABELS + hashlib.sha256(oracle.version.encode()).hexdigest()[:12]
    by_id = {prompt.id: prompt for prompt in prompts}
    for number in iterations:
        found = store.labels(number, table)
        if found.sealed:
            continue
        stored = {label.prompt_id: label for label in found}
        known = {name for name, label in stored.items() if is_final(label)}
        again = stored.keys() - known
        asked = [label.prompt_id for label in store.labels(number, VERDICTS) if label.prompt_id not in known]
        groups = store.groups(number, ROLLOUTS, by_id).select(dict.fromkeys(asked))
        queries = (
            Query(prompt=group.prompt, responses=tuple(rollout.text for rollout in group.rollouts), iteration=number)
            for group in groups
            if group is not None and len(group.rollouts) > compares_only
        )
        failures: list[Failure] = []
        lost = Lost()
        for name in known:
            lost.add(stored[name])
        for arrived in asker.labels(_Stored(queries), threading.Event(), anew=lambda query: query.prompt.id in again):  # noqa: B023  (used in this round only)
            found.append([label for _, label in arrived])
            asker.recorded(number, table, arrived)
            failures += [label.result for _, label in arrived if isinstance(label.result, Failure)]
            for _, label in arrived:
                lost.add(label)
            expected = len(asked) + len(known)
            health.check_failures(failures, expected, config.max_failed_labels)
            health.check_replies(lost, expected, config.max_failed_labels)
        if not failures:
            found.seal()
        failed = f", {len(failures)} failed: the same call asks about them again" if failures else ""
        incomplete = f"; {lost}" if lost.replies.lost else ""
        console.print(f"iteration {number}: {len(asked)} groups{failed}{incomplete}", highlight=False)


class _Stored:
    """Questions that are read as they are asked."""

    def __init__(self, queries: Iterator[Query]) -> None:
        self._queries, self._lock = queries, threading.Lock()

    def take(self, most: int) -> list[Query]:
        """At most so many; none at the end."""
        with self._lock:
            return list(islice(self._queries, most))
