"""GPO: "General Preference Modeling with Preference Representations for Aligning Language Models"."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field
from torch import Tensor

from onlinerl.algorithms._self_play import SelfPlay
from onlinerl.batch import Batch
from onlinerl.ops.items import with_advantages
from onlinerl.types.training import TrainSequence

if TYPE_CHECKING:
    from onlinerl.types.labels import Judged


class GpoPreference(SelfPlay):
    """Mean over responses of (D - s / beta)^2, s the mean preference score of a response against its group: `sppo` with scores for win
    rates, and the log-partition set to 0.

    The paper's preference model embeds responses, v, and scores a pair with s(i, j) = (R v_i) . v_j; its probability is sigmoid(s / tau).
    Here it is the other way round: s = tau logit(P), from the probabilities of any oracle, or from those that its scores imply by
    Bradley-Terry. With the paper's preference model as oracle the two are the same, up to `prob_clip`.
    """

    beta: float = Field(0.001, gt=0)
    """Preference score per nat of log-ratio."""
    tau: float = Field(0.1, gt=0)
    """Preference score at which the odds are e to 1. Only tau / beta matters, unless the paper's values are to be kept."""
    prob_clip: float = Field(0.02, gt=0, lt=0.5)
    """Probabilities count as at least this and at most 1 minus this: the score of a certain one is infinite."""

    @property
    def scale(self) -> float:
        """Nats per unit of preference score."""
        return 1.0 / self.beta

    def standings(self, judged: Judged) -> np.ndarray:
        """Mean preference scores against all judged responses of the group, itself, with its 0, included."""
        probs = np.clip(judged.verdict.matrix(), self.prob_clip, 1.0 - self.prob_clip)  # NaN stays NaN
        scores = self.tau * np.log(probs / (1.0 - probs))
        known = ~np.isnan(scores)
        means: np.ndarray = np.where(known, scores, 0.0).sum(axis=1) / known.sum(axis=1)
        return means

    def with_standing(self, sequence: TrainSequence, standing: float) -> TrainSequence:
        """As the advantage of each token."""
        return with_advantages([sequence], [standing])[0]

    def standings_of(self, batch: Batch) -> Tensor:
        """The same on every token; 0 for a response without any."""
        return batch.need("advantages_BT")[:, 0]
