"""What the preference losses share: sums over whole responses, and pairs of them. Axes: B rows, T response positions, P pairs (w the chosen response, l the rejected one)."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from onlinerl.batch import Batch, Mean, Outputs
from onlinerl.ops.logprobs import lengths, masked, token_log_ratios


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


def margin(outputs: Outputs, batch: Batch, *, per_token: bool = False) -> Tensor:
    """h[P] = D_w - D_l, in nats; `per_token`: of means over tokens.

    Raises:
        ValueError: if the batch carries no reference log-probs.
    """
    ratios_B = log_ratios(outputs, batch)
    chosen, rejected = by_pair(ratios_B / lengths(batch) if per_token else ratios_B, batch)
    return chosen - rejected


def logistic(z: Tensor, prob: Tensor | float) -> Tensor:
    """p f(z) + (1 - p) f(-z) per pair, f(z) = -log sigmoid(z); slope sigmoid(z) - p, so the optimum is z = logit(p).

    p = 1 is the loss of "Direct Preference Optimization: Your Language Model is Secretly a Reward Model", equation 7; p < 1 that of
    "A Note on DPO with Noisy Preferences & Relationship to IPO".
    """
    return -prob * logsigmoid(z) - (1.0 - prob) * logsigmoid(-z)


def smoothed(prob: Tensor, label_smoothing: float) -> Tensor:
    """(1 - ls) p + ls (1 - p): the probability that the label is right if it is flipped with probability ls."""
    return (1.0 - label_smoothing) * prob + label_smoothing * (1.0 - prob)


def online_kl(ratios_GK: Tensor, valid_GK: Tensor) -> Tensor:
    """sg[D - b] D, averaged over the samples of each group, [G]; b is the mean D of the others, 0 of a single one.

    The gradient is that of KL(policy || reference) where the samples are the policy's own: "The Importance of Online Data: Understanding
    Preference Fine-tuning via Coverage" (arXiv 2406.01462), equation 5, with the baseline of REINFORCE leave-one-out.

    Args:
        ratios_GK: D, log-ratios of policy to reference of whole responses, in nats.
        valid_GK: bool, false where there is no sample; whatever is there reaches neither value nor gradient.
    """
    sizes_G = valid_GK.sum(dim=1)
    ratios_GK = ratios_GK.masked_fill(~valid_GK, 0.0)
    others_GK = (ratios_GK.sum(dim=1, keepdim=True) - ratios_GK) / (sizes_G - 1).clamp(min=1)[:, None]
    weights_GK = (ratios_GK - others_GK).masked_fill(~valid_GK, 0.0).detach()
    return (weights_GK * ratios_GK).sum(dim=1) / sizes_G.clamp(min=1)


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
