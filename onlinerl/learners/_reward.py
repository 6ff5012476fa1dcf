"""The network of a reward or preference model: a sequence classifier that is read at the last token of each sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from onlinerl.batch import Batch, Outputs
from onlinerl.errors import ConfigError
from onlinerl.learners._policy import Network
from onlinerl.preference_models import KEY, RewardHead

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class RewardNetwork(Network):
    """A sequence classifier whose outputs [B, D] are `Outputs.rewards_BD`.

    Args:
        model: of transformers, with a linear head called `score` on the states of a decoder.
        head: what it is trained for, which goes into the model's configuration.
        padding_free: whether sequences are laid one after the other in one row, instead of padded to one length.

    Raises:
        ConfigError: if it has no such head, or cannot be `padding_free`.
    """

    def __init__(self, model: PreTrainedModel, head: RewardHead, *, padding_free: bool = False) -> None:
        super().__init__(model, padding_free=padding_free)
        if not isinstance(getattr(model, "score", None), nn.Linear):
            raise ConfigError(
                f"{type(model).__name__} of transformers has no head called `score` on its last state",
                field="model",
                fix="give a decoder, e.g. of the families of Llama, Qwen, Gemma or Mistral",
            )
        config: Any = model.config
        config.architectures = [type(model).__name__]  # of the language model that was read it names another
        setattr(config, KEY, dict(head.description))
        self._pack()

    @property
    def head(self) -> nn.Linear:
        """What makes outputs of the states; it is trained whole, whatever adapters there are."""
        layer: nn.Linear = self.model.score
        return layer

    def forward(self, batch: Batch, **_: object) -> Outputs:
        """One pass over all rows. There are no log-probs: they are zeros."""
        rows = torch.arange(len(batch.tokens_BS), device=batch.tokens_BS.device)
        last = batch.prompt_lengths_B + batch.lengths_B - 1
        states_BH = self._states(self.model.base_model, batch, rows, last)
        return Outputs(
            logprobs_BT=torch.zeros(batch.mask_BT.shape, device=states_BH.device), rewards_BD=self.head(states_BH).float()
        )
