"""What an iteration has trained, merged with what supervised fine-tuning had."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from onlinerl import hub
from onlinerl.config import OnlineMergingConfig
from onlinerl.errors import LearnerError
from onlinerl.learners._interpolation import Interpolated, SavedSource
from onlinerl.ops.merging import merged
from onlinerl.protocols.learner import WeightSource
from onlinerl.types import derive_seed

Named = Iterable[tuple[str, Tensor]]


class OnlineMerging:
    """Merges in place, tensor by tensor; see `onlinerl.ops.merging.merged`.

    Args:
        config: how.
        tuned: the model that training began with.
        names: of the tensors, in the order in which `merge` gets them.
        seed: of the run: what is dropped of the change of supervised fine-tuning is the same in every iteration.

    Raises:
        LearnerError: if the two models have other tensors.
    """

    def __init__(self, config: OnlineMergingConfig, tuned: str, names: list[str], seed: int) -> None:
        self._config, self._seed = config, seed
        self._before, self._after = (self._source(model, names) for model in (config.base_model, tuned))
        Interpolated(self._before, self._after, 1)  # refuses models that do not go together
        self._kept: dict[str, Tensor] = {}

    @staticmethod
    def _source(model: str, names: list[str]) -> WeightSource:
        try:
            return SavedSource(hub.local(model) or Path(model), names)
        except LearnerError as error:
            raise LearnerError(error.cause, field="training.online_merging", fix=error.fix) from error

    def keep(self, weights: Named) -> None:
        """Remember the weights as they are before training, in host memory."""
        self._kept = {name: weight.detach().to("cpu", copy=True) for name, weight in weights}

    @torch.no_grad()
    def merge(self, weights: Named, seed: int) -> None:
        """Replace each weight by what it was, plus the merged change."""
        config = self._config
        for (name, weight), (_, before), (_, after) in zip(weights, self._before, self._after, strict=True):
            change = weight - self._kept.pop(name).to(weight.device)
            tuning = (after.float() - before.float()).to(weight.device)
            seeds = derive_seed(seed, name), derive_seed(self._seed, "online_merging", name)
            to = merged(change, tuning, method=config.method, density=config.density, alpha=config.alpha, seeds=seeds)
            weight.add_(to - change)  # so that a change which merging leaves as it is leaves the weights as they are
