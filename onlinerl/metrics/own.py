"""How an algorithm names the metrics that only it has."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class OwnMetric:
    """`help` says what it is in one sentence; units are those of `onlinerl.metrics.vocabulary`.

    `step`: the loss returns it in `LossOutput.metrics`, averaged over the batch and the steps; `iteration`: `figures` returns it."""

    name: str
    help: str
    unit: str
    per: Literal["step", "iteration"] = "step"
