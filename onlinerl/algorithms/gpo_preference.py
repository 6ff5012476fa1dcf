"""GPO: "General Preference Modeling with Preference Representations for Aligning Language Models"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field
from torch import Tensor

from onlinerl.algorithms._self_play import SelfPlay
from onlinerl.ops.items import with_advantages
from onlinerl.protocols.reported import Reported

if TYPE_CHECKING:
    from onlinerl.batch import Batch
    from onlinerl.types.labels import Judged
    from onlinerl.types.training import TrainItem, TrainSequence


class GpoPreference(SelfPlay):
    """Mean over responses of (D - s / beta)^2, s the mean preference score of a response against its group: `sppo` with scores for win
    rates, and the log-partition set to 0.

    The paper's preference model embeds responses, v, and scores a pair with s(i, j) = (R v_i) . v_j; its probability is sigmoid(s / tau).
    Here it is the other way round: s = tau times the log-odds of any oracle: those that it gives, as the paper's preference model does, those
    that its scores imply by Bradley-Terry, or, of one that says probabilities only, their logits.
    """

    metrics = (
        *SelfPlay.metrics,
        Reported("preference_score_max", "Largest mean preference score of a response, either way", "1", "iteration"),
    )

    beta: float = Field(0.001, gt=0)
    """Preference score per nat of log-ratio."""
    tau: float = Field(0.1, gt=0)
    """Preference score at which the odds are e to 1. Only tau / beta matters, unless the paper's values are to be kept."""
    prob_clip: float = Field(0.02, gt=0, lt=0.5)
    """Of an oracle that says no more, probabilities count as at least this and at most 1 minus this: the score of a certain one is infinite."""
    score_clip: float = Field(1.0, gt=0)
    """Preference scores are cut off at this, either way, as they have no bound of their own; 1 is the most that embeddings of length 1 give."""

    @property
    def scale(self) -> float:
        """Nats per unit of preference score."""
        return 1.0 / self.beta

    def standings(self, judged: Judged) -> np.ndarray:
        """Mean preference scores against all judged responses of the group, itself, with its 0, included."""
        verdict, most = judged.verdict, self.score_clip
        if verdict.preferences is not None and verdict.log_odds is None:
            most = min(most, self.tau * float(np.log(1.0 / self.prob_clip - 1.0)))
        scores = np.clip(self.tau * verdict.odds(), -most, most)  # NaN stays NaN
        known = ~np.isnan(scores)
        means: np.ndarray = np.where(known, scores, 0.0).sum(axis=1) / known.sum(axis=1)
        return means

    def with_standing(self, sequence: TrainSequence, standing: float) -> TrainSequence:
        """As the advantage of each token."""
        return with_advantages([sequence], [standing])[0]

    def standings_of(self, batch: Batch) -> Tensor:
        """The same on every token; 0 for a response without any."""
        return batch.need("advantages_BT")[:, 0]

    def figures(self, items: Sequence[TrainItem], past: Sequence[Mapping[str, float]] = ()) -> Mapping[str, float]:
        """How far scores go."""
        found = (abs(float(a)) for item in items for s in item.sequences if s.advantages is not None for a in s.advantages[:1])
        return {"preference_score_max": max(found, default=0.0)}
