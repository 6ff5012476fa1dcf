"""Weights over NCCL, between GPUs of different processes: vLLM's own transport on both sides."""

from __future__ import annotations

from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo


def init_info(rank: int, address: str, port: int, world_size: int) -> NCCLTrainerInitInfo:
    """What one learner rank needs to open the group.

    Args:
        rank: of the learner process; 0 sends.
        address: a routable address of the sender's machine.
        port: for the rendezvous, free on that machine.
        world_size: the sender plus all vLLM workers.
    """
    return NCCLTrainerInitInfo(rank=rank, master_address=address, master_port=port, world_size=world_size)
