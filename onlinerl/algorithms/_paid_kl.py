"""What losses share that pay the KL to the reference inside the reward."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from onlinerl.algorithms._policy_gradient import PolicyGradient
from onlinerl.ops.items import need

if TYPE_CHECKING:
    from onlinerl.types.training import TrainSequence


class PaidKl(PolicyGradient):
    """A reward is the score minus `kl_coef` times the nats (k1) that the policy which sampled is from the reference; both may be cut off."""

    kl_in_reward: ClassVar[bool] = True

    score_clip: float | None = Field(None, gt=0)
    """A score counts as at most this and at least minus this; 10 in public code."""
    kl_clip: float | None = Field(None, gt=0)
    """Most nats, up or down, that a token pays for; 10 in public code."""

    def clipped(self, scores: np.ndarray) -> np.ndarray:
        """Scores as they count, any shape."""
        return scores if self.score_clip is None else scores.clip(-self.score_clip, self.score_clip)

    def score(self, sequence: TrainSequence) -> float:
        """The oracle's, as it counts."""
        return float(self.clipped(np.array(sequence.score)))

    def nats(self, sequence: TrainSequence) -> np.ndarray:
        """log(policy that sampled / reference) of each token, f64[T], as it is paid for.

        Raises:
            ValueError: if old or reference log-probs were not filled in.
        """
        nats: np.ndarray = need(sequence, "old_logprobs") - need(sequence, "reference_logprobs")
        if self.kl_clip is not None:
            nats = nats.clip(-self.kl_clip, self.kl_clip)
        return nats
