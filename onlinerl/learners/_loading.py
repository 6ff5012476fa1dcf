"""Reading a model from disk, whole."""

from __future__ import annotations

import ctypes
import gc
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from onlinerl.batch import Batch
from onlinerl.errors import ConfigError
from onlinerl.learners._policy import Policy
from onlinerl.learners._reward import RewardNetwork
from onlinerl.learners._vocabulary import FrozenStates
from onlinerl.preference_models import RewardHead
from onlinerl.protocols.needs import Needs

CAUSAL, REWARD = "AutoModelForCausalLM", "AutoModelForSequenceClassification"
"""What transformers calls a policy and a reward model."""

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ModelReader:
    """Reads models for one rank.

    Args:
        dtype, attention: of the model, as transformers takes them.
        device: of this rank.
        padding_free: of the policies, see `Policy`.
    """

    def __init__(self, dtype: torch.dtype, attention: str, device: torch.device, *, padding_free: bool = False) -> None:
        self._dtype, self._attention, self._device = dtype, attention, device
        self._padding_free = padding_free
        self._frozen: tuple[str, Policy] | None = None

    def trained(self, model: str, needs: Needs) -> Policy | RewardNetwork:
        """The policy that is going to be trained, with the critic that its algorithm needs, or the reward model in its place."""
        if needs.reward_head is not None:
            return self._rewards(model, RewardHead(*needs.reward_head))
        return Policy(self._read(model), needs.critic, *self._critic(needs), padding_free=self._padding_free)

    def _rewards(self, model: str, head: RewardHead) -> RewardNetwork:
        """A reward model that is trained further, or a language model with a new head, whose first weights are those of the seed."""
        network = self._read(model, REWARD, labels=head.outputs)
        return RewardNetwork(network, head, padding_free=self._padding_free)

    def _critic(self, needs: Needs) -> tuple[PreTrainedModel | None, nn.Linear | None]:
        """Backbone and head of a critic that begins as a reward model; of any other, nothing."""
        if needs.critic_model is None:
            return None, None
        model = self._read(needs.critic_model, REWARD)
        head: nn.Linear = model.score
        return model.base_model, head if needs.critic_head else None

    def frozen(self, model: str) -> Policy:
        """A saved model that only gives log-probs. One at a time is kept: base and previous take turns."""
        if self._frozen is None or self._frozen[0] != model:
            self.forget()  # free the old one before reading the new one
            policy = Policy(self._read(model), padding_free=self._padding_free)
            self._frozen = (model, self._prepared(policy.eval().requires_grad_(False)))
            give_back()
        return self._frozen[1]

    @torch.no_grad()
    def states(self, model: str, batch: Batch) -> FrozenStates:
        """What a saved model says about the tokens of a batch, short of its logits. Collective under ZeRO-3."""
        policy = self.frozen(model)
        return self.frozen_states(policy, policy(batch, states_only=True))

    def frozen_states(self, policy: Policy, hidden_NH: Tensor) -> FrozenStates:
        """Of these states, and of what makes logits of them."""
        return FrozenStates(hidden_NH, *self._output(policy), policy.head.rule)

    @property
    def kept(self) -> Policy | None:
        """The frozen model that is kept now, if any."""
        return None if self._frozen is None else self._frozen[1]

    def forget(self) -> None:
        """Give the memory of the frozen model back."""
        if self._frozen is not None:
            self._frozen = None
            gc.collect()  # parameters that were cut up are part of reference cycles

    def _read(self, model: str, kind: str = CAUSAL, labels: int | None = None) -> PreTrainedModel:
        return self._from_disk(model, kind, labels).to(self._device)

    def _from_disk(self, model: str, kind: str, labels: int | None = None) -> PreTrainedModel:
        """`labels`: of a reward model that is going to be trained, whose head may be new; None wants one that is trained."""
        import transformers

        read = getattr(transformers, kind).from_pretrained
        network: PreTrainedModel
        asked = {"dtype": self._dtype, "attn_implementation": self._attention, "output_loading_info": True}
        network, report = read(model, **asked, **({} if labels is None else {"num_labels": labels}))
        if kind == REWARD and labels is None and report["missing_keys"]:  # transformers would make them up at random
            raise ConfigError(
                f"{model} lacks trained weights for {', '.join(sorted(report['missing_keys']))}",
                field="algorithm.critic_model",
                fix="give a trained reward model; a language model has no reward head",
            )
        return network

    def _prepared(self, policy: Policy) -> Policy:
        """A frozen model as it is kept."""
        return policy

    def _output(self, policy: Policy) -> tuple[Tensor, Tensor | None]:
        """Output matrix and bias of a frozen model, whole."""
        return policy.head.weight, policy.head.bias


def give_back() -> None:
    """Return freed memory to the system: the C library keeps it, in holes that are seldom filled again, and a share is no share."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc only
    if trim is not None:
        trim(0)
