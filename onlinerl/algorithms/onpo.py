"""ONPO: "Improving LLM General Preference Alignment via Optimistic Online Mirror Descent", arXiv 2502.16852."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import Field
from torch import Tensor

from onlinerl.algorithms._pairwise import Pairwise
from onlinerl.ops.margins import margin
from onlinerl.protocols.algorithm import Reference, by_knobs
from onlinerl.types.plan import Objection

if TYPE_CHECKING:
    from onlinerl.batch import Batch, Outputs
    from onlinerl.loss import Mean
    from onlinerl.protocols.needs import Needs
    from onlinerl.types.plan import Plan


class Onpo(Pairwise):
    """(g - eta / 2)^2, g the margin log pi(w) / pi(l) less that of the weights which the pass starts from.

    Two passes over the pairs of an iteration: the first moves auxiliary weights, pi'_t to pi'_{t+1}, the second makes the policy pi_{t+1} of
    them, as if the next game were this one (optimism). Nothing holds the policy to the base model: watch `kl_ref`.
    """

    eta: float = Field(100.0, gt=0)
    """Nats of margin per unit of win rate. At the default of language models, 50 nats are not meant to be reached. That the last policy of an
    exact game converges is proven up to 1/8."""
    optimistic: bool = True
    """Without it one pass against the policy of the iteration's start: self-play by mirror descent."""
    soft_labels: bool = False
    """The target is eta (P - 1/2), P the probability that the chosen response beats the rejected one: what labels give on average."""

    @by_knobs
    def needs(self) -> Needs:
        """Of a pair loss; probabilities for soft labels, and for two passes pairs of the policy that is played against next."""
        plain = super().needs
        one = replace(plain, preferences=self.soft_labels or plain.preferences)
        return replace(one, reference=False, auxiliary=True, off_policy="refused") if self.optimistic else one

    @by_knobs
    def reference(self) -> Reference:
        """The policy of the iteration's start, or what the pass starts from, which is no iterate."""
        return "none" if self.optimistic else "previous"

    @by_knobs
    def loss_at_reference(self) -> float | None:
        """The square of the target."""
        return None if self.soft_labels else self.unless_modified((self.eta / 2) ** 2)

    def objection(self, plan: Plan) -> Objection | None:
        """Optimism is about the latest game."""
        if not (self.optimistic and plan.max_lag):
            return None
        cause = "is 1, and the second pass takes the pairs for a game of the newest policy, which an older one has sampled"
        return Objection(field="schedule.max_lag", cause=cause, fix="set it to 0, or algorithm.optimistic=false")

    def pair_loss(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Mean]]:
        """A square per pair; z is the margin in units of win rate."""
        g_P = margin(outputs, batch)
        target_P = self.eta * (batch.prob_P - 0.5) if self.soft_labels else self.eta / 2
        return (g_P - target_P).square(), g_P / self.eta, {}
