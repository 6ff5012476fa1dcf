"""P3O: "Pairwise Proximal Policy Optimization: Harnessing Relative Feedback for LLM Alignment"."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field

from onlinerl.algorithms._paid_kl import PaidKl
from onlinerl.loss import LossOutput
from onlinerl.ops.items import judged_sequences
from onlinerl.ops.logprobs import lengths, masked
from onlinerl.ops.ratios import bounded_exp
from onlinerl.protocols.algorithm import by_knobs
from onlinerl.types.training import TrainItem, TrainSequence

if TYPE_CHECKING:
    from onlinerl.batch import Batch, Outputs
    from onlinerl.types.labels import Judged, Pair


class P3o(PaidKl):
    """Policy gradient on the difference of two rewards for one prompt, in which all that they have in common cancels.

    Per pair the gradient is -1/2 a rho_1 rho_2 (grad S_1 - grad S_2): a = r_1 - r_2, r = score - kl_coef * sum_t (old - reference), S the
    log-prob of a response, rho its ratio, so that a pair counts by how probable both have become. Where clips are placed is not the
    paper's wording; they are such that without them the gradient is this one.
    """

    unit = "pair"
    least = 2

    kl_coef: float = Field(0.05, ge=0)
    """Price of one nat of KL to the reference, in units of the score. It is paid inside the reward, by the policy that sampled."""
    importance_sampling_mode: Literal["sequence_truncate", "sequence_mask"] = "sequence_truncate"
    """Whether a response whose ratio is outside of floor and cap counts as that bound (`truncate`) or not at all (`mask`); a pair has the
    weights of both."""
    pairs: Literal["disjoint", "all"] = "disjoint"
    """The first response with the second, the third with the fourth, ..., or all pairs, K - 1 times the work."""
    clip_mode: Literal["separate", "joint"] = "separate"
    """Whether the ratio of each response is clipped, or the difference of their log-ratios."""
    clip_range: float = Field(0.2, gt=0)
    """Ratios outside 1 +- clip_range, or differences outside +- clip_range, earn nothing more."""

    @by_knobs
    def loss_at_reference(self) -> float | None:
        """What the two responses gain cancels; their likelihood does not."""
        return None if self.nll_coef else 0.0

    def most_items(self, samples: int, pairs: int) -> int:
        """Pairs of a group."""
        return samples * (samples - 1) // 2 if self.pairs == "all" else samples // 2

    def items(self, judged: Judged, pairs: Sequence[Pair]) -> tuple[list[TrainItem], Counter[str]]:
        """Pairs of judged responses in their order. Also left out: `identical` pairs, and `single`, the one without a partner."""
        sequences, dropped = judged_sequences(judged, at_least=self.least)
        disjoint = zip(sequences[::2], sequences[1::2], strict=False)
        made = list(combinations(sequences, 2) if self.pairs == "all" else disjoint)
        items = [
            TrainItem(prompt_id=judged.group.prompt.id, sequences=p) for p in made if p[0].response_ids != p[1].response_ids
        ]
        alone = len(sequences) % 2 if self.pairs == "disjoint" else 0
        return items, dropped + Counter(identical=len(made) - len(items), single=alone)

    def prepare(self, items: Sequence[TrainItem], past: Sequence[Mapping[str, float]] = ()) -> Iterator[TrainItem]:
        """The reward r of each response in the place of its score."""
        for item in items:
            first, second = (s.with_(score=self.reward(s)) for s in item.sequences)
            yield replace(item, sequences=(first, second))

    def reward(self, sequence: TrainSequence) -> float:
        """Score minus the price of the KL (k1, summed over tokens)."""
        paid = self.kl_coef * float(self.nats(sequence).sum()) if self.kl_coef > 0 else 0.0
        return self.score(sequence) - paid

    def loss(self, outputs: Outputs, batch: Batch) -> LossOutput:
        """Sum over pairs; see `surrogate` for what it raises."""
        mask, (first, second) = batch.mask_BT, batch.pairs_P2.unbind(dim=1)
        other_B = torch.arange(len(mask), device=mask.device).scatter(0, first, second).scatter(0, second, first)
        gain_B = batch.scores_B - batch.scores_B[other_B]
        old_BT = masked(batch.need("old_logprobs_BT"), mask)
        moved_B = (self.moving(masked(outputs.logprobs_BT, mask), old_BT) - old_BT).sum(dim=1)
        counts_B = bounded_exp(moved_B).detach()
        weights_BT, _ = self.correction(old_BT - masked(batch.need("behavior_logprobs_BT"), mask), mask)
        counts_B = counts_B * weights_BT[:, 0]
        # A response's own ratio and weight enter in the surrogate, those of the other one as part of its advantage.
        advantages_BT = (gain_B * counts_B[other_B])[:, None].expand(mask.shape)
        bounds = (self.clip_range, self.clip_range, None)
        batch = replace(batch, advantages_BT=advantages_BT)
        loss_BT, metrics = self.surrogate(outputs, batch, bounds, of="response")
        loss_B = loss_BT.sum(dim=1) / lengths(batch)
        loss_P = loss_B[first] + loss_B[second]
        if self.clip_mode == "joint":
            apart_P, slope_P = moved_B[first] - moved_B[second], (gain_B * counts_B * counts_B[other_B])[first]
            loss_P = -torch.minimum(slope_P * apart_P, slope_P * apart_P.clamp(-self.clip_range, self.clip_range))
        loss = LossOutput(total=(0.5 * loss_P * batch.weight_P).sum(), metrics=metrics)
        return self.with_terms(loss, outputs, batch, share=0.5)
