"""IPO-MD: "Human Alignment of Large Language Models through Online Preference Optimisation", arXiv 2403.08635."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from math import comb
from typing import TYPE_CHECKING

from pydantic import Field, field_validator

from onlinerl.algorithms.ipo import Ipo
from onlinerl.protocols.algorithm import by_knobs

if TYPE_CHECKING:
    from onlinerl.protocols.needs import Needs
    from onlinerl.types.labels import Judged, Pair
    from onlinerl.types.plan import Plan
    from onlinerl.types.training import TrainItem


class IpoMd(Ipo):
    """IPO on pairs of two responses of the geometric mixture of policy and reference, as `nash_md` has its opponents from, instead of two of
    the policy (`pairing.name: all_pairs` by default). With `mixture_coef` 0 that is online IPO.
    """

    mixture_coef: float = Field(0.125, ge=0, le=1)
    """Weight of the reference in the mixture, whose logits are (1 - mixture_coef) policy + mixture_coef reference at each token."""
    mixture_samples: int = Field(2, ge=2)
    """Responses of the mixture to each prompt; the pairs are of them."""

    @field_validator("reference_free")
    @classmethod
    def _is_mixed(cls, value: bool) -> bool:
        if value:
            raise ValueError("the mixture is of policy and reference; leave it out")
        return value

    @by_knobs
    def needs(self) -> Needs:
        """Of a pair loss, with responses of the mixture."""
        drawn, weight = self.mixture_samples, self.mixture_coef
        return replace(super().needs, pairing="all_pairs", mixture_samples=drawn, mixture_weight=weight)

    def remarks(self, plan: Plan) -> list[str]:
        """What the samples of the policy are for."""
        if plan.samples_per_prompt in (None, 1):
            return []
        return [
            "pairs are of the mixture's responses; the policy's are judged and not trained: set sampling.samples_per_prompt=1"
        ]

    def most_items(self, samples: int, pairs: int) -> int:
        """Those of the mixture."""
        return min(pairs, comb(self.mixture_samples, 2))

    def items(self, judged: Judged, pairs: Sequence[Pair]) -> tuple[list[TrainItem], Counter[str]]:
        """The pairs of two responses of the mixture; others are left out (`not_mixture`)."""
        items, dropped = super().items(judged, pairs)
        mixed = [item for item in items if all(s.source == "mixture" for s in item.sequences[:2])]
        return mixed, dropped + Counter(not_mixture=len(items) - len(mixed))
