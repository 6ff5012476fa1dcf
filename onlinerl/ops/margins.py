"""The margin of a pair, and its logistic loss. Axes: B rows, P pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn.functional import logsigmoid

from onlinerl.ops.logprobs import lengths
from onlinerl.ops.preference import by_pair, log_ratios

if TYPE_CHECKING:
    from onlinerl.batch import Batch, Outputs


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
