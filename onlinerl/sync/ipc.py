"""Weights through CUDA IPC handles, where learner and replica share a GPU: vLLM's own transport on both sides.

Every rank packs its weights into a buffer on its own GPU. The ranks gather their handles in a mapping from GPU to handle, rank 0 sends
the mapping to every replica, and each replica opens the one of the GPU it lives on. So every rank takes part in every message, and a
replica without a rank on its GPU fails with an error that lists the GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from vllm.distributed.weight_transfer.base import ParamMeta
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

from onlinerl.sync.gloo import nbytes


def init_info(rank: int, bucket_bytes: int) -> IPCTrainerInitInfo:
    """What one learner rank needs; handles need no rendezvous.

    Args:
        rank: of the learner process; 0 talks to the replicas.
        bucket_bytes: size of the buffer, unless a single tensor is larger.
    """
    return IPCTrainerInitInfo(rank=rank, packed=True, packed_buffer_size_bytes=bucket_bytes)


def fit(info: IPCTrainerInitInfo, metas: Sequence[ParamMeta]) -> IPCTrainerInitInfo:
    """The same with a buffer that holds the largest tensor: vLLM refuses to cut one up."""
    return replace(info, packed_buffer_size_bytes=max(info.packed_buffer_size_bytes, *map(nbytes, metas)))
