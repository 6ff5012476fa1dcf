"""OSP: "Online Self-Preferring Language Models"."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from onlinerl.algorithms.dpo import Dpo
from onlinerl.protocols.algorithm import by_knobs

if TYPE_CHECKING:
    from onlinerl.protocols.needs import Needs


class Osp(Dpo):
    """DPO on how strong a preference is: p f(z) + (1 - p) f(-z), whose optimum is z = logit(p).

    The paper's oracle is the policy itself, asked in both orders; any oracle that gives probabilities will do. The pairs are those of the upper half
    of a group against the lower half, rank by rank (`pairing.name: ranked` by default), so that preferences of any strength are among them.
    """

    soft_labels: bool = True

    @by_knobs
    def needs(self) -> Needs:
        """Of DPO, with its own pairs."""
        return replace(super().needs, pairing="ranked")
