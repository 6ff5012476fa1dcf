"""UPO: "Self-Evolutionary Large Language Models through Uncertainty-Enhanced Preference Optimization"."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field
from torch import Tensor

from onlinerl.algorithms.dpo import Dpo
from onlinerl.ops.preference import smoothed
from onlinerl.protocols.algorithm import Reference, by_knobs

if TYPE_CHECKING:
    from onlinerl.batch import Batch
    from onlinerl.protocols.needs import Needs
    from onlinerl.types.labels import Judged, Pair
    from onlinerl.types.training import TrainItem


class Upo(Dpo):
    """(1 - a) f(z) + a f(-z) + nll_coef * NLL(chosen), a = B / (2 log 2), where B says how uncertain the label of the pair is: by how much several
    judgements of it disagree, in nats (`Verdict.uncertainty`). Uncertain pairs are left out too, by chance.

    The weight that the paper prints, 1 / (P + 1), would reverse labels; this one is 0 where judges agree and 1/2 where nothing is known.
    """

    nll_coef: float = Field(1.0, ge=0)
    mu: float = Field(1.0, ge=0)
    """A pair is kept with probability (1 - B / log 2)^mu; 0 keeps all."""
    unfiltered: float = Field(0.0, ge=0, le=1)
    """Share of the pairs that are kept however uncertain they are: hard pairs, which teach much, are uncertain too."""
    soft_labels: Literal[False] = False
    """How far a label is trusted follows from its uncertainty alone."""

    @by_knobs
    def needs(self) -> Needs:
        """Of DPO, with uncertainties and its own pairs."""
        return replace(super().needs, uncertainty=True, pairing="halves")

    @by_knobs
    def reference(self) -> Reference:
        """The policy that the iteration starts from, or none."""
        return "none" if self.reference_free else "previous"

    def items(self, judged: Judged, pairs: Sequence[Pair]) -> tuple[list[TrainItem], Counter[str]]:
        """The pairs that chance keeps, their `prob` being 1 - a. Also left out: `uncertain`, and `no_uncertainty`, those of which the oracle
        does not say how uncertain they are."""
        kept: list[TrainItem] = []
        left_out: Counter[str] = Counter()
        for pair in pairs:
            made, dropped = super().items(judged, [pair])
            left_out += dropped
            nats = judged.uncertainty(pair)
            for item in made:
                if nats is None:
                    left_out["no_uncertainty"] += 1
                elif judged.chance(pair) < self.unfiltered + (1.0 - self.unfiltered) * (1.0 - nats / math.log(2)) ** self.mu:
                    kept.append(replace(item, prob=1.0 - 0.5 * nats / math.log(2)))
                else:
                    left_out["uncertain"] += 1
        return kept, left_out

    def label_probs(self, batch: Batch) -> Tensor:
        """1 - a, with what else is assumed about wrong labels."""
        return (smoothed(batch.prob_P, self.label_smoothing) - self.flip_rate) / (1.0 - 2.0 * self.flip_rate)
