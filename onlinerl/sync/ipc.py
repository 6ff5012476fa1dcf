"""Weights through CUDA IPC handles, where learner and replica share a GPU: vLLM's own transport on both sides."""

from __future__ import annotations

from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo


def init_info(rank: int) -> IPCTrainerInitInfo:
    """What one learner rank needs; handles need no rendezvous."""
    return IPCTrainerInitInfo(rank=rank, packed=True)
