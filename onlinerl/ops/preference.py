"""What the preference losses share: sums over whole responses, and pairs of them. Axes: B rows, T response positions, P pairs (w the chosen response, l the rejected one)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from onlinerl.loss import Mean
from onlinerl.ops.logprobs import lengths, masked, token_log_ratios

if TYPE_CHECKING:
    from onlinerl.batch import Batch, Outputs


def sequence_logprobs(outputs: Outputs, batch: Batch) -> Tensor:
    """S[B] = sum_t m * lp: log-prob of each whole response under the policy, in nats."""
    return masked(outputs.logprobs_BT, batch.mask_BT).sum(dim=1)


def log_ratios(outputs: Outputs, batch: Batch) -> Tensor:
    """D[B] = S - S_ref: log-ratio of policy to reference of each whole response, in nats. Gradient flows through S only.

    Tokens are subtracted before they are summed: two sums of a thousand nats would leave little of a difference of one.

    Raises:
        ValueError: if the batch carries no reference log-probs.
    """
    return token_log_ratios(outputs, batch).sum(dim=1)


def by_pair(values_B: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """A value per row -> its values of the chosen and of the rejected responses, [P] each."""
    chosen, rejected = batch.pairs_P2.unbind(dim=1)
    return values_B[chosen], values_B[rejected]


def smoothed(prob: Tensor, label_smoothing: float) -> Tensor:
    """(1 - ls) p + ls (1 - p): the probability that the label is right if it is flipped with probability ls."""
    return (1.0 - label_smoothing) * prob + label_smoothing * (1.0 - prob)


def pair_metrics(outputs: Outputs, batch: Batch, z: Tensor, *, reference: bool = True) -> dict[str, Mean]:
    """What every pair loss reports: the two sides apart (the loss sees only their difference), accuracies, lengths. Log-ratios only with a
    `reference`."""
    sums_B, lengths_B = sequence_logprobs(outputs, batch).detach(), lengths(batch)
    sum_w, sum_l = by_pair(sums_B, batch)
    mean_w, mean_l = by_pair(sums_B / lengths_B, batch)
    length_w, length_l = by_pair(lengths_B, batch)
    metrics = {
        "z": Mean.of(z),
        "accuracy": Mean.of(z > 0),  # does the policy prefer the chosen response more than the reference does
        "ranking_accuracy": Mean.of(sum_w > sum_l),  # does it prefer it at all
        "ranking_accuracy_per_token": Mean.of(mean_w > mean_l),
        "chosen_length": Mean.of(length_w),
        "rejected_length": Mean.of(length_l),
        "length_ratio": Mean.of(length_w / length_l),
    }
    if not reference:
        return metrics
    ratio_w, ratio_l = by_pair(log_ratios(outputs, batch).detach(), batch)
    return metrics | {
        "chosen_log_ratio": Mean.of(ratio_w),
        "rejected_log_ratio": Mean.of(ratio_l),
        "margin": Mean.of(ratio_w - ratio_l),
        "chosen_fell": Mean.of(ratio_w < 0),  # share of chosen responses that lost probability
    }
