"""The weights of OPTune: "OPTune: Efficient Online Preference Tuning"."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import Field, ValidationInfo, field_validator

from onlinerl.algorithms.dpo import Dpo

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from onlinerl.types.training import TrainItem

Weights = Literal["sigmoid_gap", "equal", "score_gap", "certainty", "strength", "dcg", "per_prompt", "age", "source"]


class Optune(Dpo):
    """DPO in which a pair counts the more, the further its scores are apart: w = sigmoid(gap_scale (r_w - r_l)), divided by its mean over
    the iteration.

    Of the paper this is the weighting, whose form there could not be verified. The other half, sampling anew only for the prompts that are
    answered worst and training on the others' stored responses once more, is `selection.name: regenerate`, which goes with other losses too.
    """

    gap_scale: float = Field(1.0, ge=0)
    """0 weighs all pairs alike; it is in units of the oracle's score, from which a weight must not saturate."""
    pair_weights: Weights = "sigmoid_gap"  # type: ignore[assignment]
    """What a pair counts: as above, or as for other losses on pairs."""

    @field_validator("gap_scale")
    @classmethod
    def _is_read(cls, value: float, info: ValidationInfo) -> float:
        if value != cls.model_fields["gap_scale"].default and info.data.get("pair_weights") != "sigmoid_gap":
            raise ValueError("only pair_weights=sigmoid_gap reads it")
        return value

    def raw_weights(self, items: Sequence[TrainItem]) -> Iterable[float]:
        """The sigmoid of gaps, or as for other losses on pairs."""
        return map(self._sigmoid, items) if self.pair_weights == "sigmoid_gap" else super().raw_weights(items)

    def _sigmoid(self, item: TrainItem) -> float:
        chosen, rejected = item.sequences[:2]
        bounded = max(-500.0, min(500.0, self.gap_scale * (chosen.score - rejected.score)))
        return 1.0 / (1.0 + math.exp(-bounded))
