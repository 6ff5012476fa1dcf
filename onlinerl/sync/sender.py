"""Opens the sending half of a transport on a learner rank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightSource,
)
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

from onlinerl.protocols import learner
from onlinerl.sync import gloo, ipc


class _Source(WeightSource):
    """A learner's weights as vLLM takes them."""

    def __init__(self, source: learner.WeightSource) -> None:
        self._source = source

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(each.name, each.dtype, each.shape) for each in self._source.metadata()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self._source)


def open_sender(
    init_info: TrainerInitInfo, client: VLLMWeightSyncClient, source: learner.WeightSource
) -> TrainerWeightTransferEngine[Any]:
    """Meet the replicas. Every rank calls it with the same kind of `init_info`; rank 0 talks to `client`."""
    gloo.register()
    if isinstance(init_info, IPCTrainerInitInfo):
        init_info = ipc.fit(init_info, _Source(source).metadata())
    return WeightTransferTrainerFactory.trainer_init(init_info, client=client, source=_Source(source))
