"""What losses have only where a knob says so, and import only then. Axes: B rows, T response positions, P pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from onlinerl.loss import LossOutput, Mean
from onlinerl.ops.logprobs import lengths, masked
from onlinerl.ops.preference import by_pair
from onlinerl.ops.ratios import bounded_exp

if TYPE_CHECKING:
    from onlinerl.batch import Batch, Outputs


def closeness(outputs: Outputs, batch: Batch) -> Tensor:
    """w[P] = min(1, w(y_w) w(y_l)), w(y) = exp(mean over tokens of lp - log sum_v pi_v^2), of the policy of the moment, without gradient.

    "WPO: Enhancing RLHF with Weighted Preference Optimization", whose weights make pairs of other policies count as if sampled from this
    one. w(y) is 1 where tokens are about as probable as the policy's own samples are. As in the authors' code the product is cut off at 1, and
    weights are not divided by their mean over the batch, so the loss gets smaller where pairs are far from the policy.

    Raises:
        ValueError: if the learner did not compute log sum_v pi_v^2.
    """
    chosen, rejected = by_pair(_excess(outputs, batch), batch)
    return torch.exp(chosen + rejected).clamp(max=1.0)


def row_closeness(outputs: Outputs, batch: Batch) -> Tensor:
    """min(1, w(y)) of each row, [B]: `closeness` for losses on single responses.

    Raises:
        ValueError: if the learner did not compute log sum_v pi_v^2.
    """
    return torch.exp(_excess(outputs, batch)).clamp(max=1.0)


def _excess(outputs: Outputs, batch: Batch) -> Tensor:
    excess_BT = masked(outputs.logprobs_BT - outputs.need("collision_BT"), batch.mask_BT).detach()
    return excess_BT.sum(dim=1) / lengths(batch)


def beyond_the_shorter(batch: Batch) -> Tensor:
    """bool[B, T]: tokens of the longer response of a pair at positions that the shorter one does not have."""
    shorter_P = torch.minimum(*by_pair(batch.lengths_B, batch))
    shorter_B = batch.lengths_B.scatter(0, batch.pairs_P2.flatten(), shorter_P.repeat_interleave(2))
    return torch.arange(batch.mask_BT.shape[1], device=shorter_B.device)[None, :] >= shorter_B[:, None]


def reweighed(logprobs_BT: Tensor, old_BT: Tensor, alpha: float) -> Tensor:
    """The log-probs with the same values, and gradients times 1 - alpha + alpha p, p the probability of the token before training.

    "Do Not Let Low-Probability Tokens Over-Dominate in RL for LLMs" (arXiv 2505.12929), advantage reweighting. There the advantage of a token is
    multiplied, which is the same gradient; here a ratio, of a token or of a whole response, is clipped as it would be without.
    """
    now_BT = logprobs_BT.detach()
    return now_BT + (1.0 - alpha + alpha * old_BT.exp()) * (logprobs_BT - now_BT)


def positive_nll(
    loss: LossOutput, outputs: Outputs, batch: Batch, coef: float, better_BT: Tensor, *, per_token: bool
) -> LossOutput:
    """The loss plus coef times the negative log-probs of the tokens that were better than expected.

    "VAPO: Efficient and Reliable Reinforcement Learning for Advanced Reasoning Tasks" (arXiv 2504.05118), whose mean is over the tokens of right
    responses only; here the learner divides by the count of all units.

    Args:
        loss: of the micro-batch, a sum.
        outputs: of the policy.
        batch: the micro-batch.
        coef: price of a nat.
        better_BT: bool, where they are; broadcast to all tokens from [B, 1].
        per_token: whether the unit is a token; else it is a response, whose tokens are averaged.
    """
    mask_BT = batch.sampled_BT & better_BT
    nll_BT = -masked(outputs.logprobs_BT, mask_BT)
    nll_B = nll_BT.sum(dim=1) / (1.0 if per_token else lengths(batch))
    total = loss.total + coef * (nll_B * batch.weight_B * batch.policy_weight_B).sum()
    return LossOutput(total=total, metrics=loss.metrics | {"chosen_nll": Mean.of(nll_BT, mask_BT)})


def near_the_sampler(log_ratio_BT: Tensor, mask_BT: Tensor, band: tuple[float, float]) -> Tensor:
    """bool[B]: whether the geometric mean over its tokens of learner / sampler lies in the band, for each response.

    It does not grow with the length as their product does, so that one band serves short and long responses: the filter of OpenRLHF's
    `seq-mask-tis` and of verl's `rollout_rs: geometric`.

    Args:
        log_ratio_BT: log(learner / sampler) of each response token.
        mask_BT: which tokens are meant; a response without any is in the band.
        band: lowest and highest mean.
    """
    sums_B = masked(log_ratio_BT, mask_BT).double().sum(dim=1)
    mean_B = bounded_exp(sums_B / mask_BT.sum(dim=1).clamp(min=1))
    return (mean_B >= band[0]) & (mean_B <= band[1])
