"""Merging a change of weights with another one: "Online Merging Optimizers for Boosting Rewards and Mitigating Tax in Alignment"."""

from __future__ import annotations

from math import floor
from typing import Literal

import torch
from torch import Tensor

Method = Literal["ondare", "onties"]


def merged(change: Tensor, other: Tensor, *, method: Method, density: float, alpha: float, seeds: tuple[int, int]) -> Tensor:
    """`alpha * other' + (1 - alpha) * change'` of one tensor, each made sparse first.

    `ondare` keeps each entry with probability `density` and divides it by that. `onties` keeps the share `density` of the entries that are
    largest, and of these the ones that have the sign of the sum of both; a sum of 0 counts as positive. A tensor of which less than one
    entry would be kept is not made sparse.

    Args:
        change: what training has done, any shape.
        other: what it is merged with, of the same shape.
        method, density, alpha: see above; with alpha 0 and density 1 `ondare` gives `change` back, bit for bit.
        seeds: of the masks of `change` and of `other`, for `ondare`.
    """
    if floor(density * change.numel()) > 0:
        if method == "ondare":
            change, other = (_dropped(x, density, seed) for x, seed in zip((change, other), seeds, strict=True))
        else:
            change, other = (_largest(x, density) for x in (change, other))
            positive = change + other >= 0
            change, other = (torch.where((x >= 0) == positive, x, 0.0) for x in (change, other))
    both: Tensor = alpha * other + (1 - alpha) * change
    return both


def _dropped(x: Tensor, density: float, seed: int) -> Tensor:
    """With a mask that is the same on every device."""
    drawn = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed))
    return torch.where((drawn < density).to(x.device), x / density, 0.0)


def _largest(x: Tensor, density: float) -> Tensor:
    flat = x.flatten()
    kept = flat.abs().topk(floor(density * flat.numel()), sorted=False).indices
    sparse = torch.zeros_like(flat)
    sparse[kept] = flat[kept]
    return sparse.view_as(x)
