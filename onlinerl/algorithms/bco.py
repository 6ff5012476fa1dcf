"""BCO: "Binary Classifier Optimization for Large Language Model Alignment"."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from onlinerl.algorithms._labelled import Labelled
from onlinerl.protocols.reported import Reported

if TYPE_CHECKING:
    from onlinerl.ops.whole_step import Rows, State


class Bco(Labelled):
    """Mean over responses of w_d f(r - d) if desirable, w_u f(d - r) if not, f(z) = -log sigmoid(z), r = beta D; d without gradient.

    d is the running mean of (mean of r of the desirable + mean of r of the others) / 2, of which a step's own value is part before it is
    used. Steps with responses of one kind only leave it as it is. The paper's density-ratio weights, for prompts of which one kind is
    rare, are not here. Not the paper's: `beta`, 0.01 there; 0.1 is that of TRL and of `kto`, and holds the policy closer to the reference.
    """

    beta: float = Field(0.1, gt=0)
    baseline_decay: float | None = Field(None, ge=0, lt=1)
    """Share of the old d in the new one, so that early steps are forgotten. None: all steps so far count the same."""

    metrics = (
        *Labelled.metrics,
        Reported("baseline", "Running mean of the reward that desirable and other responses share", "nats/sequence"),
    )

    def initial_state(self) -> State:
        """d, and how many steps it is the mean of."""
        return {"baseline": 0.0, "steps": 0.0}

    def next_state(self, rows: Rows) -> State:
        """With the mean of this step; of responses of weight 0 it does not depend."""
        rewards_N, counts_N, desirable_N = self.beta * rows.values_N.detach(), rows.weight_N > 0, rows.facts["desirable"] > 0
        good, bad = rewards_N[counts_N & desirable_N], rewards_N[counts_N & ~desirable_N]
        if not len(good) or not len(bad):
            return rows.state
        old, steps = rows.state["baseline"], rows.state["steps"]
        decay = steps / (steps + 1.0) if self.baseline_decay is None else self.baseline_decay * (steps > 0)
        new = (good.mean() + bad.mean()).item() / 2.0
        return {"baseline": decay * old + (1.0 - decay) * new, "steps": steps + 1.0}

    def state_metrics(self, state: State) -> State:
        """d."""
        return {"baseline": state["baseline"]}

    def shift(self, rows: Rows) -> float:
        """d after this step."""
        return self.next_state(rows)["baseline"]

    def labelled_loss(self, z_N: Tensor) -> Tensor:
        """log 2 at 0."""
        return -logsigmoid(z_N)
