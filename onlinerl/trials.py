"""Trial questions: an oracle that does not work, or does not give what a run reads, is found before anything is sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from rich.console import Console

from onlinerl import ledger_checks, oracle_checks, oracle_requests, preflight, prompt_checks
from onlinerl.budget import Account
from onlinerl.config import RunConfig
from onlinerl.errors import OnlineRLError
from onlinerl.preflight import Checked
from onlinerl.protocols.oracle import ModelOracle, Oracle, leaves, moved, with_weights
from onlinerl.types import Cost, Verdict


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What an oracle has answered to trial questions."""

    verdict: Verdict | None = None
    """None where it was not asked: without the model there is no prompt, and weights are loaded where the run has reserved room for them."""
    of_leaves: Cost | None = None
    """What questions to the oracles that it asks have cost, if there were any."""
    notes: Sequence[str] = ()
    """What could not be tried."""


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


def with_answers(checked: Checked, config: RunConfig, said: Asked, console: Console) -> Checked:
    """With what the oracle has said. Refuses what reads something that it does not give."""
    verdict, paid = said.verdict, said.of_leaves
    for note in said.notes:
        console.print(note, highlight=False, soft_wrap=True)
    if verdict is not None:
        oracle_checks.check_verdict(config, checked.algorithm, verdict)
        checked = checked.tried(verdict, paid)
    elif with_weights(checked.oracle) or checked.train is not None:  # what it loads or starts was not there to be asked
        oracle_checks.check_uncertainty(config, checked.algorithm, checked.oracle.gives_uncertainty)
        if checked.oracle.compares:
            oracle_checks.check_comparable(config, checked.algorithm)
            oracle_checks.check_scored(config, given=False)
        checked = replace(checked, trial=paid, oracle_scores=not checked.oracle.compares)
    if checked.train is not None:
        _foretell(checked, paid, console)
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


def _foretell(checked: Checked, paid: Cost | None, console: Console) -> None:
    """How many requests the oracle will get, and what else there is to know of it."""
    plan = oracle_requests.planned(
        checked.config,
        checked.algorithm,
        len(checked.heldout),
        scores=checked.oracle_scores,
        anchors=len(checked.anchors),
        most_sampled=prompt_checks.most_sampled(checked.config, checked.algorithm, list(checked.train or ())),
    )
    limit = checked.config.sampling.max_new_tokens
    told = oracle_requests.foretold(plan, checked.oracle, paid or Cost(), checked.train or (), limit)
    notes = [] if told is None else [told.text, *told.beyond(checked.config.ledger)]
    for note in (*notes, *checked.oracle.remarks):
        console.print(note, highlight=False, soft_wrap=True)


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
