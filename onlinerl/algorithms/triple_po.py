"""Triple preference optimization: "Triple Preference Optimization: Achieving Better Alignment using a Single Step Optimization"."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from onlinerl.algorithms._listwise import Lists, WithLikelihood
from onlinerl.ops.preference import sequence_logprobs
from onlinerl.protocols.needs import Needs

if TYPE_CHECKING:
    from onlinerl.batch import Batch, Outputs
    from onlinerl.types.labels import Judged, Pair
    from onlinerl.types.training import TrainItem


class TriplePo(WithLikelihood):
    """f(beta (S_w - S_l)) + nll_coef NLL(gold), without a reference: gold, w and l are the best, the second and the worst of a group.

    Not the paper's: `nll_norm`, batch_tokens in its code; with it a long response counts for more than a short one.
    """

    needs = Needs(min_samples=3, off_policy="valid")

    beta: float = Field(0.01, gt=0)
    nll_coef: float = Field(1.0, ge=0)

    def items(self, judged: Judged, pairs: Sequence[Pair]) -> tuple[list[TrainItem], Counter[str]]:
        """The three of them as one item."""
        items, dropped = super().items(judged, pairs)
        return [replace(i, sequences=(*i.sequences[:2], i.sequences[-1])) for i in items], dropped

    def values(self, outputs: Outputs, batch: Batch) -> Tensor:
        """S."""
        return sequence_logprobs(outputs, batch)

    def list_loss(self, lists: Lists) -> Tensor:
        """Of the second and the worst of three."""
        if not len(lists.values_GK):
            return lists.values_GK.sum(dim=1)
        _, won_G, lost_G = lists.values_GK.unbind(dim=1)
        return -logsigmoid(self.beta * (won_G - lost_G))
