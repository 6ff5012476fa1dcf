"""The role of pair builders."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from onlinerl.protocols.component import Component
from onlinerl.types import Judged, Pair


class UncertaintyFilter(BaseModel):
    """Leaves out pairs whose label is uncertain; by default none. Of any loss on pairs.

    Source: "Self-Evolutionary Large Language Models through Uncertainty-Enhanced Preference Optimization".
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    mu: float = Field(0.0, ge=0, allow_inf_nan=False)
    """A pair is kept with probability (1 - B / log 2)^mu, B being how far several judgements of it disagree, in nats (`Verdict.uncertainty`);
    the paper has 1, and 0 keeps all. A pair of which nobody says it is left out (`no_uncertainty`)."""
    within: float = Field(0.0, ge=0, lt=0.5)
    """A pair is left out if P(chosen beats rejected) is nearer than this to 1/2."""
    unfiltered: float = Field(0.1, ge=0, le=1)
    """Share of the pairs that are kept however uncertain they are: hard pairs, which teach much, are uncertain too."""

    @field_validator("unfiltered")
    @classmethod
    def _of_a_filter(cls, value: float, info: ValidationInfo) -> float:
        if value != cls.model_fields["unfiltered"].default and not (info.data.get("mu") or info.data.get("within")):
            raise ValueError("mu and within are 0, so nothing is filtered")
        return value

    def rejects(self, judged: Judged, pair: Pair) -> str | None:
        """Why a pair of the group is left out: `uncertain`, by a chance that follows from run, iteration and prompt, or `no_uncertainty`."""
        share = 0.0 if abs(pair.prob - 0.5) < self.within else 1.0
        if self.mu:
            nats = judged.uncertainty(pair)
            if nats is None:
                return "no_uncertainty"
            share *= (1.0 - nats / math.log(2)) ** self.mu
        if share == 1.0:
            return None
        return None if judged.chance(pair) < self.unfiltered + (1.0 - self.unfiltered) * share else "uncertain"


class PairBuilder(Component):
    """Turns one judged group into pairs."""

    uncertainty_filter: UncertaintyFilter = UncertaintyFilter()
    """Which pairs are left out because nobody knows well which response is better."""

    def most(self, samples: int) -> int:
        """Upper bound of the pairs built from `samples` responses."""
        return samples * (samples - 1) // 2

    def build(self, judged: Judged) -> tuple[list[Pair], Mapping[str, int]]:
        """Pairs, and how many candidates were dropped for which reason."""
        raise NotImplementedError

    def pairs(self, judged: Judged) -> tuple[list[Pair], Mapping[str, int]]:
        """The same without those that are filtered, which are counted too."""
        built, dropped = self.build(judged)
        reasons = [self.uncertainty_filter.rejects(judged, pair) for pair in built]
        kept = [pair for pair, reason in zip(built, reasons, strict=True) if reason is None]
        return kept, Counter(dropped) + Counter(reason for reason in reasons if reason is not None)
