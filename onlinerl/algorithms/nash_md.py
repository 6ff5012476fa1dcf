"""Nash-MD: "Nash Learning from Human Feedback", arXiv 2312.00886."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from onlinerl.loss import LossOutput, Mean
from onlinerl.ops.items import sample_items, train_sequences
from onlinerl.ops.logprobs import masked, token_log_ratios
from onlinerl.ops.ratios import k3
from onlinerl.protocols.algorithm import Algorithm, by_knobs
from onlinerl.protocols.needs import Needs
from onlinerl.protocols.reported import Reported

if TYPE_CHECKING:
    from onlinerl.batch import Batch, Outputs
    from onlinerl.types.labels import Judged, Pair
    from onlinerl.types.training import TrainItem


class NashMd(Algorithm):
    """-(P(y > y') - 1/2) S(y) + tau sg[D(y)] S(y): REINFORCE on the probability that a response y of the policy beats y' of the mixture of
    policy and reference, with the whole gradient of the KL of the response (equation 4). D = log pi(y) / pi_ref(y), S = log pi(y).

    The mixture is of logits at each token, (1 - mixture_coef) policy + mixture_coef reference. On exact games it is the mixture, not the
    policy, that becomes the Nash policy of the game in which a nat of KL to the reference costs tau / (1 - mixture_coef) (proposition 5.2).

    Not the paper's: `tau`, 0.008 there; 0.1 is that of TRL, and nothing else holds the policy to the reference.
    """

    unit = "sequence"
    reference = "fixed"
    metrics = (Reported("win_rate_mixture", "How probably a response beats one of the mixture, mean", "ratio"),)

    mixture_coef: float = Field(0.125, ge=0, le=1)
    """Weight of the reference in the opponent: 0 is self-play, 1 looks for the best response to the reference. 0.125 to 0.375 in the paper."""
    tau: float = Field(0.1, ge=0)
    """Price of one nat of KL of a response to the reference, in win rates."""
    nll_coef: float = Field(0.0, ge=0)
    """Weight of the negative log-prob per token of responses that beat the mixture more often than not."""
    mixture_samples: int = Field(1, ge=1)
    """Opponents for each prompt; P(y > y') is the mean over them."""

    @by_knobs
    def needs(self) -> Needs:
        """Win rates against the mixture, and the reference."""
        return Needs(
            reference=True,
            preferences=True,
            sampling_temperature=True,
            mixture_samples=self.mixture_samples,
            mixture_weight=self.mixture_coef,
            min_samples=2,
            off_policy="refused",
        )

    def most_items(self, samples: int, pairs: int) -> int:
        """The policy's."""
        return samples - self.mixture_samples

    def items(self, judged: Judged, pairs: Sequence[Pair]) -> tuple[list[TrainItem], Counter[str]]:
        """Each response of the policy by itself, with its win rate against those of the mixture. One that was compared with none of them is
        left out (`unjudged`), and so are all where there are none (`single`)."""
        sequences, matrix = train_sequences(judged), judged.verdict.matrix()
        opponents = [k for k, sequence in sequences.items() if sequence.source == "mixture"]
        own = [k for k, sequence in sequences.items() if sequence.source == "policy"]
        dropped = Counter(unjudged=len(judged.group.rollouts) - len(sequences))
        if not opponents:
            return [], +(dropped + Counter(single=len(own)))
        met = {k: matrix[k, opponents][~np.isnan(matrix[k, opponents])] for k in own}
        dropped["unjudged"] += sum(not len(won) for won in met.values())
        fought = [sequences[k].with_(win_rate=float(won.mean())) for k, won in met.items() if len(won)]
        return sample_items(judged, fought), +dropped

    def loss(self, outputs: Outputs, batch: Batch) -> LossOutput:
        """Sum over responses.

        Raises:
            ValueError: if the batch carries no reference log-probs.
        """
        mask = batch.mask_BT
        S_B = masked(outputs.logprobs_BT, mask).sum(dim=1)
        d_BT = token_log_ratios(outputs, batch)
        D_B = d_BT.sum(dim=1).detach()
        loss_B = (self.tau * D_B - (batch.win_rates_B - 0.5)) * S_B
        metrics = {
            "kl_reference": Mean.of(k3(d_BT), mask),
            "response_length": Mean.of(batch.lengths_B, mask.any(dim=1)),
            "win_rate_mixture": Mean.of(batch.win_rates_B, mask.any(dim=1)),
            "policy_loss": Mean.of(loss_B, mask.any(dim=1)),
        }
        loss = LossOutput(total=(loss_B * batch.weight_B).sum(), metrics=metrics)
        if not self.nll_coef:
            return loss
        from onlinerl.ops.terms import positive_nll  # not with the class: few ask for it

        return positive_nll(loss, outputs, batch, self.nll_coef, batch.win_rates_B[:, None] > 0.5, per_token=False)
