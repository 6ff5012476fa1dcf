"""The role of pair builders."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

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

    tie_within: float = Field(0.02, ge=0, lt=0.5)
    """Of an oracle that compares: two responses are tied if P(one beats the other) is nearer than this to 1/2. Scores tie only if they are equal,
    because their units are the oracle's own: for them there is `min_gap`."""
    ties: Literal["drop", "soft"] = "drop"
    """What becomes of two responses that are tied: no pair (`tie`), or a pair with the probability 1/2, for losses that read it. It must exceed
    `min_gap` all the same."""
    uncertainty_filter: UncertaintyFilter = UncertaintyFilter()
    """Which pairs are left out because nobody knows well which response is better."""

    def most(self, samples: int) -> int:
        """Upper bound of the pairs built from `samples` responses."""
        return samples * (samples - 1) // 2

    def build(self, judged: Judged) -> tuple[list[Pair], Mapping[str, int]]:
        """Pairs, and how many candidates were dropped for which reason."""
        raise NotImplementedError

    @property
    def soft(self) -> str | None:
        """The key by which a pair may be as even as 1/2, which only a loss that reads its probability can make sense of; None if there is none."""
        return "ties" if self.ties == "soft" else None

    def pairs(self, judged: Judged) -> tuple[list[Pair], Mapping[str, int]]:
        """The same without near ties and those that are filtered, which are counted too."""
        built, left_out = self.build(judged)
        dropped = Counter(left_out)
        kept: list[Pair] = []
        for pair in built:
            tied = self.is_near_tie(judged, pair)
            reason = "tie" if tied and self.ties == "drop" else self.uncertainty_filter.rejects(judged, pair)
            if reason is None:
                kept.append(replace(pair, prob=0.5) if tied else pair)
            else:
                dropped[reason] += 1
        return kept, dropped

    def is_near_tie(self, judged: Judged, pair: Pair) -> bool:
        """Whether an oracle that compares has hardly said which one is better. Rounded: a mean of both orders may miss a bound by its last bits."""
        return judged.verdict.preferences is not None and round(abs(pair.prob - 0.5), 9) < self.tie_within
