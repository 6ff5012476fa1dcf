"""What a KL to the reference costs that is measured on samples of the policy. Axes: B rows, T response positions, P pairs with N samples each,
G groups of at most K responses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onlinerl.loss import LossOutput, Mean
from onlinerl.ops.logprobs import masked, token_log_ratios
from onlinerl.ops.preference import log_ratios
from onlinerl.ops.ratios import bounded_exp

if TYPE_CHECKING:
    from torch import Tensor

    from onlinerl.batch import Batch, Outputs


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


def of_pairs(loss: LossOutput, outputs: Outputs, batch: Batch, coef: float) -> LossOutput:
    """The loss plus coef times that of the samples that go with each pair (`online_PN`), which counts what the pair counts.

    Raises:
        ValueError: if reference log-probs are missing.
    """
    ratios_B = log_ratios(outputs, batch)
    rows_PN = batch.online_PN if batch.online_PN is not None else batch.pairs_P2[:, :0]
    ratios_PN, valid_PN = ratios_B[rows_PN.clamp(min=0)], rows_PN >= 0
    kl_P = coef * online_kl(ratios_PN, valid_PN)
    metrics = loss.metrics | {"online_kl": Mean.of(ratios_PN, valid_PN)}
    return LossOutput(total=loss.total + (kl_P * batch.weight_P).sum(), metrics=metrics)


def of_rows(loss: LossOutput, outputs: Outputs, batch: Batch, coef: float, cap: float | None, share: float) -> LossOutput:
    """The loss plus coef times sg[min(rho, cap) D] D of each response, which counts `share`; D is its log-ratio to the reference, rho its ratio
    to the weights that training starts from.

    That is the gradient of KL(policy || reference): "The Importance of Online Data: Understanding Preference Fine-tuning via Coverage" (arXiv
    2406.01462), equation 5, without its baseline.

    Raises:
        ValueError: if reference or old log-probs are missing.
    """
    ratios_B, mask_BT = token_log_ratios(outputs, batch).sum(dim=1), batch.mask_BT
    moved_BT = masked(outputs.logprobs_BT, mask_BT) - masked(batch.need("old_logprobs_BT"), mask_BT)
    counts_B = bounded_exp(moved_BT.sum(dim=1)).detach()
    if cap is not None:
        counts_B = counts_B.clamp(max=cap)
    kl_B = share * coef * counts_B * ratios_B.detach() * ratios_B
    total = loss.total + (kl_B * batch.weight_B * batch.policy_weight_B).sum()
    return LossOutput(total=total, metrics=loss.metrics | {"online_kl": Mean.of(ratios_B, mask_BT.any(dim=1))})
