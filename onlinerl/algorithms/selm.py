"""SELM: "Self-Exploring Language Models: Active Preference Elicitation for Online Alignment"."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import Field
from torch import Tensor

from onlinerl.algorithms._optimism import Optimistic
from onlinerl.ops.items import train_sequences
from onlinerl.ops.preference import log_ratios, sequence_logprobs
from onlinerl.protocols.algorithm import Reference, by_knobs

if TYPE_CHECKING:
    from onlinerl.batch import Batch, Outputs
    from onlinerl.protocols.needs import Needs
    from onlinerl.types.labels import Judged, Pair
    from onlinerl.types.training import TrainItem, TrainSequence


class Selm(Optimistic):
    """f(z) + optimism * beta * D(x), x the greedy response of the policy that sampled, the pair made of all judged responses of the group.

    The paper ranks the greedy response with the chosen and the rejected one of its data set, and goes on with the best and the worst of the
    three. Prompts bring no pairs here, so the samples of the group take their place, and with `carry_over` what was trained of the prompt before
    is among them. Not the paper's: `carry_over`, true there; it does something only where prompts come again.
    With `reference_free` D is the log-prob, whose gradient is the same.
    """

    beta: float = Field(0.01, gt=0)
    optimism: float = Field(1e-3, ge=0)
    carry_over: bool = False
    """Where a prompt comes again (`prompts.reuse`), the chosen and the rejected response of its last pair are judged with the new ones, as
    `carried`, and may be chosen or rejected again."""

    @by_knobs
    def needs(self) -> Needs:
        """Of a pair loss, with the greedy response."""
        return replace(super().needs, greedy=True, carried=self.carry_over)

    @by_knobs
    def reference(self) -> Reference:
        """The policy at the start of the iteration, or none."""
        return "none" if self.reference_free else "previous"

    def items(self, judged: Judged, pairs: Sequence[Pair]) -> tuple[list[TrainItem], Counter[str]]:
        """The pairs with the greedy response: a third sequence, unless it is one of the two. Without one they are left out (`no_greedy`)."""
        items, dropped = super().items(judged, pairs)
        places = {i for i, rollout in enumerate(judged.group.rollouts) if rollout.source == "greedy"}
        found = list(train_sequences(judged, places).values())
        if items and not found:
            return [], dropped + Counter(no_greedy=len(items))
        return [_exploring(item, found[0]) for item in items], dropped

    def explored(self, outputs: Outputs, batch: Batch) -> Tensor:
        """beta D[B]."""
        return self.beta * (sequence_logprobs if self.reference_free else log_ratios)(outputs, batch)


def _exploring(item: TrainItem, greedy: TrainSequence) -> TrainItem:
    """With the place of the greedy response among its sequences, where it is put if none of them has its tokens."""
    for place, sequence in enumerate(item.sequences):
        if sequence.response_ids == greedy.response_ids:
            return replace(item, exploration=place)
    return replace(item, sequences=(*item.sequences, greedy), exploration=len(item.sequences))
