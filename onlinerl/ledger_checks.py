"""What a run may pay for labels, and whether that can be kept to."""

from __future__ import annotations

from pathlib import Path

from onlinerl.budget import Account, Limits
from onlinerl.config import LedgerConfig, RunConfig
from onlinerl.errors import ConfigError
from onlinerl.protocols.oracle import Oracle, with_weights
from onlinerl.stores import labels
from onlinerl.types import Cost

_UNKNOWN = {
    "calls": ("says of no label how many questions it took", "leave it out, or let the oracle give a Cost with each Verdict"),
    "tokens": (
        "says of no label how many tokens it took",
        "leave it out and set ledger.max_calls; a server that gives `usage` says it",
    ),
    "usd": (
        "has no price",
        "leave it out and set ledger.max_calls; or give a judge its price, oracle.price_per_million_tokens or oracle.price_per_request",
    ),
}


def account(ledger: LedgerConfig, spent: Cost) -> Account:
    """Of a run that has spent so much."""
    return Account(Limits(calls=ledger.max_calls, tokens=ledger.max_tokens, usd=ledger.max_usd), spent)


def spent(run: Path, oracle: Oracle, folder: Path | None = None) -> Cost:
    """What a run has paid so far: for its labels and starts, and for answers that the oracle keeps and that are no label yet.

    Args:
        run: its directory.
        oracle: that is to be asked.
        folder: where that keeps answers, if it is not the run's own.

    Raises:
        StoreError: if there is no run or it is damaged.
    """
    return labels.paid(run).plus(oracle.unlabelled(folder or run / labels.KEPT))


def check_source(config: RunConfig) -> None:
    """Refuse to reuse labels from nowhere.

    Raises:
        ConfigError: if there is no such folder. That of the runs may come to be with this one.
    """
    source = config.ledger.reuse_from
    if source is not None and not Path(source).is_dir() and Path(source) != config.directory.parent:
        raise ConfigError(
            f"there is no directory {source}", field="ledger.reuse_from", fix="name a run, or a folder of runs; or leave it out"
        )


def check_limits(config: RunConfig, oracle: Oracle, trial: Cost | None) -> None:
    """Refuse a budget in what the oracle does not count.

    Args:
        config: the run's.
        oracle: of it.
        trial: what a trial question has cost; None if it was not asked.

    Raises:
        ConfigError: naming the key.
    """
    if trial is None:
        if config.ledger.max_usd is not None and with_weights(oracle):
            raise _not_counted(config, "usd")
        return
    for kind in _UNKNOWN:
        # People are asked nothing in a trial; each answer of theirs is a call.
        counted = getattr(trial, kind) or (kind == "calls" and oracle.people(1, 2))
        if getattr(config.ledger, f"max_{kind}") is not None and not counted:
            raise _not_counted(config, kind)


def _not_counted(config: RunConfig, kind: str) -> ConfigError:
    what, fix = _UNKNOWN[kind]
    return ConfigError(f"is set, and {config.oracle['name']} {what}", field=f"ledger.max_{kind}", fix=fix)
