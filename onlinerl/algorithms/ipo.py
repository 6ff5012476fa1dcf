"""IPO: "A General Theoretical Paradigm to Understand Learning from Human Preferences", equation 17."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from onlinerl.algorithms._margin import Margin


class Ipo(Margin):
    """phi(h) = (h - 1 / (2 tau))^2: the margin is brought to a constant instead of being pushed to infinity.

    h is the difference of summed log-ratios, as printed. With `length_norm` it is that of means, as in some libraries, and `tau` then is
    smaller by about the mean length. On pairs of the current policy this is online IPO: "Human Alignment of Large Language Models through
    Online Preference Optimisation".
    """

    beta: float = Field(1.0, gt=0)
    """The paper has none; h = beta (D_w - D_l)."""
    tau: float = Field(0.1, gt=0)
    """The policy stays the closer to the reference the larger it is."""

    def phi(self, z_P: Tensor) -> Tensor:
        """Smallest at 1 / (2 tau)."""
        return (z_P - 1.0 / (2.0 * self.tau)).square()
