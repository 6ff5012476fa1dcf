"""The optimizers a learner can step with."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from onlinerl.config import TrainingConfig


class _Checked(torch.optim.Optimizer):
    """Clips the gradient, and takes no step if its norm is not finite: what DeepSpeed's wrappers do where there is one.

    `overflow` and `_global_grad_norm` are the names under which DeepSpeed looks for the outcome.
    """

    max_grad_norm: float
    overflow = False
    _global_grad_norm = 0.0

    def step(self, closure: Any = None) -> Any:
        """One step, or none."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        self._global_grad_norm, self.overflow = norm.item(), not bool(norm.isfinite())
        if not self.overflow:
            super().step(closure)


class _CheckedAdamW(_Checked, torch.optim.AdamW): ...


class _CheckedRMSprop(_Checked, torch.optim.RMSprop): ...


def parameter_groups(policy: nn.Module, training: TrainingConfig) -> list[dict[str, Any]]:
    """Parameter groups as torch takes them: policy and critic ("part"), each with and without weight decay.

    Biases and the weights of norms do not decay, as everywhere in the field: matrices do. What is frozen is in no group.
    """
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in policy.named_parameters():
        if not parameter.requires_grad:
            continue
        part = "critic" if name.startswith(("critic.", "value_head.")) else "policy"
        matrix = len(getattr(parameter, "ds_shape", parameter.shape)) > 1  # the shape before ZeRO-3 cut it up
        groups.setdefault((part, matrix), []).append(parameter)
    return [
        {"params": parameters, "part": part, "weight_decay": training.weight_decay if matrix else 0.0}
        for (part, matrix), parameters in groups.items()
    ]


def critic_rate(learning_rate: float, training: TrainingConfig, critic_learning_rate: float | None) -> float:
    """The critic's learning rate of a step whose policy learns at `learning_rate`: on the same schedule, from its own peak.

    A policy that does not learn (`training.learning_rate: 0`) has no schedule: the critic's rate is then constant.
    """
    if critic_learning_rate is None:
        return learning_rate
    return critic_learning_rate * (learning_rate / training.learning_rate if training.learning_rate else 1.0)


def build_optimizer(groups: list[dict[str, Any]], training: TrainingConfig, *, checked: bool) -> torch.optim.Optimizer:
    """The configured optimizer over these parameter groups.

    Args:
        groups: see `parameter_groups`.
        training: the training section.
        checked: clip, and refuse gradients that are not finite; False where a wrapper does it.
    """
    # Each step sets its own rate. Some wrappers take a trial step when they are made: with rate 0 it moves nothing.
    optimizer: torch.optim.Optimizer
    if training.optimizer == "rmsprop":
        optimizer = (_CheckedRMSprop if checked else torch.optim.RMSprop)(groups, lr=0.0)
    else:
        # One fused kernel instead of dozens of small ones per tensor: several times faster, on CPU too.
        optimizer = (_CheckedAdamW if checked else torch.optim.AdamW)(groups, lr=0.0, fused=True)
    if isinstance(optimizer, _Checked):
        optimizer.max_grad_norm = training.max_grad_norm
    return optimizer
