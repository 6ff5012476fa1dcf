"""The optimizers a learner can step with."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from onlinerl.config import TrainingConfig


class _Checked:
    """Clips the gradient, and takes no step if its norm is not finite (R-E6): what DeepSpeed's wrappers do where there is one.

    `overflow` and `_global_grad_norm` are the names under which DeepSpeed looks for the outcome.
    """

    param_groups: list[dict[str, Any]]
    max_grad_norm: float
    overflow = False
    _global_grad_norm = 0.0

    def step(self, closure: None = None) -> None:
        """One step, or none."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        self._global_grad_norm, self.overflow = norm.item(), not bool(norm.isfinite())
        if not self.overflow:
            super().step(closure)  # type: ignore[misc]


class _CheckedAdamW(_Checked, torch.optim.AdamW): ...


class _CheckedRMSprop(_Checked, torch.optim.RMSprop): ...


def build_optimizer(groups: list[dict[str, Any]], training: TrainingConfig, *, checked: bool) -> torch.optim.Optimizer:
    """The configured optimizer over these parameter groups.

    Args:
        groups: as torch takes them.
        training: the training section.
        checked: clip, and refuse gradients that are not finite; False where a wrapper does it.
    """
    # Each step sets its own rate. Some wrappers take a trial step when they are made: with rate 0 it moves nothing.
    common = {"lr": 0.0, "weight_decay": training.weight_decay}
    optimizer: torch.optim.Optimizer
    if training.optimizer == "rmsprop":
        optimizer = (_CheckedRMSprop if checked else torch.optim.RMSprop)(groups, **common)
    else:
        # One fused kernel instead of dozens of small ones per tensor: several times faster, on CPU too.
        optimizer = (_CheckedAdamW if checked else torch.optim.AdamW)(groups, fused=True, **common)
    if isinstance(optimizer, _Checked):
        optimizer.max_grad_norm = training.max_grad_norm
    return optimizer
