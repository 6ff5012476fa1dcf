"""One rank of the learner on plain torch.

Every rank keeps all weights and an optimizer of its own. Gradients are added up in fp32, over micro-batches and then over ranks, so
that all ranks take the same step. Weights that compute in bfloat16 have fp32 masters, which the optimizer steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from onlinerl.learners._loading import ModelReader
from onlinerl.learners._online_merging import OnlineMerging
from onlinerl.learners._optimizer import build_optimizer, parameter_groups
from onlinerl.learners._plain import load_plain
from onlinerl.learners._rank import Rank
from onlinerl.types import TrainItem

__all__ = ["TorchRank"]

_FILE = "state.pt"


class TorchRank(Rank):
    """Holds the policy and its optimizer; see `Rank`."""

    def _build(self, model: str) -> None:
        attention, packed = self.config.attn_implementation, self.config.padding_free
        self._reader = ModelReader(self.dtype, attention, self.device, padding_free=packed)
        self._read_policy(model)
        if self.config.gradient_checkpointing:
            self._policy.recompute_activations()
        # By the parameter that computes, what the optimizer steps: itself, or its fp32 master.
        self._stepped: dict[nn.Parameter, nn.Parameter] = {
            p: p if p.dtype == torch.float32 else nn.Parameter(p.detach().float())
            for p in self._policy.parameters()
            if p.requires_grad
        }
        groups = parameter_groups(self._policy, self.training)
        for group in groups:
            group["params"] = [self._stepped[p] for p in group["params"]]
        self._optimizer: Any = build_optimizer(groups, self.training, checked=True)
        self._merging: OnlineMerging | None = None
        if self.training.online_merging is not None:
            names = [name for name, _ in self._masters()]
            self._merging = OnlineMerging(self.training.online_merging, model, names, self._seed)

    @property
    def _network(self) -> nn.Module:
        return self._policy

    @property
    def _groups(self) -> Sequence[dict[str, Any]]:
        groups: list[dict[str, Any]] = self._optimizer.param_groups
        return groups

    def _accumulate(self, total: Tensor, count: float) -> None:
        (total / count).backward()
        for parameter, stepped in self._stepped.items():
            if stepped is not parameter and parameter.grad is not None:
                grad = parameter.grad.float()
                stepped.grad = grad if stepped.grad is None else stepped.grad.add_(grad)
                parameter.grad = None

    def _sum_over_ranks(self) -> None:
        """A parameter without a gradient has one of 0, so that all ranks sum the same, and any number of them take the same step."""
        for stepped in self._stepped.values():
            if stepped.grad is None:
                stepped.grad = torch.zeros_like(stepped)
            if self.world_size > 1:
                dist.all_reduce(stepped.grad)

    def _apply(self) -> tuple[float, bool]:
        self._sum_over_ranks()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        applied = not self._optimizer.overflow
        if applied:
            self._copy_masters()
        return self._optimizer._global_grad_norm, applied

    @torch.no_grad()
    def _copy_masters(self) -> None:
        for parameter, stepped in self._stepped.items():
            if stepped is not parameter:
                parameter.copy_(stepped)

    def gradients(self, micro: Sequence[Sequence[TrainItem]], count: float) -> dict[str, np.ndarray]:
        """The gradient that `step` would use, by parameter name, and no step: for parity tests."""
        self._backward(micro, count)
        self._sum_over_ranks()
        named = [(name, self._stepped[p].grad) for name, p in self._trained()]
        grads = {name: grad.detach().cpu().numpy().copy() for name, grad in named if grad is not None}
        self._optimizer.zero_grad(set_to_none=True)
        return grads

    def reset_optimizer(self) -> None:
        """Forget the optimizer's moments and how many steps it took."""
        self._optimizer.state.clear()

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What has a gradient, by name."""
        return ((name, p) for name, p in self._policy.named_parameters() if p in self._stepped)

    def _masters(self) -> Iterator[tuple[str, Tensor]]:
        """What the optimizer steps of the policy itself, by parameter name."""
        return ((name, self._stepped[p]) for name, p in self._policy.model.named_parameters())

    def keep_weights(self) -> None:
        """Remember the weights as they are now, for `merge`."""
        assert self._merging is not None, "training.online_merging is off"
        self._merging.keep(self._masters())

    def merge(self, seed: int) -> None:
        """What has changed since then, merged as `training.online_merging` says: the same on every rank."""
        assert self._merging is not None, "training.online_merging is off"
        self._merging.merge(self._masters(), seed)
        self._copy_masters()

    def _owners(self) -> Sequence[object]:
        return self._optimizer, list(self._stepped.values())

    def _write(self, path: Path) -> Sequence[Path]:
        """Rank 0 writes: the others hold the same."""
        if self.rank > 0:
            return []
        masters = {name: self._stepped[p].detach() for name, p in self._trained()}
        torch.save({"weights": masters, "optimizer": self._optimizer.state_dict()}, path / _FILE)
        return [path / _FILE]

    def _read(self, path: Path) -> None:
        state = load_plain(path / _FILE, map_location=self.device, mapped=self.device.type == "cpu")
        with torch.no_grad():
            for name, parameter in self._trained():
                self._stepped[parameter].copy_(state["weights"][name])
        self._copy_masters()
        self._optimizer.load_state_dict(state["optimizer"])
        for moments in self._optimizer.state.values():  # out of the mapped file, which may be deleted
            for name, value in moments.items():
                if isinstance(value, Tensor):
                    moments[name] = value.clone()
