"""Whether an oracle can be trusted: what it says of pairs whose better response is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan, nan
from typing import Any

from onlinerl.controller.accuracy import Scored, grouped, measured, outcomes, shown
from onlinerl.controller.comparing import Compared
from onlinerl.controller.statistics import FEWEST, Estimate, decisive, ratio, wilson
from onlinerl.errors import OracleError
from onlinerl.types import Failure, Group, Verdict
from onlinerl.types.preferences import CHOSEN

Said = Mapping[str, Verdict | Failure]
"""What an oracle says of groups, by the id of their prompts."""


@dataclass(frozen=True, kw_only=True)
class Examined:
    """How an oracle has done."""

    figures: Mapping[str, Any]
    """See `accuracy.measured`; lengths are in characters."""
    accuracy: Estimate
    """Of `figures`, with the interval that is decided by."""
    by_source: Mapping[str, Estimate]
    """The same of the pairs of each source."""
    first_place_wins: Estimate
    """Comparisons won by the response that was shown first, a tie being half."""
    agreement: Estimate | None
    """Pairs of which it says the same as at first; None where this is the first time."""

    def remarks(self) -> list[str]:
        """What people should know."""
        figures = self.figures
        accuracy, error, bias = figures["accuracy"], figures["calibration"], figures["length_bias"]
        if not accuracy["n"]:
            return ["the oracle has said nothing of the pairs whose better response is known"]
        said = [
            f"the oracle is right about {shown(accuracy)} of {accuracy['n']:,} pairs whose better response is known; where that is the shorter "
            f"one {shown(bias['shorter_is_better'])}, the longer one {shown(bias['longer_is_better'])}; calibration error {error['ece']:.3f}, "
            f"by chance up to {error['floor_95']:.3f}"
        ]
        for name, found in self.by_source.items():
            if found.high < 0.5:
                said.append(f"of the pairs of {name} it is wrong more often than right: {shown(found)}")
        if self.agreement is not None:
            said.append(f"it says the same as at first of {shown(self.agreement)} of them")
        return said


def examined(groups: Sequence[Group], now: Said, first: Said | None = None) -> Examined:
    """What an oracle has said.

    Args:
        groups: the pairs; `Rollout.source` says which response is the better one.
        now: of them.
        first: what it said before anything was trained; None: that is now.
    """
    probs = _probs(groups, now)
    judged = [(group, said) for group in groups if isinstance(said := now.get(group.prompt.id), Verdict)]
    compared = [Compared.of(*each) for each in judged]
    agreement = None
    if first is not None:
        before = _probs(groups, first)
        agreement = wilson([float(_winner(p) == _winner(before[i])) for i, p in probs.items() if i in before])
    scored = [
        _scored(group, verdict, one, probs[group.prompt.id])
        for (group, verdict), one in zip(judged, compared, strict=True)
        if group.prompt.id in probs
    ]
    return Examined(
        figures=measured(scored),
        accuracy=decisive(outcomes(scored)),
        by_source={name: decisive(outcomes(rows)) for name, rows in grouped(scored).items()},
        first_place_wins=ratio([each.first_wins for each in compared], [each.comparisons for each in compared]),
        agreement=agreement,
    )


def require_accuracy(found: Examined, least: float, least_by_source: float) -> None:
    """Refuse to train on what an oracle says that is wrong too often, and surely so.

    Args:
        found: how it has done.
        least: that its accuracy may be.
        least_by_source: the same of the pairs of each source that has 30.

    Raises:
        OracleError: if even the upper bound of one of them is below.
    """
    _require(found.accuracy, least, "min_accuracy", "pairs whose better response is known")
    # Of many sources with a few pairs each, one looks bad by chance.
    large = {name: accuracy for name, accuracy in found.by_source.items() if accuracy.n >= FEWEST}
    for name, accuracy in large.items():
        _require(
            accuracy,
            least_by_source,
            "min_accuracy_by_source",
            f"pairs of the source {name}, of which the better response is known",
        )


def _require(accuracy: Estimate, least: float, key: str, pairs: str) -> None:
    if accuracy.n and accuracy.high < least:
        raise OracleError(
            f"the oracle is right about {shown(accuracy)} of {accuracy.n:,} {pairs}",
            field=f"anchors.{key}",
            fix=f"repair the oracle, or choose another one, in a new run; look whether `chosen` and `rejected` have changed places in "
            f"anchors.data; a resume with anchors.{key} below {accuracy.high:.2f} goes on all the same",
        )


def _probs(groups: Sequence[Group], said: Said) -> dict[str, float]:
    """That the better response wins, by the oracle, of each pair of which it has said something."""
    found = {}
    for group in groups:
        verdict = said.get(group.prompt.id)
        better = next(place for place, rollout in enumerate(group.rollouts) if rollout.source == CHOSEN)
        prob = float(verdict.matrix()[better, 1 - better]) if isinstance(verdict, Verdict) else nan
        if not isnan(prob):
            found[group.prompt.id] = prob
    return found


def _winner(prob: float) -> int:
    return (prob > 0.5) - (prob < 0.5)


def _scored(group: Group, verdict: Verdict, compared: Compared, prob: float) -> Scored:
    lengths = {rollout.source == CHOSEN: len(rollout.text) for rollout in group.rollouts}
    return Scored(
        prob=prob,
        label=1.0,
        chosen_length=lengths[True],
        rejected_length=lengths[False],
        source=group.prompt.source,
        disagrees=bool(verdict.disagreements()[0, 1]) if compared.both_orders else None,
    )
