"""RAFT: "RAFT: Reward rAnked FineTuning for Generative Foundation Model Alignment"."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from onlinerl.algorithms._imitation import Imitation
from onlinerl.ops.items import judged_sequences, sample_items
from onlinerl.protocols.algorithm import Needs

if TYPE_CHECKING:
    from onlinerl.types.labels import Judged, Pair
    from onlinerl.types.training import TrainItem, TrainSequence


class Raft(Imitation):
    """Supervised learning on the best responses to each prompt, all with the same weight."""

    needs = Needs(min_samples=2, off_policy="valid")  # the best of one says nothing

    keep: int | None = Field(1, ge=1)
    """How many of the best are kept, equal ones counted once; None keeps all that reach the `threshold`."""
    threshold: float | None = None
    """Lowest score of a response that is kept, in units of the oracle's score (win rates, if it gives none); None accepts any."""

    def most_items(self, samples: int, pairs: int) -> int:
        """Those that are kept."""
        return samples if self.keep is None else min(self.keep, samples)

    def items(self, judged: Judged, pairs: Sequence[Pair]) -> tuple[list[TrainItem], Counter[str]]:
        """The kept responses, the best first; of equal scores the first. Also left out: `identical`, and `not_kept`."""
        sequences, dropped = judged_sequences(judged, at_least=self.needs.min_samples)
        good = [s for s in sequences if self.threshold is None or s.score >= self.threshold]
        distinct: dict[tuple[int, ...], TrainSequence] = {}
        for sequence in sorted(good, key=lambda s: -s.score):  # stable
            distinct.setdefault(tuple(sequence.response_ids), sequence)
        kept = list(distinct.values())[: self.keep]
        identical = len(good) - len(distinct)
        left_out = Counter(identical=identical, not_kept=len(sequences) - identical - len(kept))
        return sample_items(judged, kept), dropped + left_out
