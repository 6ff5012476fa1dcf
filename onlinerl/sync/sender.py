"""Opens the sending half of a transport on a learner rank."""

from __future__ import annotations

from typing import Any

from vllm.distributed.weight_transfer.base import (
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightSource,
)
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

from onlinerl.sync import gloo, ipc


def open_sender(
    init_info: TrainerInitInfo, client: VLLMWeightSyncClient, source: WeightSource
) -> TrainerWeightTransferEngine[Any]:
    """Meet the replicas. Every rank calls it with the same kind of `init_info`; rank 0 talks to `client`."""
    gloo.register()
    if isinstance(init_info, IPCTrainerInitInfo):
        init_info = ipc.fit(init_info, source.metadata())
    return WeightTransferTrainerFactory.trainer_init(init_info, client=client, source=source)
