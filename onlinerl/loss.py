"""What a loss returns."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean kept as sum and count, so that parts of a batch can be added up before dividing."""

    total: Tensor
    count: Tensor

    @staticmethod
    def of(values: Tensor, mask: Tensor | None = None) -> Mean:
        """Mean of `values` where `mask` is true (everywhere if None); carries no gradient."""
        values = values.detach().float()
        if mask is None:
            return Mean(total=values.sum(), count=torch.tensor(float(values.numel()), device=values.device))
        mask = mask.to(values.dtype)
        return Mean(total=(values * mask).sum(), count=mask.sum())


@dataclass(frozen=True, kw_only=True)
class LossOutput:
    """What a loss returns: a SUM over its units, which the learner divides once by a global count."""

    total: Tensor
    """Scalar, with gradient."""
    metrics: dict[str, Mean] = field(default_factory=dict)
