"""Who wins, from two embeddings."""

from __future__ import annotations

from torch import Tensor


def antisymmetric(first: Tensor, second: Tensor) -> Tensor:
    """(R v) . u of embeddings [P, 2k], R block-diagonal of [[0, -1], [1, 0]]: [P]; the other way round it has the other sign.

    "General Preference Modeling with Preference Representations for Aligning Language Models" (arXiv 2410.02197), section 4.
    """
    return (first[:, 0::2] * second[:, 1::2] - first[:, 1::2] * second[:, 0::2]).sum(dim=1)
