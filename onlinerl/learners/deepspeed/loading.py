"""Reading a model from disk: whole on every rank, or, under ZeRO-3, cut up among the ranks while it is read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from onlinerl.learners._loading import CAUSAL, ModelReader
from onlinerl.learners._policy import LogProbHead, Policy
from onlinerl.learners._reward import RewardNetwork
from onlinerl.protocols.needs import Needs

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ShardedReader(ModelReader):
    """With ZeRO stage 3 no rank ever holds more than its share of a model and the tensors that are being read; reading is collective.

    Args:
        dtype, attention: of the model, as transformers takes them.
        device: of this rank.
        deepspeed_config: as DeepSpeed takes it.
        padding_free: of the policies, see `Policy`.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        attention: str,
        device: torch.device,
        deepspeed_config: dict[str, Any],
        *,
        padding_free: bool = False,
    ) -> None:
        super().__init__(dtype, attention, device, padding_free=padding_free)
        self._config = deepspeed_config
        self._sharded = deepspeed_config["zero_optimization"]["stage"] == 3

    def trained(self, model: str, needs: Needs) -> Policy | RewardNetwork:
        """The policy that is going to be trained, with the critic that its algorithm needs, or the reward model in its place. Collective
        under ZeRO-3."""
        if not self._sharded or needs.reward_head is not None:
            return super().trained(model, needs)
        import deepspeed

        backbone, head = self._critic(needs)
        if backbone is None and needs.critic == "separate":
            backbone = self._read(model).base_model  # a network that is cut up cannot be copied
        policy = Policy(self._read(model), needs.critic, backbone, head, padding_free=self._padding_free)
        deepspeed.zero.register_external_parameter(policy.head, policy.head.weight)
        return policy

    def _read(self, model: str, kind: str = CAUSAL, labels: int | None = None) -> PreTrainedModel:
        if not self._sharded:
            return super()._read(model, kind, labels)
        with self._cut_up():
            return self._from_disk(model, kind, labels)

    def _prepared(self, policy: Policy) -> Policy:
        if self._sharded:
            gather_in_forward(policy)
        return policy

    def _output(self, policy: Policy) -> tuple[Tensor, Tensor | None]:
        """Under ZeRO-3 a copy, which lives as long as the graph of the micro-batch: the backward pass reads it again, piece by piece, and
        ranks have different numbers of pieces, so nothing collective can happen there."""
        if not self._sharded:
            return super()._output(policy)
        import deepspeed

        with deepspeed.zero.GatheredParameters(policy.head.parameters_of_output(), modifier_rank=None):
            bias_V = policy.head.bias
            return policy.head.weight.detach().clone(), None if bias_V is None else bias_V.detach().clone()

    @contextmanager
    def _cut_up(self) -> Iterator[None]:
        """Inside, transformers builds models under `deepspeed.zero.Init` and fills them layer by layer, read by rank 0."""
        from transformers.integrations import HfDeepSpeedConfig
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        config = HfDeepSpeedConfig(self._config)  # registers itself, and is known for as long as it lives
        try:
            yield
        finally:
            unset_hf_deepspeed_config()
            del config


def gather_in_forward(policy: Policy) -> None:
    """Make the weights of a layer whole for the time of its forward pass, and only then.

    What DeepSpeed's engine does for a trained model; a model that only gives log-probs needs no more than this.
    """
    import deepspeed

    def install(module: nn.Module, parameters: list[nn.Parameter]) -> None:
        whole: list[Any] = []

        def gather(*_: Any) -> None:
            whole.append(deepspeed.zero.GatheredParameters(parameters, modifier_rank=None))
            whole[-1].__enter__()

        def release(*_: Any) -> None:
            whole.pop().__exit__(None, None, None)

        module.register_forward_pre_hook(gather)
        module.register_forward_hook(release, always_call=True)

    for module, parameters in _used_together(policy):
        install(module, parameters)


def _used_together(module: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
    """Modules, and the parameters that their forward pass needs: whole layers, and single modules outside of layers."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    if isinstance(module, GradientCheckpointingLayer):
        yield module, list(module.parameters())
        return
    own = module.parameters_of_output() if isinstance(module, LogProbHead) else list(module.parameters(recurse=False))
    if own:
        yield module, own
    for child in module.children():
        yield from _used_together(child)
