"""DR-PO: "Dataset Reset Policy Optimization for RLHF"."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from onlinerl.algorithms.ppo import Ppo

if TYPE_CHECKING:
    from onlinerl.types.labels import Judged, Pair
    from onlinerl.types.training import TrainItem, TrainSequence


class DrPo(Ppo):
    """PPO on responses that begin with a part of a stored answer, so that the policy is trained from where good answers lead. `p_reset` is a
    knob of every loss on the policy's own responses: with any other, it is the same on top of that one.

    Not the paper's: `mask_value`, false in its code; a forced token is no action and earns nothing. Not the paper's: `kl_in`, reward there; see
    `ppo`.

    The paper samples at temperature 0.7 (`sampling.temperature`). Which answer is the stored one the prompts say: of preference data the chosen one, of
    data with several columns that of `prompts.columns.reference_answer`, e.g. a human's, which is the paper's other choice.
    """

    p_reset: float = Field(1.0, ge=0, le=1)
    """Share of prompts whose responses begin with a part of the stored answer, cut uniformly before one of its tokens but the first."""
    mask_value: bool = True
    """Forced tokens are context, as the prompt is. Without it, as in the authors' code, they have rewards, values and a value loss, though
    they still are no actions, and the sums are divided by the tokens that were sampled; that code whitens over them and over padding too, which is not done here."""
    missing_eos_score: float | None = -1.0
    """Score of a response that ran into the length limit, instead of the oracle's."""

    def items(self, judged: Judged, pairs: Sequence[Pair]) -> tuple[list[TrainItem], Counter[str]]:
        """Each judged response by itself; with forced tokens as its own without `mask_value`."""
        items, dropped = super().items(judged, pairs)
        if self.mask_value:
            return items, dropped
        return [replace(item, sequences=(_with_prefix(item.sequences[0]),)) for item in items], dropped


def _with_prefix(sequence: TrainSequence) -> TrainSequence:
    """The same with the tokens that it was made to begin with, which no engine has a log-prob for: NaN."""
    forced, at = sequence.prefix, len(sequence.prompt_ids) - sequence.prefix
    said = sequence.behavior_logprobs
    return replace(
        sequence,
        prompt_ids=sequence.prompt_ids[:at],
        response_ids=(*sequence.prompt_ids[at:], *sequence.response_ids),
        behavior_logprobs=None if said is None else np.concatenate([np.full(forced, np.nan, np.float32), said]),
        prefix=0,
        forced=forced,
    )
