"""The auxiliary loss that keeps the routers of a mixture of experts in balance, over all tokens of an optimizer step.

E times the sum over experts of f P: f is how often a token chooses the expert, P the mean probability that its router gives it, over all
layers: "Switch Transformers: Scaling to Trillion Parameter Models with Simple and Efficient Sparsity" (arXiv 2101.03961), equations 4 to 6,
as transformers has it for a batch. No gradient flows through f, which is that of the whole step: so the gradient does not depend on
micro-batches and ranks. A product of means of each would, and would ask every micro-batch to be in balance by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Routed(NamedTuple):
    """What the routers of all layers did with some tokens; a token counts once in each layer."""

    chosen_E: Tensor
    """How often each expert was chosen."""
    probs_E: Tensor
    """The sum of its probabilities, through which the gradient flows."""
    rows: Tensor
    """How many there are to choose for."""


class Balance(NamedTuple):
    """What the auxiliary loss must know of the whole step."""

    share_E: Tensor
    rows: Tensor

    @staticmethod
    def of(parts: Iterable[Routed]) -> Balance:
        """Of all tokens of the step."""
        chosen, _, rows = zip(*parts, strict=True)
        total = torch.stack(rows).sum().clamp(min=1.0)
        return Balance(torch.stack(chosen).sum(dim=0) / total, total)

    def loss(self, own: Routed) -> Tensor:
        """What these tokens add to it: summed over all of the step, the auxiliary loss."""
        share_E = self.share_E.to(own.probs_E)
        return len(share_E) * (share_E * own.probs_E).sum() / self.rows.to(own.probs_E)


def routed(logits: Sequence[Tensor], chosen: int, counts_N: Tensor) -> Routed:
    """From the logits [N, E] of each layer's router.

    Args:
        logits: by layer.
        chosen: experts that a token goes to.
        counts_N: 1 for each token, 0 for padding.
    """
    counts_N = counts_N.float()
    chosen_E = probs_E = logits[0].new_zeros(logits[0].shape[-1], dtype=torch.float32)
    for layer_NE in logits:
        probs_NE = layer_NE.float().softmax(dim=-1)
        places = probs_NE.detach().topk(chosen, dim=-1).indices
        chosen_E = chosen_E.scatter_add(0, places.flatten(), counts_N.repeat_interleave(chosen))
        probs_E = probs_E + (probs_NE * counts_N[:, None]).sum(dim=0)
    return Routed(chosen_E, probs_E, counts_N.sum() * len(logits))
