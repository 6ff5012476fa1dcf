"""What losses on pairs share: the pairs of the configured builder, against a reference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from onlinerl.ops.pairs import pair_items
from onlinerl.protocols.algorithm import Algorithm, Needs, Reference

if TYPE_CHECKING:
    from onlinerl.types.labels import Judged, Pair
    from onlinerl.types.training import TrainItem


class Pairwise(Algorithm):
    """An item is a pair, the chosen response first."""

    unit = "pair"
    needs = Needs(pairs=True, reference=True, min_samples=2, off_policy="valid")  # a preference holds whoever wrote the two
    reference: ClassVar[Reference] = "fixed"

    def items(self, judged: Judged, pairs: Sequence[Pair]) -> tuple[list[TrainItem], Counter[str]]:
        """The pairs, without those of identical or unjudged responses."""
        return pair_items(judged, pairs)
