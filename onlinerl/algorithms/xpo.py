"""XPO: "Exploratory Preference Optimization: Harnessing Implicit Q*-Approximation for Sample-Efficient RLHF"."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import Field
from torch import Tensor

from onlinerl.algorithms._optimism import Optimistic
from onlinerl.ops.preference import sequence_logprobs
from onlinerl.protocols.algorithm import by_knobs

if TYPE_CHECKING:
    from onlinerl.batch import Batch, Outputs
    from onlinerl.protocols.needs import Needs
    from onlinerl.types.labels import Judged, Pair
    from onlinerl.types.training import TrainItem


class Xpo(Optimistic):
    """f(z) + optimism * S(x): each pair is one response of the policy and one of the base model, and x is the latter. Of several samples each is
    paired with it (`pairing.name: all_pairs` by default); the paper has one.
    """

    optimism: float = Field(5e-6, ge=0)

    @by_knobs
    def needs(self) -> Needs:
        """Of a pair loss, with a response of the base model."""
        return replace(super().needs, reference_samples=1, pairing="all_pairs")

    @by_knobs
    def loss_at_reference(self) -> float | None:
        """Known only without optimism."""
        return None if self.optimism else super().loss_at_reference

    def most_items(self, samples: int, pairs: int) -> int:
        """Each response of the policy with that of the base model."""
        return min(pairs, samples - 1)

    def items(self, judged: Judged, pairs: Sequence[Pair]) -> tuple[list[TrainItem], Counter[str]]:
        """The pairs of a response of the policy and one of the base model; others are left out (`same_source`)."""
        items, dropped = super().items(judged, pairs)
        sources = [[sequence.source for sequence in item.sequences[:2]] for item in items]
        mixed = [
            replace(item, exploration=own.index("reference"))
            for item, own in zip(items, sources, strict=True)
            if own.count("reference") == 1
        ]
        return mixed, dropped + Counter(same_source=len(items) - len(mixed))

    def explored(self, outputs: Outputs, batch: Batch) -> Tensor:
        """S[B]."""
        return sequence_logprobs(outputs, batch)
