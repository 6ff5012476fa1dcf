"""Labels of pairs that may be wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from onlinerl.algorithms._pairwise import Pairwise
from onlinerl.ops.preference import smoothed
from onlinerl.protocols.algorithm import by_knobs

if TYPE_CHECKING:
    from onlinerl.batch import Batch
    from onlinerl.protocols.needs import Needs


class UncertainLabels(Pairwise):
    """A loss on pairs that takes each label for right with a probability p."""

    soft_labels: bool = False
    """Train on the oracle's probability instead of taking every pair's label for certain."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of labels assumed to be wrong: "A Note on DPO with Noisy Preferences & Relationship to IPO"."""
    flip_rate: float = Field(0.0, ge=0, lt=0.5)
    """Share of labels that are wrong, corrected for without bias: "Provably Robust DPO: Aligning Language Models with Noisy Feedback". The
    loss is then unbounded below, so it needs `margin_cap`."""
    margin_cap: float | None = Field(None, gt=0, validate_default=True)
    """Largest z; a pair beyond it teaches nothing more."""

    @field_validator("margin_cap")
    @classmethod
    def _bounds(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is None and info.data.get("flip_rate"):
            raise ValueError("with a flip_rate the loss is unbounded below; set it, e.g. to 10")
        return value

    @by_knobs
    def needs(self) -> Needs:
        """Of a pair loss; probabilities if labels are soft."""
        pairs = super().needs
        return replace(pairs, preferences=self.soft_labels or pairs.preferences)

    def label_probs(self, batch: Batch) -> Tensor:
        """p[P]: how far each label is trusted. It may leave [0, 1] with a flip rate."""
        prob_P = smoothed(batch.prob_P if self.soft_labels else torch.ones_like(batch.prob_P), self.label_smoothing)
        return (prob_P - self.flip_rate) / (1.0 - 2.0 * self.flip_rate)
