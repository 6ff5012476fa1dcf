"""Whether an oracle gives what an algorithm reads, and what it means where it gives less."""

from __future__ import annotations

from onlinerl.config import RunConfig, pair_builder
from onlinerl.errors import ConfigError
from onlinerl.protocols.algorithm import Algorithm
from onlinerl.protocols.oracle import Oracle
from onlinerl.types import Verdict


def check_uncertainty(config: RunConfig, algorithm: Algorithm, given: bool | None) -> None:
    """Refuse an oracle that judges each pair once where an algorithm, or a filter of pairs, asks how far several judgements disagree.

    Args:
        config: the run's.
        algorithm: that it trains with.
        given: whether verdicts say it; None if that is not known yet.

    Raises:
        ConfigError: if they do not.
    """
    if given is not False:
        return
    filtered = algorithm.needs.pairs and pair_builder(config).uncertainty_filter.mu > 0
    if algorithm.needs.uncertainty or filtered:
        who = f"{config.algorithm['name']} weighs" if algorithm.needs.uncertainty else "pairing.uncertainty_filter.mu filters"
        raise ConfigError(
            f"{config.oracle['name']} as configured judges each pair once, and {who} pairs by how far several judgements of them disagree",
            field="oracle.name",
            fix=("" if algorithm.needs.uncertainty else "leave pairing.uncertainty_filter.mu out, ")
            + "choose oracle.name=ensemble, set oracle.dropout_passes=10 of a reward model, or let a function (oracle.name=python) return "
            "one matrix for each member",
        )


def check_directions(config: RunConfig, algorithm: Algorithm, oracle: Oracle) -> None:
    """Refuse an oracle that judges in a direction which no prompt could say.

    Raises:
        ConfigError: if it is one of several that are asked, or prompts say something else already.
    """
    hidden = [section for section, each in _all(oracle, "oracle") if each.directions is not None and oracle.directions is None]
    if hidden:
        raise ConfigError(
            f"judges each prompt in a direction of its own, and {config.oracle['name']} asks others too, who know of none",
            field=f"{hidden[-1]}.combine",
            fix="name this composite as `oracle` itself, or inside of swapped, noisy or calibrated alone, or choose combine=sum",
        )
    if oracle.directions is not None and algorithm.needs.goals is not None:
        raise ConfigError(
            f"{config.algorithm['name']} puts the score that is wanted into prompts, and the oracle a direction",
            field="oracle.combine",
            fix="choose combine=sum, or another algorithm",
        )


def _all(oracle: Oracle, section: str) -> list[tuple[str, Oracle]]:
    """The oracle and all that are asked for it, by their section."""
    inner = [found for key, each in oracle.inner().items() for found in _all(each, f"{section}.{key}")]
    return [(section, oracle), *inner]


def check_verdict(config: RunConfig, algorithm: Algorithm, verdict: Verdict) -> None:
    """Refuse what reads something that the answer to a trial question lacks.

    Raises:
        ConfigError: naming it; also if the oracle only compares, and there is nothing to compare.
    """
    check_uncertainty(config, algorithm, verdict.uncertainty is not None)
    check_scored(config, verdict.scores is not None)
    if algorithm.needs.pairs and verdict.preferences is None:
        _check_ties(config)
    if verdict.scores is None:
        check_comparable(config, algorithm)


def _check_ties(config: RunConfig) -> None:
    """Refuse a bound that scores are not held against. 0 is what every run of an earlier version has."""
    builder = pair_builder(config)
    if builder.tie_within not in (0.0, type(builder).model_fields["tie_within"].default):
        raise ConfigError(
            f"is {builder.tie_within:g}, and nothing would read it: {config.oracle['name']} gives scores, which tie if they are equal",
            field="pairing.tie_within",
            fix="leave it out, or set pairing.min_gap, in units of the score",
        )


def check_comparable(config: RunConfig, algorithm: Algorithm) -> None:
    """Refuse an oracle that only compares where there is nothing to compare with.

    Raises:
        ConfigError: if there is one response to a prompt.
    """
    if config.sampling.samples_per_prompt + len(algorithm.needs.beside_samples) < 2:
        raise ConfigError(
            "the oracle only compares responses with each other, and there is one per prompt",
            field="sampling.samples_per_prompt",
            fix="set it to 2 or more",
        )


def check_scored(config: RunConfig, given: bool | None) -> None:
    """Refuse an oracle that only compares where prompts are chosen by scores.

    Args:
        config: the run's.
        given: whether verdicts hold scores of single responses; None if that is not known yet.

    Raises:
        ConfigError: if they do not.
    """
    if config.selection.reads_scores and given is False:
        raise ConfigError(
            f"{config.selection.name} goes by the scores of responses, and {config.oracle['name']} only compares them",
            field="selection.name",
            fix="choose an oracle that scores, or a selector that reads no scores, such as shuffled or shards",
        )


def check_components(config: RunConfig, algorithm: Algorithm, oracle: Oracle, verdict: Verdict | None) -> None:
    """Refuse an oracle that does not give all the scores that an algorithm or a selector reads.

    Args:
        config: the run's.
        algorithm, oracle: as configured.
        verdict: what the oracle answered to a trial question; None if it was not asked.

    Raises:
        ConfigError: naming the scores.
    """
    if verdict is not None:
        given = set(verdict.components or ())
    elif oracle.components is not None:
        given = set(oracle.components)
    else:  # there was nothing to ask about
        return
    missing = [name for name in algorithm.needs.components if name not in given]
    unknown = [name for name in config.selection.components if name not in given]
    if not missing and not unknown:
        return
    has = f"gives {', '.join(sorted(given))} beside the score" if given else "gives one score only"
    if not missing:
        raise ConfigError(
            f"{config.oracle['name']} {has}, and {config.selection.name} reads {', '.join(unknown)}",
            field="selection.name",
            fix="choose oracle.name=ensemble, whose `std` is how far its members are apart about each response, or oracle.name=python and a function "
            f"that returns, for each group, a dict of lists by name: {{'score': [...], '{unknown[0]}': [...]}}; or another selector",
        )
    raise ConfigError(
        f"{config.oracle['name']} {has}, and {config.algorithm['name']} as configured reads {', '.join(missing)}",
        field="oracle.name",
        fix=f"choose oracle.name=composite with members.{missing[0]}, or oracle.name=python and a function that returns, for each group, "
        f"a dict of lists by name: {{'score': [...], '{missing[0]}': [...]}}",
    )


def implied_preferences(config: RunConfig, algorithm: Algorithm, oracle: Oracle, verdict: Verdict | None) -> list[str]:
    """What an algorithm that reads preferences makes of an oracle that only scores.

    `verdict` is what the oracle answered to a trial question; None if it was not asked.
    """
    if not algorithm.needs.preferences or oracle.compares or (verdict is not None and verdict.preferences is not None):
        return []
    temperature = oracle.preference_temperature
    return [
        f"{config.algorithm['name']} reads how probable it is that one response beats another. Where {config.oracle['name']} only "
        f"scores, that follows from the scores by Bradley-Terry at temperature {temperature:g} (oracle.preference_temperature): a gap "
        f"of {temperature:g} means odds of 2.7 to 1, and preferences that go in a circle cannot occur"
    ]
