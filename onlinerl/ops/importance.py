"""Weights that make responses of one policy stand for those of another: importance sampling between sampler and learner."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from onlinerl.ops.kl import bounded_exp

Mode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


def importance_weights(log_ratio_BT: Tensor, mode: Mode, cap: float) -> tuple[Tensor, Tensor]:
    """w[B, T] without gradient, and where the ratio is above `cap`, bool[B, T].

    The ratio is that of a token, or the product of those of all tokens of a response (`sequence`): "Your Efficient RL Framework Secretly
    Brings You Off-Policy RL Training". A larger one than `cap` counts as `cap` (`truncate`) or as 0 (`mask`): "Every Step Evolves:
    Scaling Reinforcement Learning for Trillion-Scale Thinking Model".

    Args:
        log_ratio_BT: log(learner / sampler) of each response token, 0 where there is none.
        mode: which ratio, and what becomes of one that is too large.
        cap: the largest ratio that is used as it is.
    """
    log_ratio_BT = log_ratio_BT.detach()
    if mode.startswith("sequence"):
        log_ratio_BT = log_ratio_BT.sum(dim=1, keepdim=True).expand_as(log_ratio_BT)
    ratio_BT = bounded_exp(log_ratio_BT)
    above_BT = ratio_BT > cap
    limited_BT = ratio_BT.clamp(max=cap) if mode.endswith("truncate") else torch.where(above_BT, 0.0, ratio_BT)
    return limited_BT, above_BT
